"""Real servers on free ports, requests by OpenAI's client, and what the model itself draws for them."""

import threading
import time
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from urllib.request import urlopen

import numpy as np
import pytest
import torch
from PIL import Image

from transformers_nextflow import codes_of_region

for needed in ("fastapi", "openai", "prometheus_client", "python_multipart", "uvicorn"):
    pytest.importorskip(needed, reason=f"the extra [serve], or OpenAI's client, is not installed: {needed}")

import openai  # noqa: E402
import uvicorn  # noqa: E402

from transformers_nextflow.rewriting import Rewriting  # noqa: E402
from transformers_nextflow.serving.app import create_app  # noqa: E402
from transformers_nextflow.serving.limits import Limits  # noqa: E402


@contextmanager
def running(
    model, processor, rewriting: Rewriting | None = None, api_key: str | None = None, **limits: int
) -> Iterator[str]:
    """A server, by its address."""
    app = create_app(model, processor, "tiny", Limits(**limits), api_key, rewriting)
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error")
    socket = config.bind_socket()
    socket.listen(100)  # so that clients may come before it has started
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{socket.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def held(head, after: int = 0) -> Iterator[tuple[threading.Event, list]]:
    """A model that stands still before a call of one of its heads until the event is set, `after` so many; and a list
    of all these calls."""
    let_go, calls = threading.Event(), []

    def wait(module, args) -> None:
        calls.append(args)
        if len(calls) > after:
            let_go.wait()

    handle = head.register_forward_pre_hook(wait)
    try:
        yield let_go, calls
    finally:
        let_go.set()
        handle.remove()


def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition; a server that fails never fulfils it."""
    patience = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < patience, "the server did not get there"
        time.sleep(0.005)


def metric(address: str, name: str) -> float:
    """A number of `/metrics`; 0 of what has not happened yet."""
    lines = urlopen(f"{address}/metrics").read().decode().splitlines()
    return next((float(line.split()[-1]) for line in lines if line.startswith(f"{name} ")), 0.0)


def accepted(address: str) -> int:
    """Requests that are drawn or wait."""
    return int(metric(address, "nextflow_requests_running") + metric(address, "nextflow_requests_waiting"))


def client(address: str, api_key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key=api_key, max_retries=0, timeout=120)


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def png(picture: Image.Image) -> bytes:
    file = BytesIO()
    picture.save(file, format="PNG")
    return file.getvalue()


def data_url(picture: Image.Image) -> str:
    return "data:image/png;base64," + b64encode(png(picture)).decode()


def mask(width: int, height: int) -> Image.Image:
    """Transparent, to be drawn anew, in its right half."""
    picture = Image.new("RGBA", (width, height), "black")
    picture.paste((0, 0, 0, 0), (width // 2, 0, width, height))
    return picture


def pictures_of(response) -> list[bytes]:
    """The pixels of a response of pictures."""
    return [Image.open(BytesIO(b64decode(each.b64_json))).tobytes() for each in response.data]


def parts_of(response) -> tuple[str, list[bytes]]:
    """The text of an answer, and the pixels of its pictures."""
    message = response.choices[0].message
    urls = [image["image_url"]["url"] for image in getattr(message, "images", [])]
    return message.content, [Image.open(BytesIO(b64decode(url.split(",")[1]))).tobytes() for url in urls]


def draw(model, processor, content: str | list, kept: torch.Tensor | None = None, **arguments) -> list[bytes]:
    """The pixels that the model itself draws; `kept`: where it keeps those of the first picture."""
    chat = [{"role": "user", "content": content}]
    negative_prompt = arguments.pop("negative_prompt", None)
    inputs = processor.apply_chat_template(chat, generation_mode="image", negative_prompt=negative_prompt)
    if kept is not None:
        pixels = processor.image_processor(content[0]["image"], return_tensors="pt")
        schedule = model.model.schedules.by_grid(pixels["image_grid_hw"][0].tolist())
        inputs["forced_codes"] = model.encode_images(**pixels)[None]
        inputs["forced_mask"] = codes_of_region(kept, schedule)
    tokens = model.generate(**inputs, generation_mode="image", **arguments)
    return [picture.tobytes() for picture in processor.post_process_image(model.decode_image_tokens(tokens))]
