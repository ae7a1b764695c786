"""Sources to shards: codes, skipped pictures, filters, draws, and runs that are killed."""

import dataclasses
import io
import json
import multiprocessing
import os
import pickle
import random
import signal
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from data_samples import SETTINGS, documents, files_of, picture
from PIL import Image

from transformers_nextflow import NextFlowVQModel, SelfCorrection
from transformers_nextflow.data import (
    BatchPadding,
    ComputeBudget,
    CostModel,
    Document,
    DocumentReader,
    ExtractionSettings,
    FixedLength,
    Message,
    Source,
    extract,
    extraction,
    pack,
    verify,
)
from transformers_nextflow.data.documents import Skipped, Transformations, read_size
from transformers_nextflow.data.packing import Extents
from transformers_nextflow.data.sequences import SequenceSpec
from transformers_nextflow.data.shards import (
    Shard,
    decodable_codes,
    images_of,
    read_manifest,
    sequence_spec,
    thumbnail,
    thumbnail_error,
)
from transformers_nextflow.data.sources import LoadedSource
from transformers_nextflow.quantizer import DualCodebookQuantizer
from transformers_nextflow.scales import ScheduleTable


def rows_of(folder: Path) -> dict[str, dict]:
    rows = {}
    for entry in read_manifest(folder)["shards"]:
        shard = Shard(folder / "data" / entry["file"])
        rows |= {shard.row(index)["key"]: shard.row(index) for index in range(len(shard))}
    return rows


def codes_of(folder: Path, key: str) -> list:
    manifest = read_manifest(folder)
    return images_of(rows_of(folder)[key], sequence_spec(manifest["identity"]), manifest["variants"])


def pixels_of(processor, image: bytes) -> torch.Tensor:
    """(1, 3, H, W) of the picture as the processor prepares it."""
    data = processor.image_processor(Image.open(io.BytesIO(image)), level="24", return_tensors="pt")
    h, w = data["image_grid_hw"][0].tolist()
    patches = data["pixel_values"].view(h, w, 8, 8, 3)
    return patches.permute(4, 0, 2, 1, 3).reshape(1, 3, 8 * h, 8 * w)


def test_codes_are_the_tokenizers_own(extracted, data_model, tiny_processor):
    vq_model = data_model.model.vq_model
    document = next(document for document in documents() if document.key == "editing-1")
    images = codes_of(extracted, document.key)
    assert [len(inputs) for _, _, inputs in images] == [0, 0, 2], "only what is drawn is disturbed"
    for number, (image, (_, targets, inputs)) in enumerate(zip(document.images, images)):
        pixels = pixels_of(tiny_processor, image)
        if len(inputs) == 0:
            assert np.array_equal(targets, vq_model.encode(pixels).numpy())
            continue
        for variant in range(2):
            key = f"{document.key}/{number}/{variant}"
            drawn, nearest = vq_model.encode(pixels, SETTINGS.self_correction, SETTINGS.seed, [key])
            assert np.array_equal(targets[variant], nearest[0].numpy())
            assert np.array_equal(inputs[variant], drawn[0, : inputs.shape[1]].numpy())
            assert not np.array_equal(targets[variant, : inputs.shape[1]], inputs[variant])


def test_stored_codes_decode_to_the_tokenizers_reconstruction(extracted, data_model, tiny_processor):
    """Round trip: picture, shard, picture; where inputs are disturbed, what corrects them is part of the picture."""
    vq_model = data_model.model.vq_model
    for document in documents():
        for number, (image, coded) in enumerate(zip(document.images, codes_of(extracted, document.key))):
            grid, targets, inputs = coded
            pixels = pixels_of(tiny_processor, image)
            assert pixels.shape[-2:] == (8 * grid[0], 8 * grid[1])
            decoded = vq_model.decode(torch.from_numpy(decodable_codes(targets, inputs)[None]), grid)
            correction = SelfCorrection(top_k=8, last_scale=1) if len(inputs) else None  # of three
            draws = {"correction": correction, "seed": SETTINGS.seed, "keys": [f"{document.key}/{number}/0"]}
            expected = vq_model(pixels, **draws).reconstruction.clamp(-1, 1)  # of features, without codes
            assert (decoded - expected).abs().max() < 1e-4 < expected.std()


def test_a_sample_of_each_shard_is_its_pictures_means_and_how_far_it_decodes_from_them(
    extracted, data_model, tiny_processor
):
    manifest, by_key = read_manifest(extracted), {document.key: document for document in documents()}
    spec, vq_model = sequence_spec(manifest["identity"]), data_model.model.vq_model

    def means(pixels: torch.Tensor) -> np.ndarray:
        blocks = pixels.numpy().reshape(3, 8, pixels.shape[1] // 8, 8, pixels.shape[2] // 8)
        return ((blocks.mean((2, 4)) + 1) * 127.5).transpose(1, 2, 0)

    assert [sample["shard"] for sample in manifest["samples"]] == [0, 1, 2]
    for sample in manifest["samples"]:
        shard = Shard(extracted / "data" / manifest["shards"][sample["shard"]]["file"])
        row, number = shard.row(sample["row"]), sample["image"]
        shown = means(pixels_of(tiny_processor, by_key[row["key"]].images[number])[0])
        stored = np.frombuffer(bytes.fromhex(sample["thumbnail"]), np.uint8).reshape(8, 8, 3)
        assert np.abs(stored - shown).max() < 0.501
        grid, targets, inputs = images_of(row, spec, manifest["variants"])[number]
        decoded = means(vq_model.decode(torch.from_numpy(decodable_codes(targets, inputs)[None]), grid)[0])
        assert sample["error"] == pytest.approx(np.sqrt(((decoded - stored) ** 2).mean()), abs=0.1)
    beyond = thumbnail(torch.tensor([-3.0, 0.0, 3.0]).view(3, 1, 1).expand(3, 8, 8))
    assert (beyond == [0, 128, 255]).all(), "what other means and deviations of a processor lead to"
    assert thumbnail_error(beyond + np.uint8([5, 5, 0]), {"thumbnail": beyond.tobytes().hex()}) == (50 / 3) ** 0.5


def test_a_picture_of_another_shape_than_its_header_promised_is_refused(tiny_processor):
    processor = tiny_processor.image_processor
    table = processor.schedule_table()
    for size, grid in (((40, 40), (2, 4)), ((30, 60), (3, 3))):
        with pytest.raises(ValueError, match=f"header promised the grid .{grid[0]}, {grid[1]}., it has"):
            extraction.pixels_of(processor, picture(0, *size), table.by_grid(grid))


# Sources


@pytest.fixture
def photo_folder(tmp_path) -> Path:
    """PNG, JPEG and WebP with captions; one file is cut short, one is no picture."""
    folder = tmp_path / "photos"
    folder.mkdir()
    lines = []
    for number, extension in enumerate(["png", "jpg", "webp", "png", "jpg"]):
        name = f"{number}.{extension}"
        Image.open(io.BytesIO(picture(number, 30, 60))).save(folder / name)
        lines.append({"file_name": name, "text": f"caption {number}"})
    (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:200])
    (folder / "4.jpg").write_text("no picture")
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


T2I = ExtractionSettings("text-to-image", self_correction=None, batch_size=2, documents_per_shard=4)


def test_broken_pictures_are_counted_logged_and_skipped(photo_folder, data_checkpoint, tmp_path):
    manifest = extract(Source(str(photo_folder)), data_checkpoint, tmp_path / "out", T2I)
    assert manifest["statistics"]["documents"] == 3
    assert manifest["statistics"]["skipped: unreadable image"] == 2
    skipped = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert {entry["key"] for entry in skipped} == {"3", "4"}
    assert sorted(rows_of(tmp_path / "out")) == ["0", "1", "2"]
    assert all(row["image_grid_hw"].tolist() == [2, 4] for row in rows_of(tmp_path / "out").values())
    assert verify(tmp_path / "out", data_checkpoint)["rows"] == 3


def test_a_reason_does_not_depend_on_the_run():
    with pytest.raises(Skipped) as skipped:
        read_size(b"no picture")  # Pillow names a place in memory
    assert str(skipped.value) == "unreadable image: cannot identify image file"


def test_a_source_without_rows_is_refused(data_checkpoint, tmp_path):
    with tarfile.open(tmp_path / "rows.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("0.txt"))
    with pytest.raises(ValueError, match=r"rows.tar has no rows of the split train\[:0\]"):
        extract(Source(str(tmp_path / "rows.tar"), "train[:0]"), data_checkpoint, tmp_path / "out", T2I)
    assert not (tmp_path / "out").exists()


def test_workers_read_pictures_and_shards_are_the_same(photo_folder, data_checkpoint, tmp_path, monkeypatch):
    """Torn pictures too; with workers this process opens nothing but headers."""
    (photo_folder / "5.jpg").write_bytes((photo_folder / "1.jpg").read_bytes()[:-200])
    with open(photo_folder / "metadata.jsonl", "a") as file:
        file.write(json.dumps({"file_name": "5.jpg", "text": "caption 5"}) + "\n")
    here, read, readers = os.getpid(), extraction.pixels_of, set()
    with monkeypatch.context() as patch:
        patch.setattr(extraction, "pixels_of", lambda *args: (readers.add(os.getpid()), read(*args))[1])
        extract(Source(str(photo_folder)), data_checkpoint, tmp_path / "alone", T2I)
    assert readers == {here}

    def read_elsewhere(*args):
        assert os.getpid() != here
        return read(*args)

    monkeypatch.setattr(extraction, "pixels_of", read_elsewhere)
    extract(Source(str(photo_folder)), data_checkpoint, tmp_path / "workers", T2I, num_workers=2)
    assert files_of(tmp_path / "workers") == files_of(tmp_path / "alone")
    skipped = (tmp_path / "workers" / "skipped.jsonl").read_text().splitlines()
    assert {json.loads(line)["key"] for line in skipped} == {"3", "4", "5"}


def test_all_sources_give_the_same_rows(photo_folder, data_checkpoint, tmp_path):
    pairs = [(photo_folder / name, f"caption {name[0]}") for name in ("0.png", "1.jpg", "2.webp")]
    images = [{"bytes": path.read_bytes(), "path": None} for path, _ in pairs]
    captions = [caption for _, caption in pairs]
    features = datasets.Features({"photo": datasets.Image(), "words": datasets.Value("string")})
    table = datasets.Dataset.from_dict({"photo": images, "words": captions}, features=features)
    table.to_parquet(str(tmp_path / "a.parquet"))
    lines = [json.dumps({"photo": f"photos/{path.name}", "words": caption}) for path, caption in pairs]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number, ((path, caption), cell) in enumerate(zip(pairs, images)):
            for extension, data in ((path.suffix[1:], cell["bytes"]), ("txt", caption.encode())):
                if extension != "txt":
                    buffer = io.BytesIO()
                    Image.open(io.BytesIO(data)).convert("RGB").save(buffer, format="PNG")
                    extension, data = "png", buffer.getvalue()
                entry = tarfile.TarInfo(f"{number}.{extension}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    named = {"text": "words", "image": "photo"}
    expected = None
    for name, columns in (
        ("photos", {}),
        ("a.parquet", named),
        ("a.jsonl", named),
        ("a.tar", {"text": "txt", "image": "png"}),
    ):
        settings = dataclasses.replace(T2I, columns=columns)
        folder = tmp_path / f"out-{name}"
        extract(Source(str(tmp_path / name)), data_checkpoint, folder, settings)
        rows = rows_of(folder)
        content = {key: [row[n].tolist() for n in ("input_ids", "image_codes")] for key, row in rows.items()}
        expected = expected or content
        assert content == expected and len(content) == 3, name


@pytest.mark.parametrize(
    "name, columns, message",
    [
        ("nowhere.parquet", {}, "nowhere.parquet is neither a file, a folder nor the id of a dataset"),
        ("photos", {"text": "prompt"}, "the task text-to-image needs the columns prompt; the source has image, text"),
        ("photos", {"txt": "text"}, "the task text-to-image reads image, key, text, got txt"),
    ],
)
def test_sources_that_cannot_be(photo_folder, data_checkpoint, tmp_path, name, columns, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        extract(Source(name), data_checkpoint, "out", dataclasses.replace(T2I, columns=columns))
    assert not (tmp_path / "out").exists()


# Killed runs


def count_writes(monkeypatch, at_each) -> None:
    """Call `at_each` before a file is brought to disk, before it gets its name, and after."""
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (at_each(), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda *names: (at_each(), replace(*names), at_each()))


def test_killed_runs_resume_to_the_same_bytes(document_source, data_checkpoint, extracted, tmp_path, monkeypatch):
    """SIGKILL at ten random points of extraction, and at ten of packing."""
    cost_model = CostModel("blocks", 1.0, 0.01)
    stages = {
        "documents": lambda folder: extract(document_source, data_checkpoint, folder, SETTINGS),
        "packs": lambda folder: pack([extracted], folder, ComputeBudget(300), cost_model, packs_per_shard=1),
    }
    rng = random.Random(0)
    for name, run in stages.items():
        points = []
        with monkeypatch.context() as patch:
            count_writes(patch, lambda points=points: points.append(None))
            run(tmp_path / "whole" / name)

        def dies(left: int, run=run, name=name) -> None:
            def count():
                nonlocal left
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

            torch.set_num_threads(1)
            count_writes(monkeypatch, count)
            run(tmp_path / "killed" / name)

        for _ in range(10):
            after = rng.randint(1, len(points) // 10)
            process = multiprocessing.get_context("fork").Process(target=dies, args=(after,))
            process.start()
            process.join()
            assert process.exitcode == -signal.SIGKILL
        assert list((tmp_path / "killed" / name / "data").glob("*.arrow")), "killed in mid-course"
        run(tmp_path / "killed" / name)
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")
    assert files_of(tmp_path / "whole" / "documents") == files_of(extracted)


def test_a_run_that_another_overtakes_in_its_folder_is_the_same(
    document_source, data_checkpoint, extracted, tmp_path, monkeypatch
):
    """While it writes its second shard, as where a job is started again and the first still runs."""
    output, begun, new_stream = tmp_path / "documents", [], pa.ipc.new_stream

    def overtaken(*args):
        begun.append(args)
        if len(begun) == 2:  # before anything is in the file
            extract(document_source, data_checkpoint, output, SETTINGS)
        return new_stream(*args)

    monkeypatch.setattr(pa.ipc, "new_stream", overtaken)
    extract(document_source, data_checkpoint, output, SETTINGS)
    assert files_of(output) == files_of(extracted)


def test_a_batch_is_not_coded_twice(document_source, data_checkpoint, extracted, tmp_path, monkeypatch):
    """Every batch that reached the disk before a kill is read back."""
    from transformers_nextflow.data import extraction

    done, written = [], extraction.write_atomically

    def dies_at_the_fifth(path, write):
        if path.suffix == ".npz":
            if len(done) == 5:
                raise KeyboardInterrupt
            done.append(path)
        written(path, write)

    monkeypatch.setattr(extraction, "write_atomically", dies_at_the_fifth)
    with pytest.raises(KeyboardInterrupt):
        extract(document_source, data_checkpoint, tmp_path / "out", SETTINGS)
    first = list(done)
    monkeypatch.setattr(extraction, "write_atomically", lambda p, w: (done.append(p), written(p, w)))
    extract(document_source, data_checkpoint, tmp_path / "out", SETTINGS)
    batches = [path for path in done if path.suffix == ".npz"]
    assert len(first) == 5 and len(batches) == len(set(batches)) > 8
    assert files_of(tmp_path / "out") == files_of(extracted)


def test_a_picture_that_was_mended_meanwhile_moves_no_codes(photo_folder, data_checkpoint, tmp_path, monkeypatch):
    """To another picture's place in a batch that was coded before."""
    settings = dataclasses.replace(T2I, documents_per_shard=8)
    whole = (photo_folder / "0.png").read_bytes()
    (photo_folder / "0.png").write_bytes(b"")

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(extraction, "write_shard", stop)
        extract(Source(str(photo_folder)), data_checkpoint, tmp_path / "out", settings)
    (photo_folder / "0.png").write_bytes(whole)
    for folder in ("out", "expected"):
        extract(Source(str(photo_folder)), data_checkpoint, tmp_path / folder, settings)
    for key in ("0", "1", "2"):
        ((_, codes, _),), ((_, expected, _),) = (codes_of(tmp_path / folder, key) for folder in ("out", "expected"))
        assert np.array_equal(codes, expected), key


def test_a_repeated_picture_is_encoded_once_and_drawn_by_each_document(data_checkpoint, tmp_path, monkeypatch):
    """Ten documents of two pictures: each gets what it gets where pictures do not repeat, and so many at a time as are
    asked for are coded, however many documents show a picture."""
    chat = Message("user", ("it",)), Message("assistant", (None,))
    made = [Document(f"d{n}", "text-to-image", chat, (picture(n % 2),)) for n in range(10)]
    encoded, features = [], NextFlowVQModel.features
    looked_up, quantize = [], DualCodebookQuantizer.quantize
    monkeypatch.setattr(
        DualCodebookQuantizer, "quantize", lambda *args: (looked_up.append(len(args[1])), quantize(*args))[1]
    )

    def counted(self, pixel_values, *args):
        encoded.append(len(pixel_values))
        return features(self, pixel_values, *args)

    monkeypatch.setattr(NextFlowVQModel, "features", counted)
    path = tmp_path / "together.parquet"
    datasets.Dataset.from_list([document.to_row() for document in made]).to_parquet(str(path))
    read, load = [], np.lib.npyio.NpzFile.__getitem__
    monkeypatch.setattr(np.lib.npyio.NpzFile, "__getitem__", lambda self, key: (read.append(key), load(self, key))[1])
    settings = dataclasses.replace(SETTINGS, documents_per_shard=10, batch_size=4)
    extract(Source(str(path)), data_checkpoint, tmp_path / "together", settings)
    assert encoded == [2] and looked_up == [4, 4, 2] * SETTINGS.variants
    assert len(read_manifest(tmp_path / "together")["shards"]) == 1, "ten documents are no more than ten"
    assert len(read) == len(set(read)), "what is stored of a batch is read once"
    for document in made[:3]:
        path = tmp_path / f"{document.key}.parquet"
        datasets.Dataset.from_list([document.to_row()]).to_parquet(str(path))
        extract(Source(str(path)), data_checkpoint, tmp_path / document.key, settings)
        folders = tmp_path / document.key, tmp_path / "together"
        alone, together = (codes_of(folder, document.key)[0] for folder in folders)
        assert all(np.array_equal(a, b) for a, b in zip(alone, together))
    inputs = [str(codes_of(tmp_path / "together", f"d{n}")[0][2]) for n in (0, 2, 4)]
    assert len(set(inputs)) == 3, "each document has its own self-correction"


def test_another_run_in_the_same_folder_is_refused(document_source, data_checkpoint, extracted):
    with pytest.raises(ValueError, match="was begun with another batch size"):
        extract(document_source, data_checkpoint, extracted, dataclasses.replace(SETTINGS, batch_size=3))


def test_what_else_is_in_a_folder_is_left_alone(extracted, tmp_path):
    """A hidden file may be of a run that was killed."""
    arguments = tmp_path / "packs", ComputeBudget(300), CostModel("blocks", 1.0, 0.01)
    (tmp_path / "packs").mkdir()
    (tmp_path / "packs" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="packs is not empty and holds no extraction; choose another folder"):
        pack([extracted], *arguments)
    (tmp_path / "packs" / "notes.txt").rename(tmp_path / "packs" / ".plan.json.partial")
    assert pack([extracted], *arguments) == pack([extracted], *arguments), "what is finished is not done again"
    (shard,) = (tmp_path / "packs" / "data").iterdir()
    shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    with pytest.raises(ValueError, match="is damaged: its sha256"):
        pack([extracted], *arguments)


# Filters and draws


def text_to_image(tmp_path, data_checkpoint, name: str, sizes=(), count: int = 60, **changes) -> dict:
    sizes = list(sizes) or [(40, 40)] * count
    images = [{"bytes": picture(0, *size), "path": None} for size in sizes]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = {"image": images, "text": ["word " * (1 + number % 4) for number in range(len(images))]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "a.parquet"))
    settings = dataclasses.replace(T2I, batch_size=32, documents_per_shard=64, **changes)
    return extract(Source(str(tmp_path / "a.parquet")), data_checkpoint, tmp_path / name, settings)["statistics"]


def test_filters_count_what_they_leave_out(tmp_path, data_checkpoint):
    sizes = [(40, 40), (39, 40), (40, 161), (40, 40), (40, 40), (40, 160), (160, 40), (40, 40)]
    counts = text_to_image(  # texts of 5, 10, 15 and 20 characters
        tmp_path, data_checkpoint, "a", sizes, min_size=40, max_aspect_ratio=4, min_text=10, max_text=15
    )
    assert counts["skipped: text too short"] == 2 and counts["skipped: text too long"] == 2
    assert counts["skipped: image too small"] == 1 and counts["skipped: aspect ratio"] == 1
    assert counts["documents"] == 2, "at the limits"


def test_inversion_and_dropping(tmp_path, data_checkpoint):
    counts = text_to_image(tmp_path, data_checkpoint, "a", invert_share=0.5, drop_text=0.4, seed=2)
    assert 20 <= counts["inverted"] <= 40 and counts["kind captioning"] == counts["inverted"]
    assert 0.2 < counts["text dropped"] / counts["kind text-to-image"] < 0.6
    lengths = {row["kind"]: set() for row in rows_of(tmp_path / "a").values()}
    for row in rows_of(tmp_path / "a").values():
        lengths[row["kind"]].add(len(row["input_ids"]))
    assert len(lengths["text-to-image"]) == 5, "four texts, and none"
    everything = text_to_image(tmp_path, data_checkpoint, "b", count=4, invert_share=1.0)
    assert everything["kind captioning"] == 4


def test_paper_limits_on_frames_are_the_readers(tmp_path):
    video = DocumentReader("video", max_images=3).read({"images": [picture(n) for n in range(7)]}, 0)
    assert [document.images for document in video] == [(picture(0), picture(3), picture(6))]
    rows = {"texts": ["a", None, "b", "c", None], "images": [None, picture(0), picture(1), picture(2), picture(3)]}
    first, second = DocumentReader("interleaved", max_images=2).read(rows, 4)
    assert (first.key, first.messages[0].content, first.images) == (
        "4",
        ("a", None, "b", None, "c"),
        (picture(0), picture(1)),
    )
    assert (second.key, second.messages[0].content) == ("4#1", (None, None))
    (first,) = DocumentReader("video", max_images=1).read({"images": [picture(n) for n in range(3)], "text": "a"}, 0)
    assert (first.messages[0].content, first.images) == (("a", None), (picture(0),))
    table = ScheduleTable([[(1, 1), (2, 2), (3, 3)]], {"256": 1, "512": 2, "1024": 3}, 8)
    of_levels = [ExtractionSettings(level=level).reader(table, None).max_images for level in ("256", "512", None)]
    assert of_levels == [None, 5, 3]
    assert ExtractionSettings(max_images=2).reader(table, None).max_images == 2


NEEDED = {
    "text": "text",
    "text-to-image": "image text",
    "captioning": "image text",
    "editing": "image target text",
    "interleaved": "images texts",
    "video": "images",
    "chat": "messages",
}


@pytest.mark.parametrize("task", NEEDED)
def test_a_source_needs_the_columns_of_its_task_and_those_that_are_named(task):
    needed, reader = NEEDED[task].split(), DocumentReader(task)
    reader.check_columns(needed)
    for name in needed:
        with pytest.raises(ValueError, match=f"the task {task} needs the columns {name}; the source has "):
            reader.check_columns([*(other for other in needed if other != name), "more"])
    with pytest.raises(ValueError, match="needs the columns name; the source has "):
        DocumentReader(task, {"key": "name"}).check_columns(needed)
    with pytest.raises(ValueError, match="task must be one of text, .* got 'song'"):
        DocumentReader("song")


def test_pictures_with_questions_and_instructions():
    a, b, c = map(picture, range(3))
    asked, plain = (
        DocumentReader("captioning").read({"text": "a star", "image": a, **more}, 7)[0]
        for more in ({"question": "what is it?"}, {})
    )
    assert [document.messages[0].content for document in (asked, plain)] == [
        (None, "what is it?"),
        (None, "describe the picture"),
    ]
    assert (asked.key, asked.messages[1].content, asked.images) == ("7", ("a star",), (a,))
    row = {"image": [a, b], "text": "make it green", "target": c, "name": 5}
    (edit,) = DocumentReader("editing", {"key": "name"}).read(row, 7)
    assert edit.key == "5" and edit.images == (a, b, c)
    assert [(message.role, message.content) for message in edit.messages] == [
        ("user", (None, None, "make it green")),
        ("assistant", (None,)),
    ]
    with pytest.raises(Skipped, match="no image"):
        DocumentReader("editing").read(row | {"image": None}, 0)


def test_cells_of_pictures():
    """Paths that a dataset of the Hub spells lead nowhere, those of `datasets` into its cache."""
    here, of_the_hub = DocumentReader("text-to-image", root="/data"), DocumentReader("text-to-image")
    for cell, expected in (
        (b"PNG", b"PNG"),
        ({"bytes": b"PNG", "path": "a.png"}, b"PNG"),
        ({"bytes": None, "path": "/cache/a.png"}, "/cache/a.png"),
    ):
        assert here.image(cell) == of_the_hub.image(cell) == expected
    assert here.image("a.png") == here.image({"bytes": None, "path": "a.png"}) == "/data/a.png"
    for cell in ("", b"", {"bytes": b"", "path": "a.png"}, {"bytes": None, "path": None}, 3, None):
        with pytest.raises(Skipped, match="no image"):
            here.image(cell)


def test_documents_are_rows_and_come_back():
    chat = (Message("user", (None, "and", None)), Message("assistant", ("a star",)))
    document = Document("k", "sft", chat, (picture(0), "/data/a.png"))
    assert DocumentReader("chat", root="/elsewhere").read(document.to_row(), 0) == [document]
    row = {name: value for name, value in document.to_row().items() if name not in ("key", "kind")}
    assert DocumentReader("chat").read(row, 4) == [dataclasses.replace(document, key="4", kind="chat")]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ((), r"document k must be a chat or one message without a role, got roles \[\]"),
        ((Message(None, ("a",)), Message("user", ("b",))), "must be a chat or one message without a role"),
        ((Message("robot", ("a",)),), r"document k has messages of unknown roles \['robot'\]"),
        ((Message("user", (None,)),), "document k shows 1 images in its messages and has 0"),
    ],
)
def test_documents_that_cannot_be(messages, message):
    with pytest.raises(ValueError, match=message):
        Document("k", "chat", messages)


def test_dropping_takes_the_users_texts_or_all_that_the_user_gave():
    answer = Message("assistant", ("as you wish", None))
    chat = (Message("system", ("be exact",)), Message("user", (None, "make it green", None)), answer)
    edit = Document("edit", "editing", chat, ("a.png", "b.png", "c.png"))

    def dropped(content, images) -> Document:
        return dataclasses.replace(edit, messages=(chat[0], Message("user", content), answer), images=images)

    expected = dropped((None, None, ""), edit.images), "text dropped"
    assert Transformations(drop_text=1.0)(edit) == expected
    expected = dropped(("",), edit.images[2:]), "text and condition images dropped"
    assert Transformations(drop_condition=1.0)(edit) == expected
    drawn = Document("t2i", "text-to-image", (Message("user", ("a",)), Message("assistant", (None,))), ("a.png",))
    read = Document("read", "captioning", (Message("user", (None,)), Message("assistant", ("a",))), ("a.png",))
    for document in (edit, drawn, read):
        assert Transformations()(document) == (document, None)
        assert Transformations(drop_condition=float(document is not edit))(document) == (document, None)
    assert Transformations(drop_text=1.0)(read) == (read, None), "answers without pictures"
    changes = [
        [Transformations(0.0, 0.3, 0.5, *seed)(dataclasses.replace(edit, key=str(key)))[1] for key in range(400)]
        for seed in ((), (0,), (1,))
    ]
    assert changes[0] == changes[1] != changes[2]
    assert 90 < changes[0].count("text dropped") < 150
    assert 170 < changes[0].count("text and condition images dropped") < 230


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"variants": 0}, "variants must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"documents_per_shard": 0}, "documents_per_shard must be at least 1, got 0"),
        ({"max_aspect_ratio": 0.9}, "max_aspect_ratio must be at least 1, got 0.9"),
        ({"invert_share": -0.1}, r"invert_share must lie in \[0, 1\], got -0.1"),
        ({"drop_text": 1.1}, r"drop_text must lie in \[0, 1\], got 1.1"),
        ({"drop_condition": 1.1}, r"drop_condition must lie in \[0, 1\], got 1.1"),
        ({"drop_text": 0.75, "drop_condition": 0.5}, "must not exceed 1 together"),
    ],
)
def test_settings_that_cannot_be(values, message):
    with pytest.raises(ValueError, match=message):
        ExtractionSettings(**values)
    ones = dict.fromkeys(("variants", "batch_size", "documents_per_shard", "max_aspect_ratio", "invert_share"), 1)
    ExtractionSettings(**ones, drop_text=0.5, drop_condition=0.5)


def test_what_settings_and_documents_say_stays(tiny_processor):
    spec = SequenceSpec.of(tiny_processor)
    extents = Extents(*np.ones((3, 2), dtype=int))
    frozen = [ExtractionSettings(), Transformations(), DocumentReader("text"), Source("a"), CostModel(), extents]
    frozen += [ComputeBudget(len(extents)), FixedLength(8), BatchPadding(1, 8), spec.special, *documents()[:1]]
    frozen += [documents()[0].messages[0], LoadedSource(datasets.Dataset.from_dict({"text": ["a"]}))]
    frozen.append(spec.measure(np.array([9]), np.array([True]), np.empty((0, 2), int)))
    assert frozen[3].root is None
    for each in frozen:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(each, dataclasses.fields(each)[0].name, 1)


def test_rows_that_supervise_nothing_or_point_elsewhere_are_skipped(tmp_path, data_checkpoint):
    chat = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
    datasets.Dataset.from_list([{"messages": chat, "key": "lonely"}]).to_parquet(str(tmp_path / "a.parquet"))
    settings = dataclasses.replace(SETTINGS, self_correction=None)
    manifest = extract(Source(str(tmp_path / "a.parquet")), data_checkpoint, tmp_path / "out", settings)
    assert manifest["statistics"]["skipped: nothing supervised"] == 1 and manifest["statistics"]["documents"] == 0
    assert json.loads((tmp_path / "out" / "skipped.jsonl").read_text())["key"] == "lonely"
    of_the_hub = DocumentReader("text-to-image")
    with pytest.raises(Skipped, match="a path, /etc/passwd, where images must be embedded"):
        of_the_hub.read({"text": "a", "image": "/etc/passwd"}, 0)


def test_several_processes_write_the_same_shards(document_source, data_checkpoint, extracted, tmp_path, monkeypatch):
    """Which get what they are told pickled, and here need not import all anew."""

    spawned = []

    def spawn(work, arguments, nprocs):
        spawned.append(nprocs)
        work, arguments = pickle.loads(pickle.dumps((work, arguments)))
        torch.multiprocessing.start_processes(work, arguments, nprocs, start_method="fork")

    monkeypatch.setattr(torch.multiprocessing, "spawn", spawn)
    extract(document_source, data_checkpoint, tmp_path / "out", SETTINGS, num_proc=2)
    assert files_of(tmp_path / "out") == files_of(extracted) and spawned == [2]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"engine": "spark"}, "engine must be one of local, ray, got 'spark'"),
        ({"num_proc": 0}, "num_proc must be at least 1, got 0"),
        ({"num_workers": -1}, "num_workers must be at least 0, got -1"),
        ({"devices": ()}, "devices must name one or more, got none"),
        ({"settings": dataclasses.replace(SETTINGS, max_images=0)}, "max_images must be positive, got 0"),
    ],
)
def test_nobody_to_do_the_work(values, message, document_source, data_checkpoint, tmp_path):
    with pytest.raises(ValueError, match=message):
        extract(document_source, data_checkpoint, tmp_path / "out", **{"settings": SETTINGS} | values)
    assert not (tmp_path / "out").exists()


def test_self_correction_is_optional(document_source, data_checkpoint, tmp_path):
    settings = dataclasses.replace(SETTINGS, self_correction=None)
    manifest = extract(document_source, data_checkpoint, tmp_path / "out", settings, ("cpu", "of no process"))
    assert manifest["variants"] == 0
    assert all(len(row["image_input_codes"]) == 0 for row in rows_of(tmp_path / "out").values())
    with pytest.raises(ValueError, match="top_k"):
        SelfCorrection(top_k=0)
