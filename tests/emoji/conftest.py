"""The real names, and small worlds of pictures of one colour, and of two with parts held out."""

import io
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from tiny_models import tiny_config, tiny_model

from examples.emoji.data import FEATURES
from examples.emoji.names import names_of
from examples.emoji.packages import STYLES, fetch, read_icons
from examples.emoji.sizes import LEVELS, PATCH_SIZE, SCHEDULES, SPECIAL_IDS
from examples.emoji.splits import COMBINATION, NAME, PAIR, SEEN, held_out, is_dev
from examples.emoji.tasks import Tasks
from examples.emoji.text import train_text_tokenizer, training_texts
from examples.emoji.world import World
from transformers_nextflow import NextFlowImageProcessor, NextFlowProcessor

datasets.disable_progress_bars()


@pytest.fixture(scope="session")
def real_tasks(pytestconfig) -> Tasks:
    """All names and styles of the world, as if no two pictures were equal; the words of a name are its tags."""
    try:
        archives = {style: fetch(package, pytestconfig.cache.mkdir("emoji")) for style, package in STYLES.items()}
    except RuntimeError as error:
        pytest.skip(f"the packages cannot be fetched: {error}")
    keys = [(key, style) for style, archive in archives.items() for key in sorted(read_icons(archive))]
    of_key = names_of(key for key, _ in keys)
    names, styles = [of_key[key] for key, _ in keys], [style for _, style in keys]
    parts = held_out(names, styles)
    splits = [
        "train" if part == SEEN else "dev" if is_dev(name, style) else "test"
        for name, style, part in zip(names, styles, parts)
    ]
    return Tasks(names, styles, [name.split() for name in names], parts, splits, range(len(keys)))


SMALL = (
    *("cat", "dog", "cow", "red heart", "blue heart", "green heart", "three oclock", "four oclock", "five oclock"),
    *("man", "woman", "person", "man: dark skin tone", "woman: dark skin tone", "man: light skin tone", "baby"),
    *("child", "older person", "artist", "man artist", "woman artist"),
)


@pytest.fixture(scope="session")
def small_world_folder(tmp_path_factory) -> Path:
    """A data set whose pictures are all seen; each has a colour of its own."""
    rows = []
    for style in ("noto", "twemoji"):
        for name in SMALL:
            buffer = io.BytesIO()
            number = len(rows)
            Image.new("RGB", (64, 64), (5 * number, 250 - 5 * number, 128)).save(buffer, format="PNG")
            row = {"name": name, "style": style, "label": name, "tags": [*name.split(), "emoji"], "part": SEEN}
            rows.append(row | {"split": "train", "twin": number, "image": {"bytes": buffer.getvalue(), "path": None}})
    folder = tmp_path_factory.mktemp("emoji") / "data"
    datasets.Dataset.from_list(rows, features=FEATURES).save_to_disk(folder)
    return folder


@pytest.fixture(scope="session")
def small_world(small_world_folder) -> World:
    return World(small_world_folder)


COLOURS = {"noto": (60, 100, 150), "twemoji": (150, 60, 100)}
HELD_OUT = {  # (name, style), or a name in both -> part and split
    ("cat", "twemoji"): (PAIR, "test"),
    ("blue heart", "noto"): (PAIR, "test"),
    ("four oclock", "twemoji"): (PAIR, "test"),
    ("dog", "twemoji"): (PAIR, "dev"),
    ("green heart", "noto"): (PAIR, "dev"),
    "woman: dark skin tone": (COMBINATION, "test"),
    "cow": (NAME, "test"),
}


@pytest.fixture(scope="session")
def world_folder(small_world, tmp_path_factory) -> Path:
    """The small world's names; the upper half of a picture has the colour of its style, the lower half its own."""
    rows = []
    for number, (name, style) in enumerate(zip(small_world.names, small_world.styles)):
        pixels = np.full((64, 64, 3), COLOURS[style], np.uint8)
        pixels[32:] = (5 * number, 250 - 5 * number, 128)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format="PNG")
        part, split = HELD_OUT.get((name, style), HELD_OUT.get(name, (SEEN, "train")))
        row = {"name": name, "style": style, "label": name, "tags": [*name.split(), "emoji"], "part": part}
        rows.append(row | {"split": split, "twin": number, "image": {"bytes": buffer.getvalue(), "path": None}})
    folder = tmp_path_factory.mktemp("world") / "data"
    datasets.Dataset.from_list(rows, features=FEATURES).save_to_disk(folder)
    return folder


@pytest.fixture(scope="session")
def emoji_checkpoint(small_world, tmp_path_factory) -> Path:
    """A tiny model with the emoji models' schedules and the text tokenizer of the small world."""
    tokenizer = train_text_tokenizer(training_texts(Tasks.of(small_world)), 400)
    text = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    vision = tiny_config().vq_config.semantic_config.to_dict() | {"patch_size": PATCH_SIZE, "num_patches": 64}
    vq = {"scale_schedules": SCHEDULES, "levels": LEVELS, "patch_size": PATCH_SIZE, "semantic_config": vision}
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in SPECIAL_IDS.items()}
    model = tiny_model(tiny_config(text, vq | {"channel_multipliers": [1, 1, 1]}, **ids))
    image_processor = NextFlowImageProcessor.from_vq_config(model.config.vq_config)
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    NextFlowProcessor(image_processor, tokenizer).save_pretrained(folder)
    return folder
