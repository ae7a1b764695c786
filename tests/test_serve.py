"""`transformers serve` itself, on a saved folder, asked by HTTP; it answers what `generate` writes."""

import base64
import io
import json
import os
import re
import signal
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers.utils.import_utils import is_serve_available

from tests import fresh
from transformers_nextflow import NextFlowForConditionalGeneration, NextFlowProcessor

if not is_serve_available():
    pytest.skip("the server needs `pip install transformers[serving]`", allow_module_level=True)

from tests.serving.servers import until  # noqa: E402

NUM_TOKENS = 6


@pytest.fixture(scope="module")
def server(tiny_checkpoint, tmp_path_factory):
    """The address of a server in a process of its own, which has not imported the package."""
    command, folder = ["-m", "transformers.cli.transformers", "serve"], tmp_path_factory.mktemp("server")
    options = ["--trust-remote-code", "--device", "cpu", "--port", 0]
    process = fresh.start(*command, tiny_checkpoint, *options, folder=folder, outputs=folder)

    def address() -> re.Match | None:
        return re.search(r"Uvicorn running on (http://\S+)", process.error.read_text())

    try:
        until(address)
        yield address()[1]
    finally:
        os.kill(process.pid, signal.SIGTERM)
        process.wait()


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 32, 3), dtype=np.uint8))


def written(folder: Path, content) -> str:
    """What the model writes, asked without a server."""
    model, processor = (each.from_pretrained(folder) for each in (NextFlowForConditionalGeneration, NextFlowProcessor))
    inputs = processor.apply_chat_template([{"role": "user", "content": content}])
    ids = model.generate(**inputs, max_new_tokens=NUM_TOKENS, do_sample=False)
    return processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]


def ask(server: str, path: str, **body) -> str:
    request = urllib.request.Request(server + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return answer.read().decode()


def question(folder: Path, content) -> dict:
    messages = [{"role": "user", "content": content}]
    return {"model": str(folder), "messages": messages, "max_tokens": NUM_TOKENS, "temperature": 0}


def about(picture: Image.Image, text: str) -> list[dict]:
    file = io.BytesIO()
    picture.save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    return [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]


def test_a_question_in_text_is_answered(server, tiny_checkpoint):
    answer = json.loads(ask(server, "/v1/chat/completions", **question(tiny_checkpoint, "What is red?")))
    [choice] = answer["choices"]
    assert choice["message"]["content"] == written(tiny_checkpoint, "What is red?")
    assert choice["finish_reason"] == "length" and answer["usage"]["completion_tokens"] == NUM_TOKENS


def test_a_question_about_a_picture_is_answered(server, tiny_checkpoint, picture):
    content = about(picture, "What is this?")
    [choice] = json.loads(ask(server, "/v1/chat/completions", **question(tiny_checkpoint, content)))["choices"]
    seen = [{"type": "image", "image": picture}, {"type": "text", "text": "What is this?"}]
    assert choice["message"]["content"] == written(tiny_checkpoint, seen)
    assert choice["message"]["content"] != written(tiny_checkpoint, "What is this?")


def test_an_answer_is_streamed(server, tiny_checkpoint, picture):
    content = about(picture, "What is this?")
    events = ask(server, "/v1/chat/completions", **question(tiny_checkpoint, content), stream=True)
    chunks = [json.loads(line.removeprefix("data: ")) for line in events.splitlines() if line.startswith("data: {")]
    text = "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])
    seen = [{"type": "image", "image": picture}, {"type": "text", "text": "What is this?"}]
    assert text and text == written(tiny_checkpoint, seen).rstrip("\ufffd")  # of half a letter nothing is sent
