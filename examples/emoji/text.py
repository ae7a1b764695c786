"""The text tokenizer of the emoji world: byte-level BPE on its texts, with Qwen's special tokens."""

from collections.abc import Iterable, Iterator

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from .splits import SEEN
from .tasks import KINDS, Tasks
from .wordings import CAPTION

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
VOCABULARY = 4096
ITEMS = 500  # of each kind of each task, for the words of their wordings


def training_texts(tasks: Tasks) -> Iterator[str]:
    """What the text tokenizer is trained on: all names, styles and tags, and the wordings of the tasks.

    Names whose pictures are held out are among them: a word is to be a token wherever it occurs, and which letters it
    has says nothing of a picture. No text model is trained on them.
    """
    yield from (CAPTION.format(name=name, style=style) for name, style in zip(tasks.names, tasks.styles))
    yield from sorted({", ".join(tags) for tags in tasks.tags})
    for task, kinds in KINDS.items():
        for kind in kinds:
            if tasks.targets(task, kind, "train", SEEN):
                items = (tasks.draw(task, "train", number, kind=kind) for number in range(ITEMS))
                yield from (part for item in items for part in (*item.user, *item.assistant) if isinstance(part, str))
    yield from ["user\n", "assistant\n", "system\n"] * ITEMS


def train_text_tokenizer(texts: Iterable[str], vocabulary_size: int) -> PreTrainedTokenizerFast:
    """Frequent words become one token; any other text still encodes, as bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=4096
    )
