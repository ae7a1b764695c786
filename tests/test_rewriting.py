"""Prompts rewritten by a chat model behind an API like OpenAI's, here one that always answers the same."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from transformers_nextflow.rewriting import INSTRUCTION, KEY, Rewriting

PROMPT = "the fruit of a tale of an apple tree"


class ChatModel(ThreadingHTTPServer):
    """Answers `status` and `body`; keeps what it was asked."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.status, self.asked, self.answers = 200, [], threading.Event()
        self.answers.set()
        answers = [{"role": "assistant", "content": text} for text in (" a red apple\n", "a second one")]
        self.body = {"choices": [{"message": answer} for answer in answers]}
        self.address = f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, self.headers["Authorization"], asked))
        self.server.answers.wait()
        body = self.server.body if isinstance(self.server.body, bytes) else json.dumps(self.server.body).encode()
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words):
        pass


@pytest.fixture
def chat_model():
    with ChatModel() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_generate_draws_the_rewritten_prompt(console, chat_model, monkeypatch):
    monkeypatch.setenv(KEY, "secret")
    rewrite = ("--rewrite", chat_model.address, "--rewrite-model", "writer")
    status, out, err = console("generate", PROMPT, "--seed", 1, "--output", "rewritten.png", "--json", *rewrite)
    assert status == 0 and "a red apple\n" in err and json.loads(out)["prompt"] == "a red apple"
    messages = [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": PROMPT}]
    asked = {"model": "writer", "messages": messages}
    assert chat_model.asked == [("/v1/chat/completions", "Bearer secret", asked)]
    console("generate", "a red apple", "--seed", 1, "--output", "plain.png")
    assert Path("rewritten.png").read_bytes() == Path("plain.png").read_bytes()
    assert len(chat_model.asked) == 1, "off by default"


def test_a_server_tells_the_rewritten_prompt(tiny_model, tiny_processor, chat_model):
    servers = pytest.importorskip("tests.serving.servers")
    with servers.running(tiny_model, tiny_processor, Rewriting(chat_model.address, "writer")) as address:
        response = servers.client(address).images.generate(prompt=PROMPT, n=2, extra_body={"seed": 3})
        assert [picture.revised_prompt for picture in response.data] == ["a red apple"] * 2
        expected = servers.draw(tiny_model, tiny_processor, "a red apple", seed=3, num_images_per_prompt=2)
        assert servers.pictures_of(response) == expected
        chat_model.status, chat_model.body = 429, b"busy"
        with pytest.raises(servers.openai.InternalServerError) as refused:
            servers.client(address).images.generate(prompt=PROMPT)
        assert refused.value.status_code == 502 and refused.value.param == "prompt" and "429" in str(refused.value)


def test_a_chat_model_that_hangs_holds_up_nobody_who_did_not_ask_for_it(tiny_model, tiny_processor, chat_model):
    servers = pytest.importorskip("tests.serving.servers")
    rewriting, many = Rewriting(chat_model.address, "writer"), 41  # more than there are threads for reading
    chat_model.answers.clear()
    with servers.running(tiny_model, tiny_processor, rewriting) as address, ThreadPoolExecutor(many) as threads:
        client = servers.client(address)
        try:
            asked = [threads.submit(client.images.generate, prompt=PROMPT) for _ in range(many)]
            servers.until(lambda: len(chat_model.asked) >= many - 1)
            chat = [{"role": "user", "content": "what?"}]
            client.chat.completions.create(model="tiny", messages=chat, max_tokens=2, timeout=20)
        finally:
            chat_model.answers.set()
        assert all(each.result().data[0].revised_prompt == "a red apple" for each in asked)


@pytest.mark.parametrize(
    "status, body, message",
    [
        (500, b"out of memory", "refuses to rewrite: HTTP Error 500.*out of memory"),
        (200, b"<html>", "answers with no message of a chat"),
        (200, {"choices": []}, "answers with no message of a chat"),
        (200, {"choices": None}, "answers with no message of a chat"),
        (200, {"choices": [{"message": {"content": None}}]}, "answers with no message of a chat"),
        (200, {"choices": [{"message": {"content": " "}}]}, "answers with an empty prompt"),
    ],
)
def test_a_chat_model_that_fails_is_named(chat_model, status, body, message):
    chat_model.status, chat_model.body = status, body
    with pytest.raises(ConnectionError, match=f"{chat_model.address} {message}"):
        Rewriting(chat_model.address, "writer")(PROMPT)


def test_nobody_there(chat_model, monkeypatch):
    monkeypatch.setattr(Handler, "send_response", lambda self, status: self.wfile.write(b"no line of HTTP\r\n"))
    with pytest.raises(ConnectionError, match=f"nobody rewrites at {chat_model.address}"):
        Rewriting(chat_model.address, "writer")(PROMPT)
    chat_model.server_close()
    with pytest.raises(ConnectionError, match=f"nobody rewrites at {chat_model.address}"):
        Rewriting(chat_model.address, "writer")(PROMPT)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"rewrite": "http://127.0.0.1/v1"}, "belong together"),
        ({"rewrite_model": "writer"}, "belong together"),
        ({"rewrite": "file:///etc/passwd", "rewrite_model": "writer"}, "must be an address such as http"),
    ],
)
def test_odd_settings(given, message):
    with pytest.raises(ValueError, match=message):
        Rewriting(**given)
