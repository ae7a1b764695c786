"""What a document is made of is what its chat is to the model later."""

import numpy as np
import pytest
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.tiny_tokenizer import SENTENCES, SPECIAL_TOKENS
from transformers_nextflow import NextFlowProcessor
from transformers_nextflow.data.documents import Document, Message
from transformers_nextflow.data.sequences import DocumentTokenizer

BREAKS = ["user\n\n\na red circle", "assistant\n\n", "\n\n\n\n", "  \n  a", "user\n \na"]
QUESTIONS = ["a red circle", "\na red circle", "\n\n\n", " a", "  \n  a\n", "<|im_end|>", ""]


@pytest.fixture(scope="module")
def processor(tiny_processor) -> NextFlowProcessor:
    """Its tokenizer has tokens of several line breaks, and keeps those of one place together, as Qwen's."""
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(r"\s*[\r\n]+| ?\w+| ?[^\s\w]+|\s+"), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES + BREAKS * 4, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    assert len(fast.encode("user\n\n")) < len(fast.encode("user\n")) + 1
    return NextFlowProcessor(tiny_processor.image_processor, fast)


def prompt_ids(processor, content: list) -> list[int]:
    """As `generate` gets them, each picture one id."""
    chat = [{"role": "user", "content": content}]
    ids = processor.apply_chat_template(chat, sanitize_control_tokens=True)["input_ids"][0].tolist()
    slots = {processor.boi_token_id, processor.eoi_token_id}
    return [
        token
        for place, token in enumerate(ids)
        if token not in slots and not (token == ids[place - 1] == processor.image_token_id)
    ]


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("shape", ["text", "picture first", "picture last", "pictures around"])
@pytest.mark.parametrize("trims", [False, True])
def test_prompts_have_the_same_ids_in_training(processor, trims, question, shape):
    """Also where a chat template trims its texts, as Llama's does."""
    if trims:
        template = processor.chat_template.replace("body + ", "body | trim + ")
        processor = NextFlowProcessor(processor.image_processor, processor.tokenizer, template)
    pictures = {"text": (0, 0), "picture first": (1, 0), "picture last": (0, 1), "pictures around": (1, 1)}[shape]
    picture = Image.new("RGB", (24, 24))
    image, text = {"type": "image", "image": picture}, {"type": "text", "text": question}
    expected = prompt_ids(processor, [image] * pictures[0] + [text] + [image] * pictures[1])
    content = (*[None] * pictures[0], question, *[None] * pictures[1])
    messages = (Message("user", content), Message("assistant", ("\nyes\n",)))
    document = Document("one", "chat", messages, (b"",) * sum(pictures))
    ids, supervised = DocumentTokenizer(processor, processor.tokenizer.eos_token_id)(document)
    prompt = int(np.argmax(supervised))
    assert ids[:prompt].tolist() == expected
    # an answer begins with a token of its own, since a prompt ends before it
    answer = processor.tokenizer.encode("yes" if trims else "\nyes\n") + [processor.tokenizer.eos_token_id]
    assert ids[prompt : prompt + len(answer)].tolist() == answer
    assert supervised[prompt:].tolist() == [True] * len(answer) + [False] * (len(ids) - prompt - len(answer))


def test_texts_that_follow_each_other_are_one(processor):
    tokenize = DocumentTokenizer(processor, processor.tokenizer.eos_token_id)
    (ids, supervised), expected = (
        tokenize(Document("one", "chat", (Message("user", asked), Message("assistant", answered)), (b"", b"")))
        for asked, answered in (
            ((None, "a re", "d cir", "cle", None, "a bl", "ue box"), ("a st", "ar")),
            ((None, "a red circle", None, "a blue box"), ("a star",)),
        )
    )
    assert ids.tolist() == expected[0].tolist() and supervised.tolist() == expected[1].tolist()


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for message in messages %}{{ message['role'] }}{% endfor %}", "must show every text of a chat once"),
        (
            "{% for message in messages | reverse %}TEXTS{% endfor %}",
            "must show every text of a chat once and in order",
        ),
        ("{% for message in messages %}TEXTS{% endfor %}", "shows fewer images than document one has"),
    ],
)
def test_templates_that_leave_something_out(processor, template, message):
    texts = "{% for item in message['content'] if item['type'] == 'text' %}{{ item['text'] }}{% endfor %}"
    processor = NextFlowProcessor(processor.image_processor, processor.tokenizer, template.replace("TEXTS", texts))
    messages = (Message("user", (None, "a star")), Message("assistant", ("yes",)))
    with pytest.raises(ValueError, match=message):
        DocumentTokenizer(processor, processor.tokenizer.eos_token_id)(Document("one", "chat", messages, (b"",)))
