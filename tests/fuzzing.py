"""Mutated inputs for all that comes from outside, and how each one ends: `python -m tests.fuzzing CHECKPOINT`.

An input may be served or refused. It is refused if what it raises is a `ValueError`, an `OSError`, a skipped document
or a complaint about an argument's type, and a `raise` statement of this package or of the library did it: then the
message was written for the user. Everything else comes from the depths: an `IndexError`, a `RuntimeError` of torch,
but also a `ValueError` that a C function raised (`math domain error`), a `JSONDecodeError`, a missing key.

Each input is made from (seed, target, number) alone, so that a failure is repeated by its number.
"""

import argparse
import contextlib
import copy
import dis
import hashlib
import io
import json
import random
import resource
import shutil
import signal
import struct
import tempfile
import time
import traceback
import warnings
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from PIL import Image

import transformers_nextflow
from transformers_nextflow import LinearRamp, NextFlowForConditionalGeneration, NextFlowProcessor, cli
from transformers_nextflow.data.documents import COLUMNS, DocumentReader, Skipped
from transformers_nextflow.data.sequences import DocumentTokenizer
from transformers_nextflow.data.shards import FORMAT_VERSION, check_files, identity_of, read_manifest, sequence_spec
from transformers_nextflow.utils.loading import check_model_type, check_tensors, load_config, load_weights, naming

MEMORY = 4 * 2**30  # bytes that the whole process may take
SECONDS = 5.0  # of processor time that one input may take
OURS, LIBRARY = [Path(transformers_nextflow.__file__).parent], [Path(transformers.__file__).parent]

NAN, INF = float("nan"), float("inf")
LONG = 10**400  # longer than any float
NUMBERS = [0, 1, -1, 2, 3, 14, 2**31, 2**63, LONG, 1.5, -0.5, 1e-300, 1e300, NAN, INF, -INF]
ODD = [
    None,
    True,
    False,
    "",
    "1",
    "nan",
    "a" * 300,
    "\0",
    "\ud800",
    [],
    [None],
    [[]],
    [1, "a"],
    {},
    {"a": 1},
    *NUMBERS,
]
TEXTS = [
    *(
        "a red circle",
        "",
        " ",
        "\n\n",
        "\0",
        "\ufeff",
        "\u202e",
        "e\u0301" * 20,
        "\U0001f469\u200d\U0001f680",
        "\ud83d",
    ),
    *("<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"),
    *(
        "<|im_start|>",
        "<|im_end|>\n<|im_start|>assistant\n",
        "<|endoftext|>",
        "{{ 1 / 0 }}",
        "{% raw %}",
        "\ue0000\ue001",
    ),
    *("ﷺ" * 50, "a" * 2000, "\x1b[31m", "../../etc/passwd", "¿" * 3),
]


class TooSlow(BaseException):
    """One input took more processor time than it may."""


def is_refusal(error: BaseException) -> bool:
    """Whether somebody meant this error for the user, see above."""
    if isinstance(error, OSError) and error.filename is not None:
        return True  # of the system, and it names the file
    if not isinstance(error, (ValueError, OSError, TypeError, Skipped, StrictDataclassError)) or not str(error):
        return False
    last = error.__traceback__
    while last.tb_next is not None:
        last = last.tb_next
    code = last.tb_frame.f_code
    is_raise = dis.opname[code.co_code[last.tb_lasti]] == "RAISE_VARARGS"
    folders = OURS if isinstance(error, TypeError) else OURS + LIBRARY
    in_package = any(folder in Path(code.co_filename).parents for folder in folders)
    return isinstance(error, StrictDataclassError) or (is_raise and in_package)


# Mutations


def mutate_bytes(rng: random.Random, data: bytes, end: int | None = None) -> bytes:
    """A few bytes of the first `end` changed, cut, doubled, moved or struck out."""
    data, end = bytearray(data), len(data) if end is None else end
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        if not data:
            break
        at = rng.randrange(max(min(end, len(data)), 1))
        size = rng.choice([1, 2, 4, 16, 64])
        kind = rng.randrange(6)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at : at + size] = rng.randbytes(size)
        elif kind == 2:
            del data[at : at + size]
        elif kind == 3:
            data[at:at] = data[at : at + size]
        elif kind == 4:
            data[at : at + size] = rng.choice([b"\0", b"\xff", b"\x7f", b"9"]) * size
        else:
            del data[at:]
    return bytes(data)


def places(tree, path: tuple = ()) -> list[tuple]:
    """The paths of all nodes of a tree but its root."""
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    return [found for key, value in pairs for found in ((*path, key), *places(value, (*path, key)))]


def mutate_tree(rng: random.Random, tree):
    """A copy of dicts and lists in which one or two nodes are odd, missing, renamed or doubled."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice([1, 1, 2])):
        if not (paths := places(tree)):
            return tree
        *parents, last = rng.choice(paths)
        inner = tree
        for key in parents:
            inner = inner[key]
        kind = rng.randrange(5)
        if not isinstance(inner, (dict, list)):
            continue
        if kind == 0:
            del inner[last]
        elif kind == 1 and isinstance(inner, dict):
            inner["spare"] = inner.pop(last)
        elif kind == 1:
            inner.append(inner[last])
        else:
            inner[last] = rng.choice(ODD)
    return tree


def odd_text(rng: random.Random) -> str:
    parts = [rng.choice(TEXTS) for _ in range(rng.choice([1, 1, 2, 5]))]
    if rng.random() < 0.3:
        parts.append("".join(chr(rng.randrange(0x110000)) for _ in range(20)))
    return "".join(parts)


def odd_tensor(rng: random.Random, low: int, high: int, length: int) -> torch.Tensor:
    """A tensor of about (B, length) or another shape, of ids in about [low, high) or of another dtype."""
    wrong = [(1, length - 1), (1, length + 1), (0, length), (1, 0), (), (1, 1, length), (length, 1), (1, 2)]
    shape = rng.choice([*[(1, length), (2, length), (length,)] * 6, *wrong])
    spread = rng.choice([0] * 12 + [1, 100, 2**40])
    values = np.random.default_rng(rng.randrange(2**32)).integers(low - spread, high + spread, shape)
    dtype = rng.choice([torch.int64] * 20 + [torch.int32, torch.uint8, torch.float32, torch.bool])
    return torch.as_tensor(values).to(dtype)


def odd_grid(rng: random.Random):
    known = [
        (3, 3),
        (2, 4),
        (4, 2),
        torch.tensor([3, 3]),
        torch.tensor([[3, 3]]),
        torch.tensor([[3, 3], [2, 4]]),
        [[3, 3]],
    ]
    wrong = [None, 3, (), (3,), (3, 3, 3), (0, 0), (-3, 3), (3, NAN), (3, LONG), (3.0, 3.0), "ab", [(3, 3), 3]]
    tensors = [torch.tensor([[3.0, 3.0]]), torch.zeros(0, 2, dtype=torch.long), torch.tensor(3), torch.zeros(1, 2, 2)]
    return rng.choice([*known * 6, *wrong, *tensors])


# Targets


class World:
    """What the targets share: a tiny checkpoint, loaded and as files, and a folder to write to."""

    def __init__(self, checkpoint: Path, scratch: Path):
        self.checkpoint, self.scratch = checkpoint, scratch
        self.model = NextFlowForConditionalGeneration.from_pretrained(checkpoint).eval()
        self.processor = NextFlowProcessor.from_pretrained(checkpoint)
        self.config = self.model.config
        self.files = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
        self.picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8))
        self.encodings = encodings(self.picture)
        self.tokenizer = DocumentTokenizer(self.processor, self.processor.tokenizer.eos_token_id)
        self.manifest = {
            "format_version": FORMAT_VERSION,
            "content": "documents",
            "identity": identity_of(self.config, self.processor, self.model.model.vq_model),
            "variants": 1,
            "statistics": {"tokens": 3},
            "samples": [],
            "shards": [{"file": "a.arrow", "rows": 1, "bytes": 3, "sha256": hashlib.sha256(b"abc").hexdigest()}],
        }
        (scratch / "shards" / "data").mkdir(parents=True)
        (scratch / "shards" / "data" / "a.arrow").write_bytes(b"abc")
        self.picture.save(scratch / "picture.png")

    def folder(self, **files: bytes) -> Path:
        """A model folder in which these files are other ones."""
        folder = self.scratch / "model"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name in self.files:
            if name in files:
                (folder / name).write_bytes(files[name])
            else:
                (folder / name).symlink_to(self.checkpoint / name)
        return folder


def encodings(picture: Image.Image) -> list[bytes]:
    """One picture in many formats."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a picture"
    grey = np.asarray(picture.convert("L")).astype(np.uint16) * 257
    palette = picture.quantize(16)
    alpha = picture.copy()
    alpha.putalpha(picture.convert("L"))
    saved = [
        *((picture, "PNG", {"exif": exif}), (alpha, "PNG", {}), (palette, "PNG", {"transparency": 3})),
        *((Image.fromarray(grey), "PNG", {}), (picture.convert("1"), "PNG", {})),
        *(
            (picture, "JPEG", {"exif": exif}),
            (picture, "JPEG", {"progressive": True}),
            (picture.convert("L"), "JPEG", {}),
        ),
        *((picture, "WEBP", {"exif": exif}), (alpha, "WEBP", {"lossless": True})),
        *((palette, "GIF", {"save_all": True, "append_images": [palette]}), (picture, "BMP", {})),
        *((picture, "TIFF", {}), (Image.fromarray(grey), "TIFF", {"compression": "tiff_lzw"})),
    ]
    found = []
    for image, form, options in saved:
        buffer = io.BytesIO()
        image.save(buffer, form, **options)
        found.append(buffer.getvalue())
    return found


def with_checksums(data: bytes) -> bytes:
    """A PNG whose chunks' checksums are right, so that a mutation gets beyond them."""
    parts, at = [data[:8]], 8
    while at + 12 <= len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        body = data[at + 4 : at + 8 + length]
        parts.append(data[at : at + 4] + body + struct.pack(">I", zlib.crc32(body)))
        at += 12 + length
    return b"".join(parts)


def picture_file(world: World, rng: random.Random) -> None:
    data = mutate_bytes(rng, rng.choice(world.encodings))
    if data.startswith(b"\x89PNG") and rng.random() < 0.6:
        data = with_checksums(data)
    path = world.scratch / "picture"
    path.write_bytes(data)
    if rng.random() < 0.7:
        world.processor.image_processor(path)
    else:
        try:
            image = Image.open(io.BytesIO(data))
        except Exception:  # what Pillow says of a header is the caller's to hear
            return
        world.processor.image_processor(image)


def array(world: World, rng: random.Random) -> None:
    shape = [rng.choice([0, 1, 2, 3, 4, 5, 24, 30]) for _ in range(rng.choice([0, 1, 2, 3, 3, 3, 3, 4, 5]))]
    if rng.random() < 0.5:
        shape = rng.choice([[24, 24, 3], [3, 16, 30], [40, 20], [1, 30, 30], [24, 24, 4], [5, 24, 24, 3]])
    values = np.random.default_rng(rng.randrange(2**32)).integers(rng.choice([-1, 0, 0, 0]), 256, shape)
    dtype = rng.choice(["u1", "u1", "u2", "i4", "i8", "f2", "f4", "f8", "?", "c8", "O", "U3", "M8[s]"])
    pixels = np.asarray(values / rng.choice([1, 255]) if dtype[0] == "f" else values).astype(dtype)
    if dtype[0] == "f" and pixels.size and rng.random() < 0.3:
        pixels.flat[0] = rng.choice([NAN, INF, -1e30, 256.0])
    image = torch.from_numpy(pixels) if dtype in ("u1", "i8", "f4", "f8") and rng.random() < 0.4 else pixels
    options = {"do_rescale": rng.choice([True, False]), "level": rng.choice([None, 24, "24", 99, ""])}
    options |= {"input_data_format": rng.choice([None, None, "channels_first", "channels_last"])}
    world.processor.image_processor([image] if rng.random() < 0.2 else image, **options)


def prompt(world: World, rng: random.Random) -> None:
    pictures = [world.picture] * rng.choice([0, 0, 1, 2])
    mode = rng.choice(["text", "image", "interleaved"])
    if rng.random() < 0.3:
        text, negative = odd_text(rng), rng.choice([None, None, odd_text(rng), ODD[rng.randrange(len(ODD))]])
        if rng.random() < 0.5:
            text += world.processor.image_placeholder * len(pictures)
        world.processor(text=rng.choice([text, [text]]), images=pictures or None, negative_text=negative)
        return
    content = [{"type": "image", "image": picture} for picture in pictures] + [{"type": "text", "text": odd_text(rng)}]
    rng.shuffle(content)
    chat = [{"role": "user", "content": rng.choice([content, content, odd_text(rng)])}]
    if rng.random() < 0.4:
        chat = [
            {"role": "system", "content": "be exact"},
            *chat,
            {"role": "assistant", "content": odd_text(rng)},
            *chat,
        ]
    if rng.random() < 0.4:
        chat = mutate_tree(rng, chat)
    options = {"negative_prompt": odd_text(rng)} if mode != "text" and rng.random() < 0.3 else {}
    sanitize = rng.random() < 0.5
    chats = rng.choice([chat, chat, [chat], [chat, chat]])
    inputs = world.processor.apply_chat_template(
        chats, generation_mode=mode, sanitize_control_tokens=sanitize, **options
    )
    if mode == "image" and rng.random() < 0.1:
        world.model.generate(**inputs, generation_mode=mode, seed=0)


CONTROLS = {
    "guidance_scale": [1.0, 3, 1e300, [1.0, 2.0, 3.0], LinearRamp(1.0, 4.0), torch.tensor(1.0), np.float32(2)],
    "image_guidance_scale": [1.0, 2.0],
    "temperature": [0.0, 0.5, [1.0, 0.5, 0.1]],
    "top_k": [0, 5, [1, 2, 3]],
    "top_p": [0.9, 1.0, 0, 2],
    "refine_top_k": [[], [3], [1, 1], ()],
    "aspect_ratio": ["1:1", "2:1", "1:2", "16:9", "1:0", f"{LONG}:1", "1:1:1", "-1:1", "١:١"],
    "level": ["24", 24, "512"],
    "height": [24, 16, 32, 25],
    "width": [24, 32, 16],
    "seed": [0, -5, [1], [1, 2], 2**64, np.int64(3)],
}


def request(world: World, rng: random.Random) -> None:
    config, mode = world.config, rng.choice(["image", "image", "image", "interleaved", "text"])
    boi, eoi, image = config.boi_token_id, config.eoi_token_id, config.image_token_id
    with_image = rng.random() < 0.4
    ids = [9, *([boi, *[image] * 13, eoi] if with_image else []), 10, *([boi] if mode == "image" else [])]
    inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    if mode != "text":
        inputs |= {f"negative_{name}": value for name, value in inputs.items()}
    if with_image:
        inputs |= {"image_grid_hw": torch.tensor([[3, 3]]), "image_codes": torch.arange(14)}
        if rng.random() < 0.3:
            inputs |= {"image_codes": None, "pixel_values": torch.zeros(9, 192)}
    names = rng.sample(sorted(CONTROLS), rng.choice([0, 1, 2, 3]))
    controls = {name: rng.choice([*CONTROLS[name] * 8, *ODD]) for name in names}
    if mode == "image":
        inputs |= controls
        if rng.random() < 0.2:
            inputs["forced_codes"] = odd_tensor(rng, 0, 64, rng.choice([1, 5, 14]))
        if rng.random() < 0.2:
            inputs["num_images_per_prompt"] = rng.choice([1, 2, 0, -1, 1.5, "2", NAN, True, []])
    elif mode == "interleaved":
        inputs |= {"max_new_tokens": 2, "max_new_images": rng.choice([0, 1, 1, -1, 1.5, "1", None]), "seed": 0}
        inputs["image_generation"] = {name: value for name, value in controls.items() if name != "seed"}
    else:
        inputs |= {"max_new_tokens": 1}
    for _ in range(rng.choice([0, 0, 1])):
        name = rng.choice(
            ["input_ids", "attention_mask", "negative_input_ids", "image_grid_hw", "image_codes", "pixel"]
        )
        if name == "image_grid_hw":
            inputs[name] = odd_grid(rng)
        elif name == "image_codes":
            inputs[name] = odd_tensor(rng, 0, 64, 14)
        elif name == "pixel":
            size = rng.choice([(9, 192), (8, 192), (9, 48), (9,), (), (1, 3, 24, 24), (0, 192)])
            inputs["pixel_values"] = torch.full(size, rng.choice([0.0, 3.0, NAN, INF]))
        elif name in inputs:
            inputs[name] = odd_tensor(rng, 0, 2 if "mask" in name else config.text_vocab_size, len(ids))
    world.model.generate(**inputs, generation_mode=mode)


def codes(world: World, rng: random.Random) -> None:
    model, low = world.model, world.config.text_vocab_size
    call = rng.randrange(4)
    if call == 0:
        model.decode_image_tokens(odd_tensor(rng, low, low + 64, rng.choice([14, 13, 1])), odd_grid(rng))
    elif call == 1:
        model.decode_images(odd_tensor(rng, 0, 64, rng.choice([14, 27])), odd_grid(rng))
    elif call == 2:
        model.decode_preview(odd_tensor(rng, 0, 64, rng.choice([1, 5, 14, 6])), odd_grid(rng))
    else:
        pixels = torch.zeros(rng.choice([(9, 192), (17, 192), (9, 191), (9,), (), (1, 3, 24, 24)]))
        model.encode_images(pixels, odd_grid(rng))


def model_json(world: World, rng: random.Random) -> None:
    """Through what every command calls; a processor that loads must also read a chat."""
    name = rng.choice(
        ["config.json", "config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json"]
    )
    if rng.random() < 0.4:
        data = mutate_bytes(rng, world.files[name])
    else:
        data = json.dumps(mutate_tree(rng, json.loads(world.files[name]))).encode()
    folder = world.folder(**{name: data})
    check_model_type(str(folder), "nextflow")
    if name == "config.json":
        check_tensors(NextFlowForConditionalGeneration, load_config(str(folder)), str(folder))
        return
    with naming(f"the processor in {folder}"):
        processor = NextFlowProcessor.from_pretrained(folder)
    inputs = cli.chat_inputs(processor, [world.picture], "describe")
    processor.batch_decode(inputs["input_ids"])


def weights(world: World, rng: random.Random) -> None:
    data = world.files["model.safetensors"]
    end = 8 + int.from_bytes(data[:8], "little")
    kind = rng.random()
    if kind < 0.5:
        data = mutate_bytes(rng, data, end)
    elif kind < 0.8:
        header = json.dumps(mutate_tree(rng, json.loads(data[8:end]))).encode()
        data = len(header).to_bytes(8, "little") + header + data[end:]
    elif kind < 0.85:
        data = data[: rng.randrange(len(data))]
    else:  # the numbers
        at = rng.randrange(end, len(data) - 64)
        data = data[:at] + rng.randbytes(64) + data[at + 64 :]
    load_weights(NextFlowForConditionalGeneration, str(world.folder(**{"model.safetensors": data})))


def document(world: World, rng: random.Random) -> None:
    task, picture = rng.choice(list(COLUMNS)), world.encodings[0]
    row = {
        "text": odd_text(rng) if rng.random() < 0.5 else "a red circle",
        "image": [picture, picture] if task == "editing" and rng.random() < 0.5 else picture,
        "target": {"bytes": picture, "path": None},
        "question": rng.choice(["what is it?", odd_text(rng)]),
        "texts": ["a", None, odd_text(rng)],
        "images": [None, picture, None] if task == "interleaved" else [picture] * 3,
        "messages": [
            {
                "role": "user",
                "content": [{"type": "image"}, {"type": "text", "text": odd_text(rng)}, {"type": "image"}],
            },
            {"role": "assistant", "content": odd_text(rng)},
            {"role": "assistant", "content": [{"type": "image", "text": None}]},
        ],
        "kind": "chat",
        "key": "one",
    }
    reader = DocumentReader(task, max_images=rng.choice([None, 1, 2]), root=rng.choice([None, "."]))
    for read in reader.read(mutate_tree(rng, row) if rng.random() < 0.8 else row, 0):
        world.tokenizer(read)


def manifest(world: World, rng: random.Random) -> None:
    folder, text = world.scratch / "shards", json.dumps(world.manifest)
    if rng.random() < 0.3:
        data = mutate_bytes(rng, text.encode())
    else:
        data = json.dumps(mutate_tree(rng, world.manifest)).encode()
    (folder / "manifest.json").write_bytes(data)
    read = read_manifest(folder)
    sequence_spec(read["identity"])
    check_files(folder, read)


def command(world: World, rng: random.Random) -> None:
    """An odd command line, on a model that is loaded already."""
    path, vq_model = str(world.scratch / "picture.png"), world.model.model.vq_model
    paths = [path, path, path, "nowhere.png", "", ".", str(world.scratch), "a" * 300, path + "/a.png"]
    text = odd_text(rng).replace("\0", "")
    commands = [
        ["generate", text],
        ["edit", rng.choice(paths), text],
        ["describe", rng.choice(paths), text, "--max-new-tokens", rng.choice(["1", "2", "0", "-1"])],
        ["interleave", text, "--max-new-tokens", "2", "--max-images", rng.choice(["0", "1", "-1"])],
        ["reconstruct", rng.choice(paths)],
        ["flops"],
        ["data", rng.choice(["verify", "inspect"]), rng.choice(paths)],
    ]
    odd = ["", "nan", "inf", "-1", "0", "1", "1e300", "1e-300", "9" * 400, "1:1", "2:1", "1:0", "24", "x", "0.5", "١"]
    options = ["--seed", "--aspect-ratio", "--level", "--guidance-scale", "--temperature", "--top-k", "--top-p"]
    options += ["--height", "--width", "--negative-prompt", "--prompt-tokens", "--denoising-steps"]
    arguments = rng.choice(commands)
    for option in rng.sample(options, rng.choice([0, 1, 1, 2])):
        arguments += [f"{option}={rng.choice(odd)}"]
    if arguments[0] not in ("flops", "data"):
        ends = ["a.png", "a.png", "a.png", "a.jpg", ".png", "a.txt", "b" * 300 + ".png", "picture.png/a.png"]
        arguments += ["--output", str(world.scratch / "out" / rng.choice(ends))]
    with (
        mock.patch.object(cli, "load_model", lambda name: (world.model, world.processor)),
        mock.patch.object(cli, "load_vision_tokenizer", lambda name: (vq_model, world.processor.image_processor)),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        try:
            cli.program(arguments, prog_name="transformers-nextflow")
        except SystemExit as end:
            assert end.code in (0, 2)


SHARES: dict[Callable[[World, random.Random], None], int] = {
    picture_file: 1450,
    array: 400,
    prompt: 600,
    request: 700,
    codes: 600,
    model_json: 400,
    weights: 150,
    document: 350,
    manifest: 150,
    command: 200,
}
"""Inputs of each target among 5,000."""


def run(world: World, target: Callable, numbers: range, seed: int) -> tuple[Counter, list[dict], float]:
    """How the inputs ended, those that ended in the depths, and the most processor time of one."""
    endings, failures, slowest = Counter(), [], 0.0
    for number in numbers:
        rng = random.Random(f"{seed} {target.__name__} {number}")
        started = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            target(world, rng)
            endings["served"] += 1
        except (Exception, TooSlow) as error:
            if is_refusal(error):
                endings[f"refused: {type(error).__name__}"] += 1
            else:
                endings["failed"] += 1
                where = [f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)[-4:]]
                reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                failures.append({"target": target.__name__, "number": number, "error": reason, "where": where})
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        slowest = max(slowest, time.process_time() - started)
    return endings, failures, slowest


def _too_slow(*_) -> None:
    raise TooSlow(f"more than {SECONDS} s of processor time")


@contextlib.contextmanager
def quiet_world(checkpoint: Path):
    """A world, without warnings and progress bars."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    before = signal.signal(signal.SIGPROF, _too_slow)
    try:
        with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            yield World(checkpoint, Path(scratch))
    finally:
        signal.signal(signal.SIGPROF, before)
        transformers.logging.set_verbosity(verbosity)
        transformers.logging.enable_progress_bar()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--inputs", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, metavar="JSON", help="write the result to this file")
    parser.add_argument("--target", help="one of them alone")
    parser.add_argument("--number", type=int, help="one input alone, with its traceback")
    arguments = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    torch.set_num_threads(1)
    result = {"inputs": 0, "targets": {}, "failures": []}
    with quiet_world(arguments.checkpoint) as world:
        for target, share in SHARES.items():
            if arguments.target not in (None, target.__name__):
                continue
            if arguments.number is not None:
                target(world, random.Random(f"{arguments.seed} {target.__name__} {arguments.number}"))
                continue
            started = time.process_time()
            count = share * arguments.inputs // 5000
            endings, failures, slowest = run(world, target, range(count), arguments.seed)
            result["inputs"] += count
            result["failures"] += failures
            seconds = {"seconds": round(time.process_time() - started, 2), "slowest": round(slowest, 3)}
            result["targets"][target.__name__] = dict(endings) | seconds
    result["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    text = json.dumps(result, indent=1)
    if arguments.output is None:
        print(text)
    else:  # the library prints too
        arguments.output.write_text(text)


if __name__ == "__main__":
    main()
