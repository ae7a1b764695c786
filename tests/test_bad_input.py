"""Bad input of every kind, through Python and the command line: an error that says what is wrong, or a right result.

What each module's own tests refuse already is not repeated here.
"""

import copy
import io
import json
import shutil
import struct
import sys
import threading
import zlib
from base64 import b64encode
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import datasets
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file

from transformers_nextflow import NextFlowConfig, NextFlowImageProcessor, NextFlowProcessor
from transformers_nextflow.data import CostModel, Source
from transformers_nextflow.data.documents import DocumentReader, Skipped, read_size
from transformers_nextflow.data.shards import read_manifest

NAN = float("nan")
LONG = 10**400  # longer than any float


@pytest.fixture
def error_of(console):
    """The one line that a refused command prints."""

    def error_of(*arguments, **kwargs) -> str:
        status, out, err = console(*arguments, **kwargs)
        assert (status, out) == (2, "")
        assert "Traceback" not in err
        line = err.splitlines()[-1]
        assert line.startswith("error: ")
        return line

    return error_of


def noise(height: int = 24, width: int = 24, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def encoded(image: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=form, **options)
    return buffer.getvalue()


def user(content) -> list[dict]:
    return [{"role": "user", "content": content}]


# Pictures that are none


def bomb() -> bytes:
    """A PNG of 70 bytes that says it has 20,000 x 20,000 pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def cut(form: str) -> bytes:
    whole = encoded(Image.fromarray(noise()), form)
    return whole[: len(whole) * 3 // 4]


NO_PICTURES = {
    "text": (b"not a picture", "cannot identify image file"),
    "empty": (b"", "cannot identify image file"),
    "signature": (b"\x89PNG\r\n\x1a\n", "cannot identify image file"),
    "cut png": (cut("PNG"), "truncated"),
    "cut jpeg": (cut("JPEG"), "truncated"),
    "cut webp": (cut("WEBP"), ""),
    "cut tiff": (cut("TIFF"), ""),
    "bomb": (bomb(), r"400000000 pixels\) exceeds limit"),
}
READERS = (("describe",), ("reconstruct",), ("interleave", "a", "--image"))  # what reads the picture that follows
PICTURE_CASES = pytest.mark.parametrize(("data", "message"), NO_PICTURES.values(), ids=NO_PICTURES)


@PICTURE_CASES
def test_no_picture_through_python(tiny_processor, tmp_path, data, message):
    path = tmp_path / "picture"
    path.write_bytes(data)
    for name in (path, str(path)):
        with pytest.raises(ValueError, match=f"cannot read the image {path}: .*{message}"):
            tiny_processor.image_processor(name)
    chat = user([{"type": "image", "path": str(path)}, {"type": "text", "text": "describe"}])
    with pytest.raises(ValueError, match=f"cannot read the image {path}"):
        tiny_processor.apply_chat_template(chat)


def test_damage_that_shows_when_the_pixels_are_read(tiny_processor):
    """`Image.open` reads the header alone."""
    for form in ("PNG", "JPEG"):
        with pytest.raises(ValueError, match="cannot decode the picture .*truncated"):
            tiny_processor.image_processor(Image.open(io.BytesIO(cut(form))))


@PICTURE_CASES
@pytest.mark.parametrize("command", [*READERS, ("edit",)], ids=str)
def test_no_picture_through_the_command_line(error_of, tmp_path, command, data, message):
    (tmp_path / "picture.png").write_bytes(data)
    last = ("make it blue",) if command == ("edit",) else ()
    error = error_of(*command, "picture.png", *last)
    assert error.startswith("error: cannot read the image picture.png: ")
    assert message.replace("\\", "") in error


@pytest.mark.parametrize("command", READERS, ids=str)
@pytest.mark.parametrize("path", ["nowhere.png", ".", "nowhere/a.png", "a\0b.png", "https://example.org/a.png"])
def test_absent_pictures(error_of, command, path):
    assert error_of(*command, path) == f"error: there is no image file {path}"


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (None, TypeError, "a picture is a PIL image, .* got NoneType"),
        (3, TypeError, "a picture is .* got int"),
        (b"bytes", TypeError, "a picture is .* got bytes"),
        ([None], TypeError, "a picture is .* got NoneType"),
        ([], ValueError, "at least one picture, got none"),
        (Image.new("RGB", (0, 0)), ValueError, "at least one pixel, got 0x0"),
        (np.zeros((0, 4, 3), np.uint8), ValueError, r"got uint8 \(0, 4, 3\)"),
        (np.zeros((24, 24, 3), complex), ValueError, "bools, integers or floats as pixels, got complex128"),
        (np.full((24, 24, 3), "a"), ValueError, "got <U1"),
        (np.full((24, 24, 3), None), ValueError, "got object"),
        (np.full((24, 24, 3), NAN), ValueError, "got nan"),
        (np.zeros((1, 1, 3), np.uint8), ValueError, r"the shape \(1, 1, 3\) has its channels first or last"),
        (np.zeros((3, 24, 3), np.uint8), ValueError, "say which by input_data_format"),
        (torch.zeros(4, 24, 1), ValueError, "say which by input_data_format"),
        (np.zeros(24, np.uint8), ValueError, "list of images from"),
    ],
)
def test_values_that_are_no_pictures(tiny_processor, image, error, message):
    with pytest.raises(error, match=message):
        tiny_processor.image_processor(image)


# Pictures that are unusual


def unusual() -> dict[str, tuple[bytes, np.ndarray]]:
    """Encoded pictures, and the plain RGB that each of them shows."""
    rgb, exif = noise(), Image.Exif()
    plain = Image.fromarray(rgb)
    alpha = np.concatenate([rgb, np.full((24, 24, 1), 255, np.uint8)], axis=-1)
    alpha[:, :12, 3] = 0
    on_white = rgb.copy()
    on_white[:, :12] = 255
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    turned = plain.rotate(90)
    palette = plain.quantize(64)
    holes = palette.copy()
    holes.info["transparency"] = palette.getpixel((0, 0))
    hole = np.asarray(palette) == palette.getpixel((0, 0))
    through = np.where(hole[..., None], np.uint8(255), np.asarray(palette.convert("RGB")))
    grey = np.asarray(plain.convert("L"))
    as_rgb = np.repeat(grey[..., None], 3, axis=-1)
    jpeg = encoded(turned, "JPEG", exif=exif, quality=95)
    with Image.open(io.BytesIO(jpeg)) as stored:
        upright = np.asarray(stored.rotate(-90))
    tall = np.full((24, 24, 3), (200, 30, 90), np.uint8)
    return {
        "plain": (encoded(plain, "PNG"), rgb),
        "alpha": (encoded(Image.fromarray(alpha), "PNG"), on_white),
        "alpha in webp": (encoded(Image.fromarray(alpha), "WEBP", lossless=True, exact=True), on_white),
        "palette": (encoded(palette, "PNG"), np.asarray(palette.convert("RGB"))),
        "palette with a hole": (encoded(holes, "PNG", transparency=holes.info["transparency"]), through),
        "grey": (encoded(Image.fromarray(grey), "PNG"), as_rgb),
        "16 bits": (encoded(Image.fromarray(grey.astype(np.uint16) * 257), "PNG"), as_rgb),
        "16 bits in tiff": (encoded(Image.fromarray(grey.astype(np.uint16) * 257), "TIFF"), as_rgb),
        "bilevel": (encoded(Image.fromarray(grey > 127), "PNG"), (as_rgb > 127) * np.uint8(255)),
        "cmyk": (encoded(plain.convert("CMYK"), "TIFF"), np.asarray(plain.convert("CMYK").convert("RGB"))),
        "turned png": (encoded(turned, "PNG", exif=exif), rgb),
        "turned tiff": (encoded(turned, "TIFF", exif=exif), rgb),
        "turned jpeg": (jpeg, upright),
        "animation": (encoded(palette, "GIF", save_all=True, append_images=[plain.quantize(2)]), None),
        "1x1": (encoded(Image.fromarray(tall[:1, :1]), "PNG"), tall),
        "1x1 alpha": (encoded(Image.new("RGBA", (1, 1), (9, 9, 9, 0)), "PNG"), np.full((24, 24, 3), 255, np.uint8)),
    }


UNUSUAL = unusual()


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_pictures_are_their_plain_rgb(console, tiny_processor, tmp_path, name):
    """Transparency shows white; 16 bits are scaled, not clipped; EXIF is obeyed; of an animation the first frame."""
    data, expected = UNUSUAL[name]
    if expected is None:
        expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    path = tmp_path / "unusual"
    path.write_bytes(data)
    process = lambda image: tiny_processor.image_processor(image, return_tensors="pt")["pixel_values"]  # noqa: E731
    plain = process(Image.fromarray(expected))
    base64 = b64encode(data).decode()
    for image in (path, str(path), Image.open(io.BytesIO(data)), base64, f"data:image/png;base64,{base64}"):
        assert torch.allclose(process(image), plain, atol=1e-6)
    assert console("reconstruct", path, "--output", "pair.png")[0] == 0
    assert np.array_equal(np.asarray(Image.open("pair.png"))[:, :24], expected)


def test_pictures_at_an_address_are_those_of_files(tiny_processor, tmp_path):
    path = tmp_path / "alpha.png"
    path.write_bytes(UNUSUAL["alpha"][0])
    (tmp_path / "moved").mkdir()
    (tmp_path / "moved" / "index.html").write_bytes(path.read_bytes())  # what `/moved` is redirected to
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    ask = {"type": "text", "text": "describe"}
    read, redirected, expected = (
        tiny_processor.apply_chat_template(user([{"type": "image", "url": source}, ask]))["pixel_values"]
        for source in (f"{address}/alpha.png", f"{address}/moved", str(path))
    )
    assert torch.equal(read, expected) and torch.equal(redirected, expected)
    with pytest.raises(ValueError, match=f"cannot read the image {address}/nowhere.png, which is no file here"):
        tiny_processor.image_processor(f"{address}/nowhere.png")
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 10))
def test_headers_tell_the_size_of_the_upright_picture(form, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(noise(8, 20)), form, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert upright.size == ((8, 20) if 4 < orientation < 9 else (20, 8)) and read_size(data) == upright.size[::-1]


def test_headers_tell_the_size_of_a_picture_that_is_cut():
    data = encoded(Image.fromarray(noise(40, 60)), "PNG")
    assert read_size(data[: len(data) // 2]) == (40, 60)


def test_a_pixel_in_an_array(tiny_processor):
    pixel = np.array([[[200, 30, 90]]], np.uint8)
    expected = tiny_processor.image_processor(Image.fromarray(pixel), return_tensors="pt")
    for array, layout in ((pixel, "channels_last"), (pixel.transpose(2, 0, 1), "channels_first")):
        inputs = tiny_processor.image_processor(array, input_data_format=layout, return_tensors="pt")
        assert torch.equal(inputs["pixel_values"], expected["pixel_values"])
    grey = np.array([[77]], np.uint8)
    inputs = tiny_processor.image_processor(grey, return_tensors="pt")["pixel_values"]
    assert torch.allclose(inputs, torch.tensor(77 / 127.5 - 1))


@pytest.mark.parametrize("dtype", ["u2", "i2", "i4", "u8", "f4", "f8"])
def test_an_arrays_byte_order_changes_nothing(tiny_processor, dtype):
    pixels = noise(30, 40).astype(dtype)  # of u2 nearly black
    expected = tiny_processor.image_processor(pixels, return_tensors="pt")["pixel_values"]
    swapped = tiny_processor.image_processor(pixels.astype(f">{dtype}"), return_tensors="pt")["pixel_values"]
    assert torch.equal(swapped, expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"patch_size": 0}, "patch_size must be at least 1, got 0"),
        ({"patch_size": "16"}, "patch_size must be an integer, got '16'"),
        ({"image_mean": "grey"}, "image_mean must be a number or three, got 'grey'"),
        ({"image_std": [1.0, 1.0]}, "image_std must be a number or three"),
        ({"rescale_factor": 0.0}, "rescale_factor must be a number other than 0, got 0.0"),
        ({"rescale_factor": NAN}, "rescale_factor must be a number other than 0, got nan"),
        ({"rescale_factor": float("inf")}, "rescale_factor must be a number other than 0, got inf"),
    ],
)
def test_settings_of_the_image_processor(settings, message):
    with pytest.raises(ValueError, match=message):
        NextFlowImageProcessor(**settings)
    if not {"patch_size", "image_mean"} & settings.keys():  # the library checks types of a call
        with pytest.raises(ValueError, match=message):
            NextFlowImageProcessor()(np.full((24, 24, 3), 7.0), **settings)


def test_a_deviation_of_zero(tiny_processor):
    with pytest.raises(ValueError, match=r"pixels are not finite: .*image_std"), np.errstate(all="ignore"):
        tiny_processor.image_processor(Image.new("RGB", (24, 24)), image_std=[0.0, 1.0, 1.0])


# Prompts


def test_an_empty_prompt_is_a_prompt(console, tiny_model, tiny_processor):
    assert console("generate", "", "--seed", 3, "--output", "a.png")[0] == 0
    inputs = tiny_processor.apply_chat_template(user(""), generation_mode="image")
    codes = tiny_model.generate(**inputs, generation_mode="image", seed=3)
    (picture,) = tiny_processor.post_process_image(tiny_model.decode_image_tokens(codes))
    assert Image.open("a.png").tobytes() == picture.tobytes()
    assert console("describe", "a.png", "", "--max-new-tokens", 2)[0] == 0
    assert console("edit", "a.png", "", "--seed", 1)[0] == 0
    assert console("interleave", "", "--max-new-tokens", 2, "--seed", 1)[0] == 0


def test_a_prompt_of_no_tokens(tiny_model, tiny_processor):
    inputs = tiny_processor(text="", return_tensors="pt")
    for mode in ("text", "interleaved", "image"):
        with pytest.raises(ValueError, match="input_ids must "):
            tiny_model.generate(**inputs, generation_mode=mode)


@pytest.mark.parametrize("mode", ["text", "image", "interleaved"])
def test_a_prompt_over_the_context(tiny_model, tiny_processor, mode):
    limit = tiny_model.config.text_config.max_position_embeddings
    inputs = tiny_processor.apply_chat_template(user("a " * limit), generation_mode=mode)
    with pytest.raises(ValueError, match=rf"the prompt needs \d+ positions, the model has {limit}"):
        tiny_model.generate(**inputs, generation_mode=mode)


def test_the_last_prompt_that_fits(tiny_model):
    config = tiny_model.config
    limit = config.text_config.max_position_embeddings
    draw = lambda length: tiny_model.generate(  # noqa: E731
        torch.tensor([[9] * (length - 1) + [config.boi_token_id]]), generation_mode="image", guidance_scale=1.0
    )
    assert draw(limit - 2).shape == (1, 14)  # three scales, the first at <boi>
    with pytest.raises(ValueError, match=f"needs {limit + 1} positions"):
        draw(limit - 1)


def test_a_prompt_over_the_context_through_the_command_line(error_of, tmp_path):
    Image.fromarray(noise()).save(tmp_path / "a.png")
    text = "a " * 5000
    for command in (("generate", text), ("describe", "a.png", text), ("edit", "a.png", text), ("interleave", text)):
        assert "positions, the model has 4096 (max_position_embeddings)" in error_of(*command)


def test_a_prompt_that_is_no_unicode(error_of, tmp_path):
    """What a shell's stray bytes become."""
    Image.fromarray(noise()).save(tmp_path / "a.png")
    for command in (("generate",), ("interleave",), ("describe", "a.png"), ("edit", "a.png")):
        assert "must be Unicode text, got " in error_of(*command, "a\udcff circle")
    for command in (("generate",), ("interleave",)):
        assert "must be Unicode text, got " in error_of(*command, "a", "--negative-prompt", "a\udcff")


@pytest.mark.parametrize("text", [3, None, b"a", [], [3], [["a", "b"]], "\ud800", ["a", "\udfff"]], ids=repr)
def test_texts_that_are_none(tiny_processor, text):
    if text is not None:
        with pytest.raises(ValueError, match="^text must be "):
            tiny_processor(text=text)
        with pytest.raises(ValueError, match="^negative_text must be "):
            tiny_processor(text="a", negative_text=text)
    else:
        with pytest.raises(ValueError, match="at least one input"):
            tiny_processor(text=text)


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        ([], "a chat must be a list of messages"),
        ([[]], "a chat must be a list of messages"),
        ("draw", "a chat must be a list of messages, got 'draw'"),
        (None, "a chat must be a list of messages"),
        ([{}], "a message must have a role and a content"),
        ([{"role": None, "content": "a"}], "a message must have a role"),
        (["draw"], "a message must have a role and a content, got 'draw'"),
        (user(3), "the content of a message must be a text or a list of items, got 3"),
        (user(["a"]), "content items are .* got 'a'"),
        (user([{"text": "a"}]), "content items are .* got {'text': 'a'}"),
        (user([{"type": "video", "video": "a.mp4"}]), "content items are .*video"),
        (user([{"type": "text"}]), "content items are"),
        (user([{"type": "text", "text": 3}]), "content items are"),
        (user([{"type": "image"}]), "no images were passed"),
        (user([{"type": "image", "path": "nowhere.png"}]), "nowhere.png"),
        (user("<|vision_start|><|image_pad|><|vision_end|>"), "no images were passed"),
    ],
)
@pytest.mark.parametrize("mode", ["text", "image"])
def test_chats_that_are_none(tiny_processor, chat, message, mode):
    with pytest.raises(ValueError, match=message):
        tiny_processor.apply_chat_template(chat, generation_mode=mode)


@pytest.mark.parametrize("prompt", [3, [3], [], "\ud800"], ids=repr)
def test_negative_prompts_that_are_none(tiny_processor, prompt):
    with pytest.raises(ValueError, match="negative_(prompt|text) must be"):
        tiny_processor.apply_chat_template(user("a"), generation_mode="image", negative_prompt=prompt)


def test_placeholders_of_no_picture(tiny_processor):
    chat = user([{"type": "image", "image": Image.new("RGB", (24, 24))}, {"type": "text", "text": "make it blue"}])
    with pytest.raises(ValueError, match=r"negative_text must have .* its images, \[1\] .*, got \[2\]"):
        tiny_processor.apply_chat_template(chat, generation_mode="image", negative_prompt="<|image_pad|>")
    for change, given in ((chat, "<|vision_start|><|image_pad|><|vision_end|>"), (user("<|image_pad|>"), None)):
        with pytest.raises(ValueError, match="image_pad"):
            tiny_processor.apply_chat_template(change, generation_mode="image", negative_prompt=given)


def test_templates_that_fail(tiny_processor):
    for template in ("{% if", "{{ nobody.name }}{{ generation_mode }}"):
        for mode in ("text", "image"):
            with pytest.raises(ValueError, match="the chat template (cannot render the chat|must open a picture)"):
                tiny_processor.apply_chat_template(user("a"), generation_mode=mode, chat_template=template)


# Requests to the model


def request(model, **change) -> dict:
    inputs = {"input_ids": torch.tensor([[9, model.config.boi_token_id]]), "guidance_scale": 1.0, "seed": 0}
    return inputs | {"generation_mode": "image"} | change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": [[9]]}, "input_ids must be a tensor, got list"),
        ({"input_ids": torch.tensor([9])}, r"int64 in 2 dimensions, got torch.int64 of the shape \(1,\)"),
        ({"input_ids": torch.tensor([[9.0]])}, "int64 in 2 dimensions, got torch.float32"),
        ({"input_ids": torch.zeros(0, 2, dtype=torch.long)}, r"at least one prompt of one token, got \(0, 2\)"),
        ({"input_ids": torch.tensor([[10**6]])}, r"input_ids must lie in \[0, \d+\), got 1000000 to 1000000"),
        ({"input_ids": torch.tensor([[-100, 9]])}, "got -100 to 9; codes go into image_codes"),
        ({"attention_mask": torch.ones(1, 1)}, r"must have their shape \(1, 2\), got \(1, 1\)"),
        ({"attention_mask": torch.zeros(1, 2)}, "must leave every row of input_ids a token"),
        ({"negative_input_ids": torch.tensor([[10**6]])}, "negative_input_ids must lie in"),
        ({"negative_input_ids": torch.tensor([3])}, "negative_input_ids must hold int64 in 2 dimensions"),
        ({"guidance_scale": LONG}, "guidance_scale must be a number of at least 0.0"),
        ({"guidance_scale": torch.tensor(-2.0)}, "guidance_scale must be a number"),
        ({"temperature": NAN}, "temperature must be a number of at least 0.0, got nan"),
        ({"refine_top_k": 3}, "refine_top_k must be a list of integers, got 3"),
        ({"seed": 2**64}, r"seed must be in \[-9223372036854775808, 18446744073709551615\], got 18446744073709551616"),
        ({"seed": -(2**63) - 1}, r"seed must be in \[.*\], got -9223372036854775809"),
        ({"seed": 1.5}, "seed must be an integer, got 1.5"),
        ({"seed": "1"}, "seed must be an integer, got '1'"),
        ({"num_images_per_prompt": 1.5}, "num_images_per_prompt must be an integer, got 1.5"),
        ({"aspect_ratio": ""}, "aspect_ratio must read"),
        ({"aspect_ratio": f"{LONG}:1", "exact_size": True}, "nearest: 2:1"),
        ({"aspect_ratio": f"1:{LONG}", "exact_size": True}, "nearest: 1:2"),
        ({"level": ""}, "level must be one of 24, got"),
        ({"height": "24", "width": 24}, "height must be an integer, got '24'"),
        ({"height": 24, "width": 0}, "width must be at least 1, got 0"),
        ({"height": LONG, "width": 24, "exact_size": True}, "no scale schedule for an image of 1000"),
        ({"forced_codes": torch.zeros(1, 5)}, "forced_codes must hold int64"),
        ({"forced_codes": [[1]]}, "forced_codes must be a tensor, got list"),
        ({"image_grid_hw": torch.tensor([3, 3])}, "image_grid_hw must hold two integers"),
        ({"image_grid_hw": torch.tensor([[3.0, 3.0]])}, "image_grid_hw must hold two integers"),
        ({"image_grid_hw": torch.tensor([[3, 3, 3]])}, "image_grid_hw must hold two integers"),
        ({"image_grid_hw": 3}, "image_grid_hw must hold two integers"),
        (
            {"generator": np.random.default_rng()},
            "must be a torch.Generator or a list of them, got Generator",
        ),
        ({"generator": [0]}, r"generator must be a torch.Generator or a list of them, got \[0\]"),
    ],
)
def test_wrong_requests(tiny_model, change, message):
    with pytest.raises(ValueError, match=message):
        tiny_model.generate(**request(tiny_model, **change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_codes": torch.zeros(14)}, "image_codes must hold int64 in 1 dimensions, got torch.float32"),
        ({"image_codes": torch.zeros(14, 2, dtype=torch.long)}, r"got torch.int64 of the shape \(14, 2\)"),
        ({"image_codes": torch.full((14,), 64)}, r"image_codes must lie in \[0, 64\), got 64 to 64"),
        ({"image_codes": torch.zeros(13, dtype=torch.long)}, "image_codes must hold 14 rows .* got 13"),
        ({"pixel_values": torch.zeros(9, 48)}, r"patches of 192 numbers, got \(9, 48\)"),
        ({"pixel_values": torch.zeros(9)}, r"patches of 192 numbers, got \(9,\)"),
        ({"pixel_values": torch.full((9, 192), NAN)}, "pixel_values are not finite"),
        ({"pixel_values": torch.zeros(9, 192, dtype=torch.uint8)}, r"must be floats in \[-1, 1\], got torch.uint8"),
        ({"image_grid_hw": torch.tensor([[2, 4]])}, r"final grid \(2, 4\) takes 12 <image> tokens .* got 22"),
        ({"image_grid_hw": torch.tensor([[5, 5]])}, r"no scale schedule ends in the grid \(5, 5\)"),
    ],
)
@pytest.mark.parametrize("mode", ["text", "image", "interleaved"])
def test_wrong_images_of_prompts(tiny_model, change, message, mode):
    config = tiny_model.config
    ids = [config.boi_token_id, *[config.image_token_id] * 22, config.eoi_token_id, 9, config.boi_token_id]
    inputs = {"input_ids": torch.tensor([ids if mode == "image" else ids[:-1]]), "generation_mode": mode}
    inputs |= {"guidance_scale": 1.0} if mode == "image" else {"max_new_tokens": 1}
    if mode == "interleaved":
        inputs["image_generation"] = {"guidance_scale": 1.0}
    with pytest.raises(ValueError, match=message):
        tiny_model.generate(**inputs | {"image_grid_hw": torch.tensor([[3, 3]])} | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": torch.tensor([9])}, "in 2 dimensions"),
        ({"input_ids": torch.tensor([[10**6]])}, "input_ids must lie in"),
        ({"attention_mask": torch.zeros(1, 2)}, "must leave every row"),
        ({"attention_mask": torch.ones(1, 3)}, "must have their shape"),
    ],
)
@pytest.mark.parametrize("mode", ["text", "interleaved"])
def test_wrong_prompts_of_text(tiny_model, change, message, mode):
    with pytest.raises(ValueError, match=message):
        tiny_model.generate(**{"input_ids": torch.tensor([[9, 10]]), "generation_mode": mode} | change)


def test_extremes_of_sampling_are_their_limits(tiny_model):
    draw = lambda **change: tiny_model.generate(**request(tiny_model, **change))  # noqa: E731
    likeliest = draw(temperature=0.0)
    for coldest in (1e-300, 1e-40, 1e-9):
        assert torch.equal(draw(temperature=coldest), likeliest)
    assert torch.equal(draw(top_p=1e-6), likeliest) and torch.equal(draw(top_k=1), likeliest)
    assert torch.equal(draw(top_k=LONG), draw())
    hot = draw(temperature=sys.float_info.max)
    assert hot.shape == likeliest.shape and not torch.equal(hot, likeliest)
    nulls = {"negative_input_ids": torch.tensor([[tiny_model.config.boi_token_id]])}
    with pytest.raises(ValueError, match="the logits are not finite: .* guidance scale"):
        draw(guidance_scale=1e300, **nulls)


def test_weights_that_are_not_finite(tiny_model):
    model = copy.deepcopy(tiny_model)
    with torch.no_grad():
        model.code_head.weight.fill_(NAN)
    for temperature in (0.0, 1.0):
        with pytest.raises(ValueError, match="the logits are not finite: the weights are damaged"):
            model.generate(**request(model, temperature=temperature))


@pytest.mark.parametrize(
    ("tokens", "grid", "message"),
    [
        (torch.zeros(1, 14, dtype=torch.long), (3, 3), r"codes must lie in \[0, 64\), got -"),
        (torch.full((1, 14), 10**6), (3, 3), r"codes must lie in \[0, 64\)"),
        (torch.zeros(14, dtype=torch.long), (3, 3), "image_tokens must hold int64 in 2 dimensions"),
        (torch.tensor(3), (3, 3), "image_tokens must hold int64 in 2 dimensions"),
        (torch.zeros(1, 14), (3, 3), "image_tokens must hold int64 in 2 dimensions, got torch.float32"),
        ([[0] * 14], (3, 3), "image_tokens must be a tensor, got list"),
        (torch.zeros(1, 13, dtype=torch.long), (3, 3), r"must have the shape \(B, 14\), got \(1, 13\)"),
        (torch.zeros(1, 13, dtype=torch.long), None, r"13 codes fit 2 schedules"),
        (torch.zeros(1, 14, dtype=torch.long), (3,), "image_grid_hw must hold two integers"),
        (torch.zeros(1, 14, dtype=torch.long), (3, NAN), "image_grid_hw must hold two integers"),
        (torch.zeros(1, 14, dtype=torch.long), "ab", "image_grid_hw must hold two integers"),
        (torch.zeros(1, 14, dtype=torch.long), 3, "image_grid_hw must hold two integers"),
        (torch.zeros(1, 14, dtype=torch.long), (3, -3), r"no scale schedule ends in the grid \(3, -3\)"),
        (torch.zeros(1, 14, dtype=torch.long), (3, LONG), "no scale schedule ends in the grid"),
    ],
)
def test_image_tokens_that_cannot_be_decoded(tiny_model, tokens, grid, message):
    with pytest.raises(ValueError, match=message):
        tiny_model.decode_image_tokens(tokens, grid)


def test_other_codes_that_cannot_be_decoded(tiny_model):
    whole, grid = torch.zeros(14, dtype=torch.long), torch.tensor([[3, 3]])
    counts = ((whole[:13], "must hold 14 codes"), (whole.repeat(2), "must hold 14 codes .*, got 28"))
    for codes, message in (*counts, (whole + 64, "must lie in"), (whole.float(), "int64")):
        with pytest.raises(ValueError, match=message):
            tiny_model.decode_images(codes, grid)
    first, other = whole[:5] + 64, whole[None, None]
    for codes, message in ((whole[:6], "1, 5, 14 codes, got 6"), (first, "must lie in"), (other, "int64")):
        with pytest.raises(ValueError, match=message):
            tiny_model.decode_preview(codes, (3, 3))
    with pytest.raises(ValueError, match="patches of 192 numbers"):
        tiny_model.encode_images(torch.zeros(9, 5), grid)
    assert tiny_model.encode_images(torch.zeros(0, 192), torch.zeros(0, 2, dtype=torch.long)).shape == (0,)


# Options of the command line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "a", "--top-p", "0"), "top_p must be a number in [1e-06, 1.0], got 0.0"),
        (("generate", "a", "--top-p", "nan"), "top_p must be a number in [1e-06, 1.0], got nan"),
        (("generate", "a", "--top-k", "-1"), "top_k must be an integer of at least 0, got -1"),
        (("generate", "a", "--temperature", "inf"), "temperature must be a number of at least 0.0, got inf"),
        (("generate", "a", "--guidance-scale", "nan"), "guidance_scale must be a number of at least 0.0, got nan"),
        (("generate", "a", "--guidance-scale", "1e300"), "the logits are not finite"),
        (("generate", "a", "--seed", 2**64), "seed must be in ["),
        (("generate", "a", "--aspect-ratio", ""), 'aspect_ratio must read "width:height"'),
        (("generate", "a", "--aspect-ratio", "1:0"), 'aspect_ratio must read "width:height"'),
        (("generate", "a", "--level", ""), "level must be one of 24, got"),
        (("generate", "a", "--num-images", "-1"), "num_images_per_prompt must be at least 1, got -1"),
        (("describe", "a.png", "--top-p", "0"), "top_p must be a number in [1e-06, 1.0], got 0.0"),
        (("describe", "a.png", "--temperature", "nan"), "temperature must be a number of at least 0.0, got nan"),
        (("describe", "a.png", "--max-new-tokens", "0"), "`max_new_tokens` must be greater than 0"),
        (("describe", "a.png", "--seed", 2**64), "seed must be in ["),
        (("interleave", "a", "--top-p", "-1"), "top_p must be a number in [1e-06, 1.0], got -1.0"),
        (("interleave", "a", "--image-guidance-scale", "nan"), "image_guidance_scale must be a number"),
        (("reconstruct", "a.png", "--level", ""), "level must be one of 24, got"),
        (("reconstruct", "a.png", "--level", "512"), "level must be one of 24, got 512"),
        (("flops", "--prompt-tokens", "-1"), "prompt_tokens must not be negative, got -1"),
        (("flops", "--denoising-steps", "0"), "num_steps must be positive, got 0"),
        (("flops", "--aspect-ratio", "nan"), 'aspect_ratio must read "width:height"'),
        (("data", "extract", "nowhere.parquet", "--output", "out"), "nowhere.parquet is neither a file"),
        (("data", "extract", "a.png", "--output", "out"), "a.png must end in one of .parquet"),
        (("data", "pack", "nowhere", "--output", "out"), "there is no folder of shards nowhere"),
        (("data", "verify", "nowhere"), "there is no folder of shards nowhere"),
        (("data", "inspect", "."), ". holds no manifest.json"),
    ],
)
def test_options(error_of, tmp_path, arguments, message):
    Image.fromarray(noise()).save(tmp_path / "a.png")
    assert error_of(*arguments).startswith(f"error: {message}")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_a_temperature_near_zero_is_zero(console, tmp_path):
    Image.fromarray(noise()).save(tmp_path / "a.png")
    outputs = [
        console("describe", "a.png", "--max-new-tokens", 4, "--temperature", value)[1] for value in ("0", "1e-300")
    ]
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize(
    "arguments", [("flops",), ("data", "verify", "x"), ("describe", "a.png"), ("reconstruct", "a.png")], ids=str
)
def test_absent_models(error_of, tmp_path, arguments):
    Image.fromarray(noise()).save(tmp_path / "a.png")
    error = error_of(*arguments, model="no/such/model")
    assert "there is no model directory no/such/model" in error or "there is no folder of shards x" in error


# Checkpoints


@pytest.fixture
def folder(tiny_checkpoint, tmp_path):
    return shutil.copytree(tiny_checkpoint, tmp_path / "model")


COMMANDS = (("generate", "a"), ("describe", "a.png"), ("reconstruct", "a.png"))
JSON_DAMAGE = {
    "cut": (lambda data: data[: len(data) // 2], "is no JSON file: "),
    "empty": (lambda data: b"", "is no JSON file: Expecting value"),
    "list": (lambda data: b"[1]", "must hold a JSON object, got a list"),
    "null": (lambda data: b"null", "must hold a JSON object, got a NoneType"),
    "no text": (lambda data: b"\xff\xfe{}", "is no JSON file: 'utf-8' codec"),
    "deep": (lambda data: b"[" * 100_000, "is no JSON file: maximum recursion depth"),
}


@pytest.mark.parametrize("damage", JSON_DAMAGE)
@pytest.mark.parametrize(
    "file",
    ["config.json", "generation_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json"],
)
def test_damaged_json(error_of, folder, tmp_path, file, damage):
    change, message = JSON_DAMAGE[damage]
    (folder / file).write_bytes(change((folder / file).read_bytes()))
    Image.fromarray(noise()).save(tmp_path / "a.png")
    for command in COMMANDS:
        assert error_of(*command, model=folder).startswith(f"error: {folder / file} {message}")
    if file == "config.json":
        assert error_of("flops", model=folder).startswith(f"error: {folder / file} {message}")


def set_entry(path, entry: str, value) -> None:
    values = json.loads(path.read_text())
    *parents, last = entry.split(".")
    inner = values
    for name in parents:
        inner = inner[name]
    inner[last] = value
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("file", "entry", "value", "message"),
    [
        ("config.json", "model_type", "llama", "must hold a model of type \"nextflow\", got 'llama'"),
        ("config.json", "text_config", "x", "the config.json of"),
        ("config.json", "text_config", None, "config.json asks for"),  # the 7B model: no memory is taken for it
        ("config.json", "text_config.hidden_size", 64, "mrope_section must sum to half the head size"),
        ("config.json", "text_config.intermediate_size", 65, "config.json asks for ["),
        ("config.json", "text_config.num_attention_heads", 0, "ZeroDivisionError"),
        ("config.json", "text_config.num_attention_heads", "2", "expected int, got str"),
        ("config.json", "text_config.rope_parameters.rope_type", "spiral", "'spiral'"),
        ("config.json", "text_config.hidden_act", "spiral", "'spiral'"),
        ("config.json", "vq_config.encoder_blocks", 10**6, "config.json asks for 1000006 layers"),
        ("config.json", "vq_config.codebook_size", 65, "config.json asks for [65, "),
        ("config.json", "vq_config.scale_schedules", [[1]], "the config.json of"),
        ("config.json", "vq_config.levels", {"24": 99}, "num_scales must be between 1 and 3, got 99"),
        ("config.json", "image_generation.guidance_scale", "x", "guidance_scale must be a number"),
        ("config.json", "image_generation.refine_top_k", 3, "refine_top_k must be a list of integers"),
        ("config.json", "boi_token_id", 10**6, "boi_token_id must be a text row"),
        ("processor_config.json", "image_processor", 3, "the processor in"),
        ("processor_config.json", "image_processor.patch_size", 0, "cannot be loaded: patch_size must be at least 1"),
        ("processor_config.json", "image_processor.image_mean", "x", "image_mean must be a number or three"),
        ("processor_config.json", "image_processor.scale_schedules", 3, "the processor in"),
        ("processor_config.json", "chat_template", 3, "chat_template must be a text, got 3"),
        ("tokenizer_config.json", "model_max_length", "long", "model_max_length of the tokenizer must be a number"),
        ("tokenizer_config.json", "eos_token", 3, "Special token eos_token"),
        ("tokenizer.json", "model", 3, "the processor in"),
        ("tokenizer.json", "model.vocab", {}, "out of vocabulary"),
        ("tokenizer.json", "added_tokens", 3, "the processor in"),
    ],
)
def test_json_of_other_values(error_of, folder, file, entry, value, message):
    if (file, entry) == ("processor_config.json", "chat_template"):
        (folder / "chat_template.jinja").unlink()
    set_entry(folder / file, entry, value)
    assert message in error_of("generate", "a", model=folder)


@pytest.mark.parametrize("file", ["config.json", "processor_config.json", "tokenizer.json", "model.safetensors"])
def test_absent_files(error_of, folder, file):
    (folder / file).unlink()
    assert str(folder) in error_of("generate", "a", model=folder)


def test_damaged_templates(error_of, folder):
    (folder / "chat_template.jinja").write_text("{{ nobody.name }}{{ generation_mode }}")
    assert "the chat template cannot render the chat: 'nobody' is undefined" in error_of("generate", "a", model=folder)
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    assert f"the processor in {folder} cannot be loaded" in error_of("generate", "a", model=folder)


def header(data: bytes, change) -> bytes:
    """A safetensors file with another header."""
    length = int.from_bytes(data[:8], "little")
    values = json.loads(data[8 : 8 + length])
    change(values)
    text = json.dumps(values).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


HEAD = "code_head.weight"
WEIGHTS = {
    "cut": (lambda data: data[:5000], "is truncated or no safetensors file"),
    "empty": (lambda data: b"", "is truncated or no safetensors file"),
    "endless header": (lambda data: b"\xff" * 8 + data[8:], "is truncated or no safetensors file"),
    "no header": (lambda data: data[:8] + b"\0" * (len(data) - 8), "is truncated or no safetensors file"),
    "short data": (lambda data: data[:-4], "is truncated or no safetensors file"),
    "other type": (lambda data: header(data, lambda h: h[HEAD].update(dtype="F16")), "no safetensors file"),
    "negative": (lambda data: header(data, lambda h: h[HEAD].update(shape=[-1, 2])), "no safetensors file"),
    "missing": (
        lambda data: header(data, lambda h: h.update(spare=h.pop(HEAD))),
        f"lack 1 tensors, {HEAD} among",
    ),
    "misshapen": (
        lambda data: header(data, lambda h: h[HEAD].update(shape=[32, 64])),
        f"hold {HEAD} as [32, 64], config.json asks for [64, 32]",
    ),
}


@pytest.mark.parametrize("damage", WEIGHTS)
def test_damaged_weights(error_of, folder, damage):
    change, message = WEIGHTS[damage]
    path = folder / "model.safetensors"
    path.write_bytes(change(path.read_bytes()))
    error = error_of("generate", "a", model=folder)
    assert error.startswith(f"error: the weights in {folder} ") and message in error


def test_extra_tensors_change_nothing(console, folder):
    assert console("generate", "a", "--seed", 1, "--output", "plain.png", model=folder)[0] == 0
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"spare": torch.zeros(2)}, folder / "model.safetensors", metadata={"format": "pt"})
    status, _, err = console("generate", "a", "--seed", 1, "--output", "extra.png", model=folder)
    assert status == 0
    assert Image.open("extra.png").tobytes() == Image.open("plain.png").tobytes()


def test_tensors_that_are_not_finite(error_of, folder):
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {HEAD: torch.full((64, 32), NAN)}, folder / "model.safetensors", metadata={"format": "pt"})
    assert "the logits are not finite: the weights are damaged" in error_of("generate", "a", model=folder)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (b"{", "is no JSON file"),
        (b"{}", "is no index of safetensors"),
        (b'{"weight_map": [3]}', "is no index of safetensors"),
        (b'{"weight_map": {"a": "../b.safetensors"}}', "must name .safetensors files of its own folder"),
        (b'{"weight_map": {"a": "b.bin"}}', "must name .safetensors files of its own folder, got 'b.bin'"),
        (b'{"weight_map": {"a": 3}}', "must name .safetensors files of its own folder, got 3"),
        (b'{"weight_map": {"a": "c:b.safetensors"}}', "must name .safetensors files of its own folder"),
        (b'{"weight_map": {"a": "b.safetensors"}}', "lacks b.safetensors"),
    ],
)
def test_damaged_indices(error_of, folder, index, message):
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    (folder / "model.safetensors.index.json").write_bytes(index)
    assert message in error_of("generate", "a", model=folder)


def test_python_names_what_it_cannot_load(folder, tmp_path):
    """The library's own loaders, with their own errors."""
    (folder / "config.json").write_text("{")
    with pytest.raises(OSError, match="is not a valid JSON file"):
        NextFlowConfig.from_pretrained(folder)
    with pytest.raises((OSError, ValueError), match="nowhere"):
        NextFlowProcessor.from_pretrained(tmp_path / "nowhere")


# Documents


IMAGE = encoded(Image.fromarray(noise()), "PNG")


@pytest.mark.parametrize(
    ("task", "row", "reason"),
    [
        ("text", {"text": None}, "no text"),
        ("text", {"text": " "}, "no text"),
        ("text", {"text": 3}, "no text: a int"),
        ("text", {"text": b"\xff"}, "no Unicode text: 'utf-8' codec"),
        ("text", {"text": "\ud800"}, "no Unicode text"),
        ("captioning", {"text": "a", "image": IMAGE, "question": 3}, "no text: a int"),
        ("captioning", {"text": "a", "image": 3}, "no image"),
        ("editing", {"text": "a", "image": [IMAGE, None], "target": IMAGE}, "no image"),
        ("interleaved", {"texts": [None, ""], "images": [None, None]}, "no text"),
        ("video", {"images": []}, "no image"),
        ("chat", {"messages": []}, "no text"),
        ("chat", {"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "malformed chat: content items"),
        ("chat", {"messages": [{"role": "user", "content": [{"type": "audio", "text": "a"}]}]}, "malformed chat: con"),
        ("interleaved", {"texts": [3], "images": [None]}, "no text: a int"),
        ("interleaved", {"texts": "a", "images": [None, None]}, "texts and images of different lengths"),
        ("interleaved", {"texts": ["a", "b"], "images": None}, "texts and images of different lengths: 2 and 0"),
        ("video", {"images": [IMAGE], "text": 3}, "no text: a int"),
        ("chat", {"messages": 3}, "malformed chat: a message has a role and a content, got 3"),
        ("chat", {"messages": ["a"]}, "malformed chat: a message has"),
        ("chat", {"messages": [{}]}, "malformed chat: a content is a text or a list of items, got None"),
        ("chat", {"messages": [{"role": 3, "content": "a"}]}, "malformed chat: a message has"),
        ("chat", {"messages": [{"role": "robot", "content": "a"}]}, "malformed chat: .*unknown roles"),
        ("chat", {"messages": [{"role": "user", "content": 3}]}, "malformed chat: a content is"),
        ("chat", {"messages": [{"role": "user", "content": ["a"]}]}, "malformed chat: content items"),
        ("chat", {"messages": [{"role": "user", "content": [{"type": "text", "text": 3}]}]}, "no text: a int"),
        ("chat", {"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "malformed chat: content items"),
        (
            "chat",
            {"messages": [{"role": "user", "content": "a"}], "images": [IMAGE]},
            "malformed chat: .* shows 0 images",
        ),
    ],
)
def test_rows_that_are_no_documents_are_skipped_with_a_reason(task, row, reason):
    with pytest.raises(Skipped, match=f"^{reason}"):
        DocumentReader(task, root=".").read(row, 0)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.parquet", b"PAR1 and no more"),
        ("a.parquet", b""),
        ("a.arrow", b"ARROW1"),
        ("a.jsonl", b'{"text": "a"}\n{"text": '),
        ("a.jsonl", b"\xff\xfe"),
        ("a.tar", b"no tar at all"),
    ],
)
def test_damaged_sources(tmp_path, monkeypatch, name, data):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=f"{name} cannot be read as a dataset: "):
        Source(str(tmp_path / name)).load()


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ("{", "is no JSON file"),
        ("[]", "must hold a JSON object, got a list"),
        ("{}", "has format version None"),
        ('{"format_version": 2}', "must hold a str as content, got None"),
        (
            '{"format_version": 2, "content": "", "identity": {}, "statistics": {}, "variants": 1, "shards": [3]}',
            "must name file, rows, bytes and sha256 of every shard, got 3",
        ),
    ],
)
def test_damaged_manifests(error_of, tmp_path, manifest, message):
    (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(ValueError, match=message):
        read_manifest(tmp_path)
    assert message in error_of("data", "verify", tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "the cost model has version None"),
        ({"version": 1, "per_word": 1.0}, "got per_word"),
        ({"version": 1, "per_token": "1"}, "per_token of a cost model must be a finite number"),
        ({"version": 1, "per_pair": NAN}, "per_pair of a cost model must be a finite number of at least 0, got nan"),
        ({"version": 1, "per_pack": -0.5}, "per_pack of a cost model must be a finite number of at least 0, got -0.5"),
        ({"version": 1, "per_target": float("inf")}, "per_target of a cost model must be a finite number"),
        ({"version": 1, "backend": "sparse"}, "backend must be one of dense, blocks"),
    ],
)
def test_damaged_cost_models(values, message):
    with pytest.raises(ValueError, match=message):
        CostModel.from_dict(values)
