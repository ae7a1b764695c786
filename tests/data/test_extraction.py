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
    ComputeBudget,
    CostModel,
    Document,
    DocumentReader,
    ExtractionSettings,
    Message,
    Source,
    extract,
    extraction,
    pack,
    verify,
)
from transformers_nextflow.data.documents import Skipped, read_size
from transformers_nextflow.data.shards import Shard, decodable_codes, images_of, read_manifest, sequence_spec
from transformers_nextflow.quantizer import DualCodebookQuantizer


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
    here, read = os.getpid(), extraction.pixels_of
    extract(Source(str(photo_folder)), data_checkpoint, tmp_path / "alone", T2I)

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
    sizes = [(40, 40), (10, 40), (40, 200), (40, 40)]
    counts = text_to_image(
        tmp_path, data_checkpoint, "a", sizes, min_size=20, max_aspect_ratio=4, min_text=6, max_text=19
    )
    assert counts["skipped: text too short"] == 1 and counts["skipped: text too long"] == 1
    assert counts["skipped: image too small"] == 1 and counts["skipped: aspect ratio"] == 1
    assert counts["documents"] == 0


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

    def spawn(work, arguments, nprocs):
        work, arguments = pickle.loads(pickle.dumps((work, arguments)))
        torch.multiprocessing.start_processes(work, arguments, nprocs, start_method="fork")

    monkeypatch.setattr(torch.multiprocessing, "spawn", spawn)
    extract(document_source, data_checkpoint, tmp_path / "out", SETTINGS, num_proc=2)
    assert files_of(tmp_path / "out") == files_of(extracted)


@pytest.mark.parametrize(
    ("values", "message"),
    [
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
    manifest = extract(document_source, data_checkpoint, tmp_path / "out", settings)
    assert manifest["variants"] == 0
    assert all(len(row["image_input_codes"]) == 0 for row in rows_of(tmp_path / "out").values())
    with pytest.raises(ValueError, match="top_k"):
        SelfCorrection(top_k=0)
