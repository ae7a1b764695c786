"""Items become documents with the pictures and texts that they name, and packs."""

import io

import numpy as np
import pytest
from datasets import load_dataset
from PIL import Image

from examples.emoji.documents import STAGES, Stage, build_packs, draw_picture, draw_rows, to_document
from examples.emoji.sizes import LEVELS, SCHEDULES
from examples.emoji.tasks import KINDS, Picture, Tasks
from examples.emoji.text import train_text_tokenizer, training_texts
from transformers_nextflow.data import DocumentReader, ExtractionSettings, FixedLength
from transformers_nextflow.data.shards import Shard, read_manifest


def colour_of(pixels: np.ndarray) -> tuple[int, ...]:
    """Of a picture, or a cell, of one colour."""
    (colour,) = np.unique(pixels.reshape(-1, 3), axis=0)
    return tuple(colour.tolist())


def pixels_of(image: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(image)))


@pytest.mark.parametrize(
    ("cells", "vertical", "level", "size"),
    [
        (1, False, "64", (64, 64)),
        (1, False, "32", (32, 32)),
        (2, False, "64", (48, 96)),
        (2, True, "64", (96, 48)),
        (3, False, "64", (40, 120)),
        (2, True, "32", (48, 24)),
        (3, False, "32", (16, 48)),
    ],
)
def test_cells_fill_the_canvas_of_their_level(small_world, cells, vertical, level, size):
    rows = (4, 20, 11)[:cells]
    pixels = draw_picture(Picture(rows, vertical), small_world, level)
    assert pixels.shape == (*size, 3)
    parts = np.split(pixels, cells, axis=0 if vertical else 1)
    assert [colour_of(part) for part in parts] == [colour_of(small_world.pictures[row]) for row in rows]


@pytest.mark.parametrize("task", list(KINDS))
def test_a_document_shows_what_its_item_names(small_world, task):
    tasks = Tasks.of(small_world)
    for number in range(10):
        item = tasks.draw(task, "train", number)
        document = to_document("key", task, [item], small_world, "32")
        user, assistant = document.messages
        assert (user.role, assistant.role) == ("user", "assistant")
        for message, content in ((user, item.user), (assistant, item.assistant)):
            assert message.content == tuple(None if isinstance(part, Picture) else part for part in content)
        assert document.supervised_images == (False,) * len(item.read) + (True,) * len(item.drawn)
        for image, picture in zip(document.images, (*item.read, *item.drawn), strict=True):
            assert np.array_equal(pixels_of(image), draw_picture(picture, small_world, "32"))


def test_a_dialogue_is_one_document_of_all_its_turns(small_world):
    items = Tasks.of(small_world).dialogue(0)
    assert len(items) == 4
    (document,) = (
        DocumentReader("chat").read(row, 0)[0]
        for row in draw_rows(small_world, Stage("32", {"dialogue": 1.0}), [0], 0)
    )
    assert document == to_document("emoji-0", "chat", items, small_world, "32")
    assert [message.role for message in document.messages] == ["user", "assistant"] * 4
    texts = [[part for part in message.content if part is not None] for message in document.messages]
    of_items = [content for item in items for content in (item.user, item.assistant)]
    assert texts == [[part for part in content if isinstance(part, str)] for content in of_items]
    assert document.supervised_images == (False, True)
    (source,), (target,) = items[0].read, items[2].drawn
    for image, picture in zip(document.images, (source, target), strict=True):
        assert np.array_equal(pixels_of(image), draw_picture(picture, small_world, "32"))


def test_rows_are_read_back_as_the_documents_and_depend_on_their_number_alone(small_world):
    stage = Stage("32", {"editing": 0.5, "reasoning": 0.5})
    rows = list(draw_rows(small_world, stage, range(30), seed=5))
    assert rows[10:20] == list(draw_rows(small_world, stage, range(10, 20), seed=5))
    assert rows[:10] != list(draw_rows(small_world, stage, range(10), seed=6))
    documents = [document for number, row in enumerate(rows) for document in DocumentReader("chat").read(row, number)]
    assert [document.to_row() for document in documents] == rows
    assert {document.kind for document in documents} == {"editing", "reasoning"}


@pytest.mark.parametrize("stage", ["alignment", "pretraining-64", "continued-64"])
def test_packs_hold_every_document_at_the_level_of_the_stage(small_world_folder, emoji_checkpoint, tmp_path, stage):
    settings = ExtractionSettings("chat", drop_text=0.1, variants=2, documents_per_shard=16)
    given = tmp_path, emoji_checkpoint, small_world_folder, STAGES[stage], 24, settings, FixedLength(2048)
    packs = build_packs(*given)
    manifest = read_manifest(tmp_path / "documents")
    assert manifest["statistics"]["documents"] == 24
    assert manifest["settings"]["level"] == STAGES[stage].level
    scales = LEVELS[STAGES[stage].level]
    finals = {tuple(row[scales - 1]) for row in SCHEDULES}
    for entry in manifest["shards"]:
        shard = Shard(tmp_path / "documents" / "data" / entry["file"])
        for index in range(len(shard)):
            grids = np.asarray(shard.row(index)["image_grid_hw"]).reshape(-1, 2)
            assert {tuple(grid) for grid in grids.tolist()} <= finals
    assert read_manifest(packs)["content"] == "packs"
    assert build_packs(*given) == packs


@pytest.mark.slow
def test_packs_of_two_processes_are_those_of_one(small_world_folder, emoji_checkpoint, tmp_path):
    settings = ExtractionSettings("chat", drop_text=0.1, variants=1, documents_per_shard=12)
    for number in (1, 2):
        given = small_world_folder, STAGES["covering-64"], 24, settings, FixedLength(2048)
        build_packs(tmp_path / f"{number}", emoji_checkpoint, *given, num_proc=number)
    one, two = (load_dataset("parquet", data_dir=str(tmp_path / f"{n}" / "source"))["train"] for n in (1, 2))
    assert one.to_list() == two.to_list()
    one, two = (read_manifest(tmp_path / f"{number}" / "packs")["shards"] for number in (1, 2))
    assert [shard["sha256"] for shard in one] == [shard["sha256"] for shard in two]


def test_frequent_words_are_single_tokens(real_tasks):
    tokenizer = train_text_tokenizer(training_texts(real_tasks), 4096)
    assert len(tokenizer) == 4096
    words = [word for name in real_tasks.names for word in name.replace(":", "").replace(",", "").split()]
    single = {word: len(tokenizer(f" {word}").input_ids) == 1 for word in set(words)}
    assert sum(single[word] for word in words) / len(words) > 0.85
    assert all(single[word] for word in "man woman person tone heart face flag".split())
    text = "woman firefighter: medium-dark skin tone, noto classic"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
