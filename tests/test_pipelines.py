"""transformers' pipelines on checkpoints in folders: text, pictures, and pictures into both.

`pipeline("any-to-any")` needs torchvision, with which `make pipeline-tests` runs these; `pipelines.json` beside the
common tests is the outcome.
"""

import numpy as np
import pytest
import transformers
from PIL import Image, ImageChops
from transformers import pipeline

from tests.test_checkpoint import CHECKPOINT
from transformers_nextflow import NextFlowForConditionalGeneration, NextFlowProcessor

if not transformers.utils.is_torchvision_available():
    pytest.skip('pipeline("any-to-any") needs torchvision: run `make pipeline-tests`', allow_module_level=True)

TEXT = {"max_new_tokens": 5, "do_sample": False}


@pytest.fixture(scope="module")
def any_to_any(tiny_checkpoint):
    return pipeline("any-to-any", model=str(tiny_checkpoint))


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 32, 3), dtype=np.uint8))


def chat(*parts: str | Image.Image) -> list[dict]:
    kinds = ["text" if isinstance(part, str) else "image" for part in parts]
    return [{"role": "user", "content": [{"type": kind, kind: part} for kind, part in zip(kinds, parts)]}]


def answer(pipe, messages: list[dict], **settings) -> str:
    """What the model writes, asked without a pipeline."""
    inputs = pipe.processor.apply_chat_template(messages)
    ids = pipe.model.generate(**inputs, **TEXT | settings)[:, inputs["input_ids"].shape[1] :]
    return pipe.processor.batch_decode(ids, skip_special_tokens=True)[0]


def drawn(pipe, messages: list[dict], **settings) -> list[Image.Image]:
    """What the model draws, asked without a pipeline."""
    inputs = pipe.processor.apply_chat_template(messages)
    tokens = pipe.model.generate(**inputs, generation_mode="image", **settings)
    return pipe.processor.post_process_image(pipe.model.decode_image_tokens(tokens))


def assert_same(pictures: list[Image.Image], expected: list[Image.Image]) -> None:
    assert [picture.size for picture in pictures] == [picture.size for picture in expected]
    for picture, other in zip(pictures, expected):
        assert ImageChops.difference(picture, other).getbbox() is None


def test_the_folder_is_opened_as_what_it_is(any_to_any):
    assert isinstance(any_to_any.model, NextFlowForConditionalGeneration)
    assert isinstance(any_to_any.processor, NextFlowProcessor)


def test_text_is_answered(any_to_any):
    messages = chat("How many circles are there?")
    (output,) = any_to_any(text=messages, return_full_text=False, generate_kwargs=TEXT)
    assert output["generated_text"] == answer(any_to_any, messages)
    (whole,) = any_to_any(text=messages, generate_kwargs=TEXT)
    assert whole["generated_text"][-1] == {"role": "assistant", "content": output["generated_text"]}


def test_a_picture_is_described(any_to_any, picture):
    messages = chat(picture, "Describe the picture.")
    (output,) = any_to_any(text=messages, return_full_text=False, generate_kwargs=TEXT)
    assert output["generated_text"] == answer(any_to_any, messages)
    assert output["generated_text"] != answer(any_to_any, chat("Describe the picture."))


def test_a_picture_beside_a_plain_text(any_to_any, picture):
    prompt = any_to_any.processor.image_token + "Describe the picture."
    (output,) = any_to_any(text=prompt, images=picture, return_full_text=False, generate_kwargs=TEXT)
    inputs = any_to_any.processor(text=prompt, images=picture, return_tensors="pt")
    ids = any_to_any.model.generate(**inputs, **TEXT)[:, inputs["input_ids"].shape[1] :]
    assert output["generated_text"] == any_to_any.processor.batch_decode(ids, skip_special_tokens=True)[0]


def test_a_picture_is_drawn(any_to_any):
    messages = chat("a red circle")
    (output,) = any_to_any(text=messages, generation_mode="image", generate_kwargs={"seed": 3})
    assert output["input_text"] == messages
    assert_same([output["generated_image"]], drawn(any_to_any, messages, seed=3))


def test_a_size_and_guidance_are_asked_for(any_to_any):
    messages, settings = chat("a red circle"), {"seed": 3, "aspect_ratio": "1:2", "guidance_scale": 4.0}
    (output,) = any_to_any(text=messages, generation_mode="image", generate_kwargs=dict(settings))
    assert output["generated_image"].size == (16, 32)
    assert_same([output["generated_image"]], drawn(any_to_any, messages, **settings))


def test_a_picture_is_edited_in_its_size(any_to_any, picture):
    messages = chat(picture, "make the blue square yellow")
    (output,) = any_to_any(text=messages, generation_mode="image", generate_kwargs={"seed": 3})
    assert output["generated_image"].size == picture.size
    assert_same([output["generated_image"]], drawn(any_to_any, messages, seed=3))


def test_several_chats_are_drawn_each_as_alone(any_to_any):
    chats = [chat("a red circle"), chat("two small squares above a large green star")]
    outputs = any_to_any(text=chats, generation_mode="image", generate_kwargs={"seed": 3})
    alone = [drawn(any_to_any, messages, seed=3)[0] for messages in chats]
    assert_same([output["generated_image"] for (output,) in outputs], alone)


def test_several_plain_texts_are_drawn(any_to_any):
    texts = ["a red circle", "two small squares above a large green star"]
    outputs = any_to_any(text=texts, generation_mode="image", generate_kwargs={"seed": 3})
    inputs = any_to_any.processor(text=texts, padding=True, return_tensors="pt")
    tokens = any_to_any.model.generate(**inputs, generation_mode="image", seed=3)
    expected = any_to_any.processor.post_process_image(any_to_any.model.decode_image_tokens(tokens))
    assert [output["input_text"] for output in outputs] == texts
    assert_same([output["generated_image"] for output in outputs], expected)


def test_several_pictures_of_one_prompt(any_to_any):
    messages, settings = chat("a red circle"), {"seed": 3, "num_return_sequences": 2}
    outputs = any_to_any(text=messages, generation_mode="image", generate_kwargs=dict(settings))
    assert_same([output["generated_image"] for output in outputs], drawn(any_to_any, messages, **settings))


def test_a_drawing_is_described_again(any_to_any):
    (output,) = any_to_any(text=chat("a red circle"), generation_mode="image", generate_kwargs={"seed": 3})
    messages = chat(output["generated_image"], "Describe the picture.")
    (described,) = any_to_any(text=messages, return_full_text=False, generate_kwargs=TEXT)
    assert described["generated_text"] == answer(any_to_any, messages)


def test_image_text_to_text_says_the_same(any_to_any, tiny_checkpoint, picture):
    messages = chat(picture, "Describe the picture.")
    describe = pipeline("image-text-to-text", model=str(tiny_checkpoint))
    (output,) = describe(text=messages, return_full_text=False, generate_kwargs=TEXT)
    assert output["generated_text"] == answer(any_to_any, messages)


@pytest.mark.skipif(not CHECKPOINT.exists(), reason="the checkpoint of emoji is not there")
def test_the_emoji_checkpoint_draws_and_describes():
    pipe = pipeline("any-to-any", model=str(CHECKPOINT))
    messages = chat("red apple, noto")
    (output,) = pipe(text=messages, generation_mode="image", generate_kwargs={"seed": 0})
    assert output["generated_image"].size == (64, 64)
    assert_same([output["generated_image"]], drawn(pipe, messages, seed=0))
    messages = chat(output["generated_image"], "describe the picture")
    (described,) = pipe(text=messages, return_full_text=False, generate_kwargs=TEXT | {"max_new_tokens": 48})
    assert described["generated_text"] == answer(pipe, messages, max_new_tokens=48)
