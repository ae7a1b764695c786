"""Requests as the model's calls: their bounds, what fits together, and what an answer looks like as it grows."""

import asyncio
import re
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from prometheus_client import generate_latest
from pydantic import ValidationError

from tests.serving.servers import mask, photo, png
from transformers_nextflow.serving.batching import Batcher
from transformers_nextflow.serving.errors import RequestError, body_of
from transformers_nextflow.serving.jobs import Answer, Growing, Job, Studio
from transformers_nextflow.serving.limits import Limits
from transformers_nextflow.serving.metrics import Metrics
from transformers_nextflow.serving.pictures import check_pictures, read_mask, read_picture
from transformers_nextflow.serving.schemas import ChatRequest, ImageRequest, Message, StreamOptions

MESSAGES = [{"role": "user", "content": "a star"}]


def asked(**given) -> ImageRequest:
    return ImageRequest(**{"prompt": "a star", **given})


def chatted(**given) -> ChatRequest:
    return ChatRequest(**{"model": "tiny", "messages": MESSAGES, **given})


@pytest.mark.parametrize(
    "request_of, name, allowed, refused",
    [
        (asked, "prompt", ["a", "a" * 32_000], ["", "a" * 32_001]),
        (asked, "negative_prompt", ["", "a" * 32_000], ["a" * 32_001]),
        (asked, "user", ["", "a"], [5]),
        (asked, "n", [1, 2], [0]),
        (asked, "seed", [0, 2**63 - 1], [-1, 2**63]),
        (asked, "guidance_scale", [0.0, 1.0, 100.0], [-0.01, 100.01]),
        (asked, "temperature", [0.0, 2.0], [-0.01, 2.01]),
        (asked, "top_k", [0, 1, 2**31 - 1], [-1, 2**31]),
        (asked, "top_p", [1e-6, 1.0], [0.9e-6, 1.01]),
        (chatted, "max_tokens", [1, 2], [0]),
        (chatted, "max_completion_tokens", [1, 2], [0]),
        (chatted, "max_images", [1, 2], [0]),
        (chatted, "n", [1], [0, 2]),
        (chatted, "modalities", [["text"], ["image", "text"]], [[], ["text", "text"], ["text", "image", "text"]]),
    ],
)
def test_bounds_of_what_is_asked(request_of, name, allowed, refused):
    for value in allowed:
        assert getattr(request_of(**{name: value}), name) == value
    for value in refused:
        with pytest.raises(ValidationError, match=name):
            request_of(**{name: value})


def test_without_chance_only_what_changes_nothing_is_taken():
    for name, value in (("top_k", 0), ("top_k", 1), ("top_p", 1.0)):
        assert getattr(asked(temperature=0.0, **{name: value}), name) == value
    for name, value in (("top_k", 2), ("top_p", 0.9)):
        with pytest.raises(ValidationError, match=name):
            asked(temperature=0.9e-6, **{name: value})
        assert getattr(asked(temperature=1e-6, **{name: value}), name) == value


def test_what_is_not_said():
    first, second = asked(), asked()
    assert (first.n, first.size, first.stream) == (1, None, False) and first.seed != second.seed
    chat = chatted()
    assert (chat.modalities, chat.max_images, chat.n, chat.stream) == (["text"], 1, 1, False)
    assert not StreamOptions().include_usage and Message(role="user", content="a").images == []
    assert asked(size="48x16").size == (16, 48) and chatted(stream=True, stream_options={}).without_effect() is None


def user(*pictures) -> list[dict]:
    return [{"role": "user", "content": [{"type": "image", "image": picture} for picture in pictures]}]


@pytest.fixture(scope="module")
def studio(tiny_model, tiny_processor):
    return Studio(tiny_model, tiny_processor, Limits(max_pixels=24 * 24, max_images=4, max_new_tokens=300))


def test_an_answer_has_the_size_of_the_first_picture_or_none(studio):
    pictures = [studio.fit(photo(16, 32), "image"), studio.fit(photo(24, 24), "image")]
    job = studio.answer_job(chatted(modalities=["text", "image"], max_images=4, guidance_scale=2.0), user(*pictures))
    assert job.arguments["image_generation"] == {"height": 32, "width": 16, "guidance_scale": 2.0}
    assert (job.arguments["max_new_images"], job.num_pictures, job.param) == (4, 1, "messages")
    of_text = studio.answer_job(chatted(), user(*pictures))
    plain = {"height": 24, "width": 24, "guidance_scale": 1.0, "image_guidance_scale": 1.0}
    assert of_text.arguments["image_generation"] == plain and of_text.arguments["max_new_images"] == 0
    drawn = studio.picture_job(asked(n=4, negative_prompt="b"), user(*pictures), "prompt")
    assert (drawn.arguments["height"], drawn.arguments["width"], drawn.num_pictures) == (32, 16, 4)
    assert (drawn.negative_prompt, drawn.param, drawn.kept) == ("b", "prompt", None) and drawn.is_awaited()


@pytest.mark.parametrize(
    "given, tokens, param",
    [
        ({}, 256, None),
        ({"max_tokens": 300}, 300, None),
        ({"max_completion_tokens": 300}, 300, None),
        ({"max_tokens": 5, "max_completion_tokens": 5}, 5, None),
        ({"max_tokens": 301}, None, "max_tokens"),
        ({"max_completion_tokens": 301}, None, "max_completion_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, None, "max_tokens"),
    ],
)
def test_how_long_an_answer_may_be(given, tokens, param, studio):
    if param is None:
        assert studio.answer_job(chatted(**given), user()).arguments["max_new_tokens"] == tokens
        few = Studio(studio.model, studio.processor, Limits(max_new_tokens=7))
        assert few.answer_job(chatted(), user()).arguments["max_new_tokens"] == 7
    else:
        with pytest.raises(RequestError) as refused:
            studio.answer_job(chatted(**given), user())
        assert refused.value.param == param


def test_pictures_of_as_many_pixels_as_allowed_are_drawn(studio):
    assert studio.picture_job(asked(size="24x24"), user(), "prompt").arguments["height"] == 24
    small = Studio(studio.model, studio.processor, Limits(max_pixels=24 * 24 - 1))
    with pytest.raises(RequestError, match="at most 575 pixels, got 24x24"):
        small.picture_job(asked(size="24x24"), user(), "prompt")
    assert small.picture_job(asked(size="16x32"), user(), "prompt").arguments["width"] == 16


def test_a_masked_picture_keeps_its_size(studio):
    for size in ("16x32", "32x16"):
        with pytest.raises(RequestError, match=f"24x24, got {size}"):
            studio.picture_job(asked(size=size), user(), "prompt", torch.ones(24, 24, dtype=torch.bool))
    kept = torch.ones(24, 24, dtype=torch.bool)
    assert studio.picture_job(asked(size="24x24"), user(), "prompt", kept).kept is kept


def test_calls_of_the_same_arguments_fit():
    kept = torch.ones(2, 2, dtype=torch.bool)
    own = Job([], "image", {"height": 2}, 0, "", 1, "prompt")
    assert own.fits(Job([], "image", {"height": 2}, 1, "a", 3, "messages"))
    assert Job([], "image", {}, 0, "", 1, "prompt", kept).fits(Job([], "image", {}, 0, "", 1, "prompt", kept[:1]))
    for others in (
        Job([], "image", {"height": 3}, 0, "", 1, "prompt"),
        Job([], "image", {"height": 1}, 0, "", 1, "prompt"),
        Job([], "interleaved", {"height": 2}, 0, "", 1, "prompt"),
        Job([], "a", {"height": 2}, 0, "", 1, "prompt"),
        Job([], "image", {"height": 2}, 0, "", 1, "prompt", kept),
    ):
        assert not own.fits(others) and not others.fits(own)


def test_a_batch_has_as_many_pictures_as_allowed_or_one_request():
    """Of those that wait, the longest waiting and all that fit to it, others in the next."""
    sizes, batches = [2, 2, 1, 1, 5, 1, 3], []

    def run(jobs):
        batches.append([job.seed for job in jobs])
        return [Answer([], True, 0, 0)] * len(jobs)

    async def ask() -> None:
        batcher = Batcher(run, Limits(max_batch=4, max_queue=7), Metrics())
        jobs = [Job([], "a" if n == 1 else "image", {}, n, "", size, "prompt") for n, size in enumerate(sizes)]
        asked = [asyncio.ensure_future(batcher.answer(job)) for job in jobs]
        await asyncio.sleep(0)
        with pytest.raises(RequestError, match="7 requests wait already"):
            await batcher.answer(jobs[0])
        work = asyncio.ensure_future(batcher.work())
        await asyncio.gather(*asked)
        work.cancel()

    asyncio.run(ask())
    assert batches == [[0, 2, 3], [1], [4], [5, 6]]


def test_an_answer_grows_token_by_token():
    """Marks of pictures part its texts, spaces at their ends and halves of a character are left out."""
    boi, eoi, told = 5, 2, []
    letters = {3: " a", 11: "b ", 12: "c", 13: "\ufffd", 14: ""}
    decode = lambda ids, skip_special_tokens: "".join(map(letters.get, ids)) if skip_special_tokens else "?"  # noqa: E731
    growing = Growing(SimpleNamespace(boi_token_id=boi, eoi_token_id=eoi), SimpleNamespace(decode=decode), told.append)
    growing.put(torch.tensor([7, 8, boi]))  # the prompt
    for token in (14, 3, 11, 13, boi, eoi, 12, boi, eoi, 13):
        growing.put(torch.tensor([token]))
    growing.end()
    assert told[:4] == [[], ["a"], ["ab"], ["ab "]]
    picture, whole = ["ab \ufffd", None], ["ab \ufffd", None, "c", None]
    assert told[4:] == [picture, picture, whole[:3], whole, whole, whole]


def test_pictures_have_at_most_so_many_pixels_and_bring_no_more_than_transparency():
    assert read_picture(png(photo(6, 4)), 24, "image").size == (6, 4)
    with pytest.raises(RequestError, match="at most 23 pixels, got 6x4"):
        read_picture(png(photo(6, 4)), 23, "image")
    picture, file = Image.new("P", (2, 2)), BytesIO()
    picture.save(file, format="PNG", transparency=0, dpi=(72, 72))
    assert set(Image.open(file).info) == {"transparency", "dpi"}
    assert read_picture(file.getvalue(), 24, "image").info == {"transparency": 0}
    check_pictures(4, Limits(max_images=4), "n")
    with pytest.raises(RequestError, match="n: at most 4 pictures, got 5"):
        check_pictures(5, Limits(max_images=4), "n")


def test_a_mask_keeps_whatever_is_not_wholly_transparent():
    half = mask(4, 2)
    half.putpixel((3, 0), (0, 0, 0, 1))
    kept = [[True, True, False, True], [True, True, False, False]]
    assert read_mask(half, (4, 2), (2, 4)).tolist() == kept
    for size in ((4, 3), (4, 1), (3, 2), (5, 2)):
        with pytest.raises(RequestError, match="a mask has its picture's size"):
            read_mask(half, size, (2, 4))
    half.putalpha(1)
    with pytest.raises(RequestError, match="none of it"):
        read_mask(half, (4, 2), (2, 4))


@pytest.mark.parametrize(
    "status, kind",
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (404, "not_found_error"),
        (429, "rate_limit_error"),
        (499, "invalid_request_error"),
        (500, "server_error"),
    ],
)
def test_errors_have_openais_kinds(status, kind):
    error = RequestError("too bad", "n", status, "odd")
    assert body_of(error) == {"error": {"message": "n: too bad", "type": kind, "param": "n", "code": "odd"}}
    assert error.headers == ({"Retry-After": "1"} if status == 429 else None)
    assert RequestError("too bad").detail == "too bad" and RequestError("too bad").status_code == 400
    assert body_of(ValueError("secret"))["error"]["type"] == "server_error"


def test_batches_are_counted_by_powers_of_two():
    metrics = Metrics()
    for found in (metrics.batches, metrics.pictures):
        found.observe(3)
    page = generate_latest(metrics.registry).decode()
    for name in ("requests", "pictures"):
        counts = re.findall(rf'^nextflow_batch_{name}_bucket{{le="([0-9.]+)"}} ([0-9.]+)$', page, re.MULTILINE)
        assert counts == [(f"{2.0**n}", f"{float(n > 1)}") for n in range(7)]


def test_the_page_tells_the_limits():
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    table = {name: int(default) for name, default in re.findall(r"^\| `--(max-[a-z-]+)` \| ([0-9]+) \|", page, re.M)}
    assert table == {name.replace("_", "-"): value for name, value in vars(Limits()).items()}
    for name in vars(Limits()):
        assert getattr(Limits(**{name: 1}), name) == 1
        with pytest.raises(ValueError, match=name.replace("_", "-")):
            Limits(**{name: 0})
