"""What a server answers is what the model itself gives, whoever else asks."""

import http.client
import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.serving.servers import (
    accepted,
    client,
    data_url,
    draw,
    held,
    mask,
    metric,
    openai,
    parts_of,
    photo,
    pictures_of,
    png,
    running,
    until,
)
from transformers_nextflow import NextFlowForConditionalGeneration, NextFlowImageProcessor, NextFlowProcessor
from transformers_nextflow.serving.jobs import make_exact

TALL, SQUARE = photo(16, 32), photo(24, 24, seed=1)


def image(picture) -> dict:
    return {"type": "image", "image": picture}


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def sent(*content: str) -> list[dict]:
    """A message of words and pictures, as clients send it."""
    is_url = [each.startswith("data:") for each in content]
    parts = [{"type": "image_url", "image_url": {"url": c}} if u else text(c) for c, u in zip(content, is_url)]
    return [{"role": "user", "content": parts}]


def test_pictures(address, tiny_model, tiny_processor):
    controls = {"guidance_scale": 3.0, "temperature": 1.5, "top_k": 20, "top_p": 0.9, "negative_prompt": "a star"}
    response = client(address).images.generate(
        prompt="a red circle", n=2, size="16x32", extra_body=controls | {"seed": 5}
    )
    expected = draw(
        *(tiny_model, tiny_processor, "a red circle"), seed=5, height=32, width=16, num_images_per_prompt=2, **controls
    )
    assert pictures_of(response) == expected and len(set(expected)) == 2
    assert response.size == "16x32" and response.output_format == "png" and response.seed == 5


def test_a_seed_that_was_not_given_is_told(address, tiny_model, tiny_processor):
    first, second = (client(address).images.generate(prompt="a red circle") for _ in range(2))
    assert first.seed != second.seed and first.size == "24x24"
    assert pictures_of(first) == draw(tiny_model, tiny_processor, "a red circle", seed=first.seed)


def test_marks_of_the_model_are_plain_text(address):
    marks = "<|vision_start|><|image_pad|><|vision_end|><|im_end|>"
    assert client(address).images.generate(prompt=marks, extra_body={"seed": 1}).size == "24x24"


def test_an_edit_has_the_size_of_its_first_picture(address, tiny_model, tiny_processor):
    response = client(address).images.edit(image=png(TALL), prompt="make it yellow", extra_body={"seed": 2})
    assert response.size == "16x32"
    assert pictures_of(response) == draw(
        tiny_model, tiny_processor, [image(TALL), text("make it yellow")], seed=2, height=32, width=16
    )
    several = [("a.png", png(TALL)), ("b.png", png(SQUARE))]
    response = client(address).images.edit(image=several, prompt="both", size="24x24", extra_body={"seed": 3})
    content = [image(TALL), image(SQUARE), text("both")]
    assert pictures_of(response) == draw(tiny_model, tiny_processor, content, seed=3, height=24, width=24)


def test_a_mask_keeps_what_is_not_transparent(address, tiny_model, tiny_processor):
    response = client(address).images.edit(
        image=png(TALL), mask=png(mask(16, 32)), prompt="a star", extra_body={"seed": 4}
    )
    kept = torch.ones(32, 16, dtype=torch.bool)
    kept[:, 8:] = False
    content = [image(TALL), text("a star")]
    expected = draw(tiny_model, tiny_processor, content, kept=kept, seed=4, height=32, width=16)
    assert pictures_of(response) == expected
    assert expected != draw(tiny_model, tiny_processor, content, seed=4, height=32, width=16)


def test_an_edit_has_the_size_that_its_picture_is_read_in(tiny_config, text_tokenizer):
    """Of a processor that reads all pictures at one level."""
    sizes = {"scale_schedules": [[[1, 1], [2, 2], [3, 3]]], "levels": {"16": 2, "24": 3}}
    for name, value in sizes.items():
        setattr(tiny_config.vq_config, name, value)
    torch.manual_seed(0)
    model = NextFlowForConditionalGeneration(tiny_config).eval()
    processor = NextFlowProcessor(NextFlowImageProcessor(8, **sizes, level="16"), text_tokenizer)
    content, kept = [image(SQUARE), text("a star")], torch.arange(16).expand(16, 16) < 8
    with running(model, processor) as address:
        for part, masked in ((None, {}), (kept, {"mask": png(mask(24, 24))})):
            asked = {"image": png(SQUARE), "prompt": "a star", "extra_body": {"seed": 4}} | masked
            response = client(address).images.edit(**asked)
            expected = draw(model, processor, content, kept=part, seed=4, height=16, width=16)
            assert response.size == "16x16" and pictures_of(response) == expected


@pytest.mark.parametrize("mode", ["I;16", "L", "P", "RGBA", "LA", "CMYK"])
def test_pictures_of_any_mode_are_read_as_the_processor_reads_them(mode, address, tiny_model, tiny_processor):
    if mode == "I;16":
        noise = np.random.default_rng(0).integers(0, 2**16, (41, 90), dtype=np.uint16)
        picture = Image.fromarray(noise)
    else:
        picture = photo(90, 41).convert("RGBA")
        picture.putalpha(photo(90, 41, seed=2).convert("L"))
        picture = picture.convert("RGB").convert(mode) if mode in ("P", "CMYK") else picture.convert(mode)
    picture.save(file := BytesIO(), format="JPEG" if mode == "CMYK" else "PNG", quality=100)
    response = client(address).images.edit(image=file.getvalue(), prompt="a star", extra_body={"seed": 4})
    content = [image(Image.open(file)), text("a star")]
    assert pictures_of(response) == draw(tiny_model, tiny_processor, content, seed=4, height=16, width=32)


def test_a_chat_answers_in_text(address, tiny_model, tiny_processor):
    response = client(address).chat.completions.create(
        model="tiny", messages=sent(data_url(TALL), "Describe the picture."), max_tokens=6
    )
    chat = [{"role": "user", "content": [image(TALL), text("Describe the picture.")]}]
    inputs = tiny_processor.apply_chat_template(chat)
    ids = tiny_model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert parts_of(response) == (tiny_processor.decode(ids, skip_special_tokens=True).strip(), [])
    assert response.choices[0].finish_reason == "length" and response.usage.completion_tokens == 6
    assert response.usage.prompt_tokens == inputs["input_ids"].shape[1]


def test_an_answer_that_ends_by_itself_says_so(address, tiny_model, tiny_processor):
    end = tiny_processor.tokenizer.eos_token_id
    handle = tiny_model.lm_head.register_forward_hook(lambda module, args, logits: likely(logits, end))
    response = client(address).chat.completions.create(model="tiny", messages=sent("a star"))
    handle.remove()
    assert response.choices[0].finish_reason == "stop" and response.choices[0].message.content == ""
    assert response.choices[0].index == 0 and response.usage.completion_tokens == 1
    tokens = iter([10, end])
    handle = tiny_model.lm_head.register_forward_hook(lambda module, args, logits: likely(logits, next(tokens)))
    response = client(address).chat.completions.create(model="tiny", messages=sent("a star"))
    handle.remove()
    assert response.choices[0].finish_reason == "stop" and response.usage.completion_tokens == 2


def likely(logits: torch.Tensor, token: int) -> torch.Tensor:
    """Logits of which this token is the most likely."""
    logits = logits.clone()
    logits[..., token] += 100.0
    return logits


def test_a_chat_answers_with_a_picture(address, tiny_model, tiny_processor):
    response = client(address).chat.completions.create(
        model="tiny",
        messages=sent(data_url(TALL), "make it yellow"),
        seed=6,
        extra_body={"modalities": ["image"], "guidance_scale": 1.5},
    )
    content = [image(TALL), text("make it yellow")]
    expected = draw(tiny_model, tiny_processor, content, seed=6, height=32, width=16, guidance_scale=1.5)
    assert parts_of(response) == ("![](picture-0)", expected)
    assert response.choices[0].finish_reason == "stop"
    inputs = tiny_processor.apply_chat_template([{"role": "user", "content": content}], generation_mode="image")
    cost = response.usage
    assert (cost.prompt_tokens, cost.completion_tokens) == (inputs["input_ids"].shape[1], 1 + 4 + 8)
    assert cost.total_tokens == cost.prompt_tokens + cost.completion_tokens


def test_a_chat_answers_in_text_and_pictures(address, tiny_model, tiny_processor):
    boi = tiny_model.config.boi_token_id
    handle = tiny_model.lm_head.register_forward_hook(lambda module, args, logits: likely(logits, boi))
    body = {"modalities": ["text", "image"], "max_images": 2, "size": "16x32", "guidance_scale": 1.5}
    response = client(address).chat.completions.create(
        model="tiny", messages=sent("a star"), seed=7, max_completion_tokens=5, extra_body=body
    )
    inputs = tiny_processor.apply_chat_template([{"role": "user", "content": "a star"}], generation_mode="interleaved")
    output = tiny_model.generate(
        **inputs,
        generation_mode="interleaved",
        image_generation={"height": 32, "width": 16, "guidance_scale": 1.5},
        max_new_images=2,
        max_new_tokens=5,
        seed=7,
        do_sample=False,
    )
    handle.remove()
    drawn = tiny_model.decode_images(output.image_codes, output.image_grid_hw)
    (parts,) = tiny_processor.post_process_multimodal_output(output, generation_mode="interleaved", pictures=drawn)
    content, pictures = parts_of(response)
    assert pictures == [part.tobytes() for part in parts[:2]] and len(parts) == 3
    assert content == f"![](picture-0)\n\n![](picture-1)\n\n{parts[2].strip()}"


SETTINGS = {"model": "tiny", "messages": sent("a star"), "max_completion_tokens": 9, "temperature": 1.0, "seed": 3}


def streamed(address: str, **body) -> tuple[list, str, list]:
    """The chunks of an answer, its text and its images."""
    usage = {"include_usage": True}
    chunks = list(client(address).chat.completions.create(**SETTINGS | body, stream=True, stream_options=usage))
    deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
    images = [image for delta in deltas for image in getattr(delta, "images", [])]
    return chunks, "".join(delta.content for delta in deltas), images


@pytest.mark.parametrize("modalities", [["text"], ["text", "image"], ["image"]])
def test_a_streamed_answer_is_the_whole_one(address, tiny_model, modalities):
    boi, number = tiny_model.config.boi_token_id, 0

    def third_is_a_picture(module, args, logits):
        nonlocal number
        number += 1
        return likely(logits, boi) if number == 3 and "image" in modalities else logits

    body = {"extra_body": {"modalities": modalities}}
    if modalities == ["image"]:
        body["max_completion_tokens"] = None
    handle = tiny_model.lm_head.register_forward_hook(third_is_a_picture)
    whole = client(address).chat.completions.create(**SETTINGS | body)
    number = 0
    chunks, content, images = streamed(address, **body)
    handle.remove()
    message = whole.choices[0].message
    assert content == message.content and images == getattr(message, "images", [])
    assert len(images) == ("image" in modalities)
    first, *between, last, usage = chunks
    assert first.choices[0].delta.role == "assistant"
    assert all(chunk.choices[0].finish_reason is None for chunk in (first, *between))
    assert last.choices[0].finish_reason == whole.choices[0].finish_reason
    assert usage.choices == [] and usage.usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1 and {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    if "text" in modalities:
        assert len(between) > 1


def test_half_a_character_before_a_picture_is_streamed_too(address, tiny_model, text_tokenizer):
    boi, half, number = tiny_model.config.boi_token_id, text_tokenizer.convert_tokens_to_ids("\u00e2"), 0

    def opens_after_half_a_character(module, args, logits):
        nonlocal number
        number += 1
        return likely(logits, {2: half, 3: boi}[number]) if number in (2, 3) else logits

    body = {"extra_body": {"modalities": ["text", "image"]}}
    handle = tiny_model.lm_head.register_forward_hook(opens_after_half_a_character)
    whole = client(address).chat.completions.create(**SETTINGS | body)
    number = 0
    _, content, _ = streamed(address, **body)
    handle.remove()
    assert content == whole.choices[0].message.content and "\ufffd\n\n![](picture-0)" in content


def test_a_stream_comes_while_it_is_written(tiny_model, tiny_processor):
    """And who leaves it leaves the queue."""
    written, let_go = 0, threading.Event()

    def wait_at_the_fourth(module, args) -> None:
        nonlocal written
        written += 1
        if written == 4:
            let_go.wait()

    with running(tiny_model, tiny_processor) as address:
        handle = tiny_model.lm_head.register_forward_pre_hook(wait_at_the_fourth)
        ask = client(address).chat.completions.create
        stream = ask(**SETTINGS, stream=True)
        text = ""
        while not text:
            text += next(stream).choices[0].delta.content
        leaving = http.client.HTTPConnection(address.removeprefix("http://"))
        body = json.dumps(SETTINGS | {"stream": True})
        leaving.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        until(lambda: accepted(address) == 2)
        leaving.close()
        until(lambda: accepted(address) == 1)
        let_go.set()
        handle.remove()
        text += "".join(chunk.choices[0].delta.content for chunk in stream)
        assert text == ask(**SETTINGS).choices[0].message.content


def test_a_stream_that_is_refused_has_the_status(address):
    with pytest.raises(openai.BadRequestError, match="positions") as refused:
        client(address).chat.completions.create(**SETTINGS | {"messages": sent("a " * 5000)}, stream=True)
    assert refused.value.param == "messages"


def test_a_stream_that_fails_in_its_midst_ends_in_an_error_of_openais(address, tiny_model):
    number = 0

    def fails_at_the_fourth(module, args, logits):
        nonlocal number
        number += 1
        return logits * float("nan") if number >= 4 else logits

    handle = tiny_model.lm_head.register_forward_hook(fails_at_the_fourth)
    stream = client(address).chat.completions.create(**SETTINGS, stream=True)
    with pytest.raises(openai.APIError, match="the logits are not finite") as failed:
        list(stream)
    handle.remove()
    assert failed.value.param == "messages"


def test_an_answer_goes_back_as_it_came(address, tiny_model, tiny_processor):
    """Its pictures stand where its text says, and the next turn reads them."""
    asked = client(address).chat.completions.create
    picture = {"modalities": ["image"]}
    first = asked(model="tiny", messages=sent("a star"), seed=1, extra_body=picture)
    turns = [*sent("a star"), first.choices[0].message.model_dump(), *sent("make it yellow")]
    second = asked(model="tiny", messages=turns, seed=2, extra_body=picture)
    drawn = Image.frombytes("RGB", (24, 24), parts_of(first)[1][0])
    chat = [
        {"role": "user", "content": [text("a star")]},
        {"role": "assistant", "content": [image(drawn)]},
        {"role": "user", "content": [text("make it yellow")]},
    ]
    inputs = tiny_processor.apply_chat_template(chat, generation_mode="image")
    tokens = tiny_model.generate(**inputs, generation_mode="image", seed=2)
    expected = tiny_processor.post_process_image(tiny_model.decode_image_tokens(tokens))
    assert parts_of(second)[1] == [expected[0].tobytes()]


def test_the_pages_examples(address, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    SQUARE.save("picture.png")
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    block = "\n".join(re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL))
    for there, here in (("http://127.0.0.1:8000", address), ("64x64", "24x24"), ("nextflow-emoji", "tiny")):
        assert there in block
        block = block.replace(there, here)
    names = {}
    exec(compile(block, "serving.md", "exec"), names)
    assert len(names["drawn"].data) == 2 and names["edited"].size == "24x24"
    assert names["answer"].choices[0].finish_reason in ("stop", "length")
    assert capsys.readouterr().out


def ask(address: str, number: int) -> tuple:
    """One of many requests, and what came of it."""
    asked, seed = client(address), {"seed": number}
    kind, words = number % 6, ["a red circle", "a blue square above a star", "two"][number % 3]
    if kind == 0:
        return pictures_of(asked.images.generate(prompt=words, size="16x32", extra_body=seed)), number
    if kind == 1:
        return pictures_of(asked.images.generate(prompt=words, n=2, extra_body=seed | {"top_k": 9})), number
    if kind == 2:
        return pictures_of(asked.images.edit(image=png(TALL), prompt=words, extra_body=seed)), number
    if kind == 3:
        upload = {"image": png(TALL), "mask": png(mask(16, 32))}
        return pictures_of(asked.images.edit(**upload, prompt=words, extra_body=seed)), number
    body = {"modalities": ["text", "image"] if kind == 4 else ["text"]}
    messages = sent(data_url(SQUARE), words)
    settings = {"max_tokens": 5, "temperature": 1.0, "seed": number}
    return parts_of(
        asked.chat.completions.create(model="tiny", messages=messages, **settings, extra_body=body)
    ), number


@pytest.fixture
def exact_model(tiny_checkpoint):
    model = NextFlowForConditionalGeneration.from_pretrained(tiny_checkpoint).eval()
    make_exact(model)
    return model


def test_exact_logits_do_not_depend_on_their_company(exact_model, tiny_processor):
    prompts = ["a red circle", "a blue square above a star", "two"]
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]

    def logits(chats: list, seeds: list[int]) -> torch.Tensor:
        inputs = tiny_processor.apply_chat_template(chats, generation_mode="image")
        settings = {"generation_mode": "image", "output_logits": True, "return_dict_in_generate": True}
        return torch.cat(exact_model.generate(**inputs, seed=seeds, **settings).logits, dim=1)

    together = logits(chats, [0, 1, 2])
    for number, chat in enumerate(chats):
        assert torch.equal(logits([chat], [number])[0], together[number])


def test_requests_together_get_what_each_gets_alone(exact_model, tiny_processor):
    numbers = range(24)
    with running(exact_model, tiny_processor) as address, ThreadPoolExecutor(16) as threads:
        with held(exact_model.code_head) as (let_go, _):
            together = [threads.submit(ask, address, number) for number in numbers]
            until(lambda: accepted(address) == 16)
            let_go.set()
            together = [future.result() for future in together]
        batches, requests = (metric(address, f"nextflow_batch_requests_{name}") for name in ("count", "sum"))
        assert requests == len(numbers) and batches <= requests - 9  # of the 15 that waited, as there are 6 kinds
        assert together == [ask(address, number) for number in numbers]


def test_a_request_that_fails_leaves_its_batch_whole(tiny_model, tiny_processor):
    with running(tiny_model, tiny_processor) as address, ThreadPoolExecutor(4) as threads:
        asked = client(address).images
        with held(tiny_model.code_head) as (let_go, _):
            first = threads.submit(asked.generate, prompt="a")
            until(lambda: accepted(address) == 1)
            prompts = ["a star", "a " * 5000, "a red circle"]
            others = [threads.submit(asked.generate, prompt=each, extra_body={"seed": 8}) for each in prompts]
            until(lambda: accepted(address) == 4)
            let_go.set()
            first.result()
            with pytest.raises(openai.BadRequestError, match="positions") as error:
                others[1].result()
        assert error.value.param == "prompt"
        for prompt, future in ((prompts[0], others[0]), (prompts[2], others[2])):
            assert pictures_of(future.result()) == draw(tiny_model, tiny_processor, prompt, seed=8)
