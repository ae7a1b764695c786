"""A text tokenizer for tests: byte-level BPE on a few sentences, with Qwen's special tokens."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
SENTENCES = [
    "system\nuser\nassistant\n",
    "a red circle to the left of a blue square",
    "two small squares above a large green star",
    "make the blue square yellow, and remove the star",
    "How many circles are there? Describe the picture.",
    "There is one red circle, and a black triangle below it.",
]


def tiny_text_tokenizer() -> PreTrainedTokenizerFast:
    """The sentences' words are one token each; any other text still encodes, as bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=4096
    )
