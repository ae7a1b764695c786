"""Bad requests get OpenAI's form of an error, which names the field."""

import copy
import http.client
import json
import struct
import zlib
from base64 import b64encode
from io import BytesIO
from math import inf, nan
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
import torch
from PIL import Image

from tests.serving.servers import client, data_url, mask, metric, openai, photo, png, running
from transformers_nextflow import (
    NextFlowForConditionalGeneration,
    NextFlowImageProcessor,
    NextFlowProcessor,
    NextFlowVQConfig,
)

PHOTO = photo(24, 24)
URL = "messages[0].content[0].image_url.url"


def refusal(request: Request) -> tuple[int, dict]:
    """Status and error of a request."""
    with pytest.raises(HTTPError) as refused:
        urlopen(request)
    error = json.loads(refused.value.read())["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return refused.value.code, error


def posted(address: str, path: str, body: object) -> Request:
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Request(f"{address}/v1/{path}", body, {"Content-Type": "application/json"})


def bomb() -> bytes:
    """A PNG whose header promises more pixels than there is memory for."""
    data = bytearray(png(PHOTO))
    data[16:24] = struct.pack(">II", 10**6, 10**6)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


SVG = "data:image/svg+xml;base64," + b64encode(b'<svg xmlns="http://www.w3.org/2000/svg"/>').decode()
PICTURES = [
    ({}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": 5}, "prompt"),
    ({"prompt": "\ud800"}, "prompt"),
    ({"prompt": "a" * 32_001}, "prompt"),
    ({"prompt": "a" + " a" * 5000}, "prompt"),
    ({"n": 0}, "n"),
    ({"n": 5}, "n"),
    ({"n": "many"}, "n"),
    ({"size": "large"}, "size"),
    ({"size": "25x24"}, "size"),
    ({"size": "0x24"}, "size"),
    ({"size": "1024x1024"}, "size"),
    ({"seed": -1}, "seed"),
    ({"seed": 2**63}, "seed"),
    ({"seed": 0.5}, "seed"),
    ({"guidance_scale": -1}, "guidance_scale"),
    ({"guidance_scale": 101}, "guidance_scale"),
    ({"temperature": 3}, "temperature"),
    ({"top_k": -1}, "top_k"),
    ({"top_p": 0}, "top_p"),
    ({"negative_prompt": ["a"]}, "negative_prompt"),
    ({"negative_prompt": "a" + " a" * 5000}, "negative_prompt"),
    ({"response_format": "url"}, "response_format"),
    ({"output_format": "webp"}, "output_format"),
    ({"quality": "high"}, "quality"),
    ({"background": "transparent"}, "background"),
    ({"style": "vivid"}, "style"),
    ({"n": -1}, "n"),
    ({"n": True}, "n"),
    ({"n": "2"}, "n"),
    ({"n": 10**30}, "n"),
    ({"seed": nan}, "seed"),
    ({"seed": "5"}, "seed"),
    ({"seed": [5]}, "seed"),
    ({"guidance_scale": nan}, "guidance_scale"),
    ({"guidance_scale": inf}, "guidance_scale"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": nan}, "top_p"),
    ({"size": "24X24"}, "size"),
    ({"size": "-24x24"}, "size"),
    ({"size": "24x24\n"}, "size"),
    ({"size": "٢٤x٢٤"}, "size"),
    ({"size": ["24x24"]}, "size"),
    ({"size": "99999x99999"}, "size"),
    ({"stream": True}, "stream"),
    ({"moderation": "low"}, "moderation"),
    ({"user": 5}, "user"),
    ({"ｓeed": 5}, "ｓeed"),
    ({"guidance_scale": 1, "negative_prompt": "a circle"}, "negative_prompt"),
    ({"temperature": 0, "top_p": 0.5}, "top_p"),
    ({"temperature": 0, "top_k": 5}, "top_k"),
    ({"n": 1.0}, "n"),
    ({"seed": 5.0}, "seed"),
    ({"stream": 0}, "stream"),
    ({"stream": "false"}, "stream"),
    ({"user": "\ud800"}, "user"),
    ({"model": "\ud800"}, "model"),
    ({"size": "\ud800"}, "size"),
    ({"size": "24×24"}, "size"),
    ({"size": " 24x24"}, "size"),
    ({"size": "024x24"}, "size"),
    ({"size": {"width": 24, "height": 24}}, "size"),
    ({"size": [None]}, "size"),
    ({"prompt": {"a": None}}, "prompt"),
    ({"image": data_url(PHOTO)}, "image"),
    ({"extra_body": {"seed": 1}}, "extra_body"),
]


@pytest.mark.parametrize("body, param", PICTURES)
def test_pictures(address, body, param):
    body = body if "prompt" in body or not body else {"prompt": "a star"} | body
    status, error = refusal(posted(address, "images/generations", body))
    assert status == 400 and error["param"] == param and error["message"].startswith(f"{param}: ")


def part(url: str) -> dict:
    return {"type": "image_url", "image_url": {"url": url}}


def user(*content) -> list[dict]:
    return [{"role": "user", "content": list(content)}]


def message(role: str, *images: dict) -> dict:
    return {"role": role, "content": "a", "images": list(images)}


CHAT = [{"role": "user", "content": "a"}]
CHATS = [
    ({"messages": []}, "messages"),
    ({"messages": "a"}, "messages"),
    ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role"),
    ({"messages": [{"role": "assistant", "content": "a"}]}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": user({"type": "input_audio"})}, "messages[0].content[0].type"),
    ({"messages": user({"type": "text"})}, "messages[0].content[0]"),
    ({"messages": user(part("http://127.0.0.1:1/a.png"))}, URL),
    ({"messages": user(part("/etc/passwd"))}, URL),
    ({"messages": user(part("file:///etc/passwd"))}, URL),
    ({"messages": user(part("data:image/png,abc"))}, URL),
    ({"messages": user(part("data:image/png;base64,???"))}, URL),
    ({"messages": user(part("data:image/png;base64,AAAA"))}, URL),
    ({"messages": user(part(data_url(PHOTO)[:-400]))}, URL),
    ({"messages": user(part(data_url(photo(201, 200))))}, URL),
    ({"messages": user(*[part(data_url(PHOTO))] * 5)}, "messages"),
    ({"messages": [message("user", part(data_url(PHOTO)))]}, "messages[0]"),
    ({"messages": [message("assistant", part("a.png"))]}, "messages[0].images[0].image_url.url"),
    ({"messages": [message("assistant", part(data_url(PHOTO))), message("user")]}, "messages[0].images"),
    ({"modalities": ["audio"]}, "modalities[0]"),
    ({"modalities": []}, "modalities"),
    ({"modalities": ["text", "text"]}, "modalities"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_completion_tokens": 1025}, "max_completion_tokens"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
    ({"modalities": ["text", "image"], "max_images": 5}, "max_images"),
    ({"modalities": ["text", "image"], "size": "17x16"}, "size"),
    ({"size": "16x32"}, "size"),
    ({"guidance_scale": 2.0}, "guidance_scale"),
    ({"modalities": ["image"], "max_tokens": 5}, "max_tokens"),
    ({"modalities": ["image"], "max_images": 2}, "max_images"),
    ({"stream": True, "modalities": ["image"], "max_images": 2}, "max_images"),
    ({"n": 2}, "n"),
    ({"tools": []}, "tools"),
    ({"messages": [None]}, "messages[0]"),
    ({"messages": {"role": "user", "content": "a"}}, "messages"),
    ({"messages": user()}, "messages[0].content"),
    ({"messages": user("a")}, "messages[0].content[0]"),
    ({"messages": user(part(data_url(PHOTO)) | {"text": "a"})}, "messages[0].content[0]"),
    ({"messages": user(part("data:image/png;base64,"))}, URL),
    ({"messages": user(part(data_url(PHOTO)[:-1]))}, URL),
    ({"messages": user(part(data_url(PHOTO).replace("image/png", "text/plain")))}, URL),
    ({"messages": user(part(SVG))}, URL),
    ({"messages": user(part(data_url(PHOTO) + "\u00e9"))}, URL),
    ({"modalities": "image"}, "modalities"),
    ({"max_images": 1.5, "modalities": ["text", "image"]}, "max_images"),
    ({"stream": "false"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_obfuscation": 1}}, "stream_options.include_obfuscation"),
    ({"temperature": True}, "temperature"),
    ({"n": 1.0}, "n"),
    ({"n": True}, "n"),
    ({"n": 0}, "n"),
    ({"messages": user({"type": "text", "text": "\udfff"})}, "messages[0].content[0].text"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content[0].text"),
    ({"messages": user({"type": "text", "text": None})}, "messages[0].content[0]"),
    ({"messages": user({"type": "image_url", "image_url": {"url": None}})}, URL),
    ({"messages": user({"type": "image_url", "image_url": data_url(PHOTO)})}, "messages[0].content[0].image_url"),
    ({"messages": user(part(data_url(PHOTO).replace("base64,", "base64, ")))}, URL),
    ({"messages": user(part(data_url(PHOTO).replace("/", "_").replace("data:image_", "data:image/")))}, URL),
    ({"messages": user(part(data_url(PHOTO) + "=="))}, URL),
    ({"messages": user(part(data_url(PHOTO).replace("png", "pñg")))}, URL),
    ({"messages": user(part(data_url(PHOTO).replace("data:", "DATA:")))}, URL),
    ({"messages": [*CHAT, {"role": "system", "content": "a"}]}, "messages"),
    ({"messages": [{"role": "developer", "content": "a"}, *CHAT]}, "messages[0].role"),
    ({"messages": [*CHAT, {"role": "assistant", "content": "a", "tool_calls": []}, *CHAT]}, "messages[1].tool_calls"),
    ({"messages": [*CHAT, {"role": "tool", "content": "a", "tool_call_id": "b"}, *CHAT]}, "messages[1].role"),
    ({"messages": [{"role": "user", "content": "a", "name": "b"}]}, "messages[0].name"),
    ({"modalities": [None]}, "modalities[0]"),
    ({"modalities": ["image"], "guidance_scale": 1.0, "negative_prompt": "b"}, "negative_prompt"),
    ({"modalities": ["text", "image"], "guidance_scale": 1.0, "negative_prompt": "b"}, "negative_prompt"),
    ({"temperature": 0.0, "top_k": 5}, "top_k"),
    ({"temperature": 1e-7, "top_p": 0.5}, "top_p"),
    ({"max_tokens": 10**30}, "max_tokens"),
    ({"max_tokens": 5.0}, "max_tokens"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
]


@pytest.mark.parametrize("body, param", CHATS)
def test_chats(address, body, param):
    body = {"model": "tiny", "messages": CHAT} | body
    status, error = refusal(posted(address, "chat/completions", body))
    assert status == 400 and error["param"] == param and error["message"].startswith(f"{param}: ")


EDITS = [
    ({"image": b"no picture"}, "image"),
    ({"image": png(photo(201, 200))}, "image"),
    ({"image": [png(PHOTO)] * 5}, "image"),
    ({"mask": png(mask(24, 25))}, "mask"),
    ({"mask": png(PHOTO)}, "mask"),
    ({"mask": b"no picture"}, "mask"),
    ({"mask": png(mask(24, 24)), "size": "16x32"}, "size"),
    ({"n": 5}, "n"),
    ({"extra_body": {"seed": "x"}}, "seed"),
    ({"extra_body": {"seed": "nan"}}, "seed"),
    ({"extra_body": {"strength": 0.5}}, "strength"),
    ({"image": b""}, "image"),
    ({"image": png(PHOTO)[:-40]}, "image"),
    ({"mask": b""}, "mask"),
    ({"mask": png(mask(24, 24).convert("RGB"))}, "mask"),
    ({"image": bomb()}, "image"),
    ({"size": "25x24"}, "size"),
    ({"n": 0}, "n"),
    ({"prompt": ""}, "prompt"),
]


@pytest.mark.parametrize("given, param", EDITS)
def test_edits(address, given, param):
    with pytest.raises(openai.BadRequestError) as refused:
        client(address).images.edit(**{"image": png(PHOTO), "prompt": "a star"} | given)
    assert refused.value.param == param and refused.value.body["message"].startswith(f"{param}: ")


def form(address: str, *fields: tuple[str, str | bytes], end: bytes = b"--x--\r\n") -> Request:
    """An edit whose fields are texts or files; a text that is no UTF-8 is given with surrogates for its bytes."""
    body = b""
    for name, value in fields:
        is_file = isinstance(value, bytes)
        head = f'Content-Disposition: form-data; name="{name}"' + '; filename="a.png"' * is_file
        body += f"--x\r\n{head}\r\n\r\n".encode() + (value if is_file else value.encode(errors="surrogateescape"))
        body += b"\r\n"
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    return Request(f"{address}/v1/images/edits", body + end, kind)


def test_an_edit_needs_a_picture(address):
    status, error = refusal(form(address, ("prompt", "a")))
    assert (status, error["param"]) == (400, "image")


ODD_FORMS = [
    *(("seed", seed) for seed in ("1_000", " 1 ", "+1", "1.0", "1e2", "007", "0x10", "١", "5\n", "1" * 5_000, "true")),
    *(("n", n) for n in ("1_0", " 1", "1.0", "01", "null")),
    *(("top_k", top_k) for top_k in ("1_0", " 5 ", "5.0")),
    *(("guidance_scale", scale) for scale in ("1_0", " 3 ", "+3", ".5", "3.", "inf", "1e400", "True")),
    *(("temperature", temperature) for temperature in ("0_1", "1 ")),
    *(("top_p", top_p) for top_p in ("0_1", "NaN")),
    *(("stream", stream) for stream in ("False", "0", "true")),
    *((name, "") for name in ("seed", "n", "guidance_scale", "stream", "size", "model", "mask", "quality")),
    *((name, b"5") for name in ("seed", "size", "user")),
    *((name, "5") for name in ("mask", "prompt[]", "image[0]", "Seed", "_charset_", "messages")),
    ("negative_prompt", "\udce9"),
    ("mask", png(Image.new("L", (24, 24)))),
    ("mask", png(Image.new("RGBA", (24, 24), "black"))),
    ("size", " 24x24"),
]


@pytest.mark.parametrize("name, value", ODD_FORMS)
def test_forms_take_what_json_takes(address, name, value):
    status, error = refusal(form(address, ("image", png(PHOTO)), ("prompt", "a"), (name, value)))
    assert (status, error["param"]) == (400, name) and error["message"].startswith(f"{name}: ")


def test_an_edit_without_guidance_has_no_negative_prompt(address):
    given = [("image", png(PHOTO)), ("prompt", "a"), ("negative_prompt", "b")]
    assert refusal(form(address, *given, ("guidance_scale", "1")))[1]["param"] == "negative_prompt"
    assert json.loads(urlopen(form(address, *given, ("guidance_scale", "2"), ("n", "1"))).read())["size"] == "24x24"


@pytest.mark.parametrize("end", [b"", b"--x\r\n", b"--x-"])
def test_a_form_that_is_cut_short(address, end):
    """Its last field would be lost without a word."""
    fields = [("image", png(PHOTO)), ("prompt", "a"), ("seed", "5")]
    status, error = refusal(form(address, *fields, end=end))
    assert (status, error["param"]) == (400, None) and "cut short" in error["message"]


TWICE = [("prompt", "a star"), ("seed", "5"), ("mask", png(mask(24, 24)))]


@pytest.mark.parametrize("field", TWICE)
def test_a_field_of_a_form_comes_once(address, field):
    status, error = refusal(form(address, ("image", png(PHOTO)), ("prompt", "a"), field, field))
    assert (status, error["param"]) == (400, field[0]) and "times" in error["message"]


@pytest.mark.parametrize(
    "path, body, param",
    [
        ("images/generations", b'{"prompt": "a", "prompt": "b"}', "prompt"),
        ("images/generations", b'{"prompt": "a", "seed": 1, "seed": null}', "seed"),
        ("chat/completions", b'{"model": "tiny", "messages": [{"role": "user", "role": "user"}]}', "role"),
        ("images/generations", b'{"\\ud800": 1, "\\ud800": 1}', "\\ud800"),
    ],
)
def test_a_name_stands_once_in_an_object(address, path, body, param):
    status, error = refusal(posted(address, path, body))
    assert (status, error["param"]) == (400, param) and "2 times" in error["message"]


@pytest.mark.parametrize("name", ["seed", "guidance_scale", "user", "prompt"])
def test_numbers_of_thousands_of_digits(address, name):
    prompt = "" if name == "prompt" else '"prompt": "a", '
    status, error = refusal(posted(address, "images/generations", f'{{{prompt}"{name}": {"1" * 5_000}}}'.encode()))
    assert (status, error["param"]) == (400, name)


@pytest.mark.parametrize("depth", [100, 900, 20_000])
@pytest.mark.parametrize("path", ["images/generations", "chat/completions"])
def test_deep_json(address, path, depth):
    for left, right in (("[", "]"), ('{"a":', "}")):
        body = '{"prompt": ' + left * depth + "1" + right * depth + "}"
        assert refusal(posted(address, path, body.encode()))[0] == 400


NO_REQUESTS = [
    b"{",
    b"",
    b"[]",
    b"\xff",
    b'{"prompt": "a", "prompt',
    b"[" * 100_000,
    b"null",
    b'"a"',
    b"{'a': 1}",
    b"{}{}",
]


@pytest.mark.parametrize("body", NO_REQUESTS)
def test_bodies_that_are_no_requests(address, body):
    status, error = refusal(posted(address, "images/generations", body))
    assert (status, error["param"]) == (400, None)


def test_a_form_where_json_is_due(address):
    kind = {"Content-Type": "application/x-www-form-urlencoded"}
    assert refusal(Request(f"{address}/v1/images/generations", b"prompt=a", kind))[0] == 400
    assert refusal(posted(address, "images/edits", {"prompt": "a"}))[0] == 400


JSON = b'{"prompt": "a"}'
FORM = b"--x--\r\n"


@pytest.mark.parametrize("path", ["images/generations", "chat/completions"])
@pytest.mark.parametrize("kind", ["text/plain", "text/json", "application/jsonp", "multipart/form-data", ""])
def test_the_content_type_of_json(address, path, kind):
    status, error = refusal(Request(f"{address}/v1/{path}", JSON, {"Content-Type": kind}))
    assert status == 400 and "Content-Type: application/json" in error["message"]


@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", "multipart/mixed", "text/plain", ""])
def test_the_content_type_of_forms(address, kind):
    status, error = refusal(Request(f"{address}/v1/images/edits", FORM, {"Content-Type": kind}))
    assert status == 400 and "multipart/form-data" in error["message"]


@pytest.mark.parametrize("kind", ["multipart/form-data", "multipart/form-data; boundary=y"])
def test_forms_of_no_such_boundary(address, kind):
    assert refusal(Request(f"{address}/v1/images/edits", FORM, {"Content-Type": kind}))[0] == 400


@pytest.mark.parametrize("path", ["images/generations", "images/edits", "chat/completions"])
def test_beside_the_body(address, path):
    """Neither parameters of the path, nor codings of the body, nor another path that leads there."""
    kind = {"Content-Type": "application/json"}
    status, error = refusal(Request(f"{address}/v1/{path}?seed=5", JSON, kind))
    assert (status, error["param"]) == (400, "seed")
    assert refusal(Request(f"{address}/v1/{path}", JSON, kind | {"Content-Encoding": "gzip"}))[0] == 415
    for other in (f"v1/{path}/", f"v1//{path}", f"V1/{path}", f"v1/{path}%00"):
        assert refusal(Request(f"{address}/{other}", JSON, kind))[0] == 404


def test_a_text_where_a_file_is_due(address):
    status, error = refusal(form(address, ("prompt", "a"), ("image", "hello")))
    assert status == 400 and error["param"].startswith("image")


def test_odd_but_right(address):
    """Of several frames the first; files are what they hold, whatever they are called and whatever EXIF they bring;
    any language; options at their defaults."""
    frames = BytesIO()
    Image.new("P", (24, 24), 1).save(frames, format="GIF", save_all=True, append_images=[Image.new("P", (24, 24), 2)])
    named = ("bild \u00e4.png", frames.getvalue(), "text/plain")
    ask = client(address).images
    for prompt in ("\u82f9\u679c \U0001f34e", " ", "a\x00b"):
        assert ask.edit(image=named, prompt=prompt, extra_body={"seed": 1}).size == "24x24"
    torn = BytesIO()
    Image.new("RGB", (24, 24)).save(torn, format="JPEG", exif=b"Exif\0\0nonsense")
    as_default = {"stream": False, "moderation": "auto"}
    assert ask.edit(image=("torn.jpg", torn.getvalue()), prompt="a", extra_body=as_default).size == "24x24"
    assert ask.generate(prompt="a", extra_body=as_default | {"size": "24x24"}).size == "24x24"


@pytest.mark.parametrize("path", ["images/generations", "chat/completions"])
def test_another_model(address, path):
    body = {"model": "dall-e-3", "prompt": "a"} if path[0] == "i" else {"model": "gpt", "messages": user()}
    body |= {"messages": CHAT} if path[0] == "c" else {}
    status, error = refusal(posted(address, path, body))
    assert (status, error["param"], error["code"]) == (404, "model", "model_not_found")


def test_other_paths_and_methods(address):
    assert refusal(Request(f"{address}/v1/images/variations", b"{}"))[0] == 404
    for path in ("images/generations", "images/edits", "chat/completions"):
        for method in ("GET", "OPTIONS", "PUT", "PATCH", "DELETE"):
            assert refusal(Request(f"{address}/v1/{path}", method=method))[0] == 405
        with pytest.raises(HTTPError, match="405"):
            urlopen(Request(f"{address}/v1/{path}", method="HEAD"))


def test_bodies_that_are_too_large(address):
    host = address.removeprefix("http://")
    connection = http.client.HTTPConnection(host)
    connection.putrequest("POST", "/v1/images/generations")
    connection.putheader("Content-Length", str(2**20 + 1))
    connection.endheaders()  # refused before the body comes
    assert connection.getresponse().status == 413
    half = b" " * 2**19
    for chunks, status in (([half, half, b" "], 413), ([half, half], 400)):  # the second is of no more than is allowed
        connection = http.client.HTTPConnection(host)
        kind = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/images/generations", iter(chunks), kind, encode_chunked=True)
        response = connection.getresponse()
        assert response.status == status and json.loads(response.read())["error"]["message"]
    assert refusal(posted(address, "images/generations", half + half))[0] == 400
    seconds = metric(address, 'nextflow_request_seconds_sum{path="/v1/images/generations"}')
    assert 0 < seconds < 600 * metric(address, 'nextflow_request_seconds_count{path="/v1/images/generations"}')


def test_a_chat_that_the_models_template_does_not_take(tiny_model, tiny_processor):
    alternate = "{% if messages[0].role == 'system' %}{{ raise_exception('no system prompts') }}{% endif %}"
    processor = copy.copy(tiny_processor)
    processor.chat_template = alternate + tiny_processor.chat_template
    asked = {"model": "tiny", "messages": [message("system"), message("user")]}
    with running(tiny_model, processor) as address:
        for more in ({}, {"modalities": ["image"]}, {"stream": True}):
            status, error = refusal(posted(address, "chat/completions", asked | more))
            assert status == 400 and error["param"] == "messages" and "no system prompts" in error["message"]


def test_a_mask_over_cells_of_no_whole_pixels(tiny_model, text_tokenizer):
    """Of a vision tokenizer of one size, which its grid does not divide."""
    from tests.test_fixed_size import EDGE, FIXED_SIZE

    config = copy.deepcopy(tiny_model.config)
    config.vq_config = NextFlowVQConfig(**config.vq_config.to_dict() | FIXED_SIZE)
    processor = NextFlowProcessor(NextFlowImageProcessor.from_vq_config(config.vq_config), text_tokenizer)
    torch.manual_seed(0)
    with running(NextFlowForConditionalGeneration(config).eval(), processor) as address:
        edit = {"image": png(photo(EDGE, EDGE)), "mask": png(mask(EDGE, EDGE)), "prompt": "a star"}
        assert client(address).images.edit(**edit).size == f"{EDGE}x{EDGE}"


def test_strangers(tiny_model, tiny_processor):
    with running(tiny_model, tiny_processor, api_key="secret") as address:
        for key in ("wrong", "secre", "secret2"):
            with pytest.raises(openai.AuthenticationError):
                client(address, key).models.list()
        assert refusal(Request(f"{address}/v1/models"))[0] == 401
        assert [model.id for model in client(address, "secret").models.list()] == ["tiny"]
        assert json.loads(urlopen(f"{address}/health").read()) == {"status": "ok"}
