"""Own pictures by one command: from a folder of any form to adapters or a model that draws, resumed and held out."""

import io
import json
import shutil
import struct
import tarfile
import zlib
from contextlib import redirect_stdout
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image
from tiny_models import enlarge_

from transformers_nextflow import NextFlowForConditionalGeneration, NextFlowProcessor
from transformers_nextflow.cli import main
from transformers_nextflow.data import Source
from transformers_nextflow.training import FinetuneSettings, NextFlowTrainer, SamplesCallback, finetuning
from transformers_nextflow.utils.loading import load_model

pytest.importorskip("peft")

COLOURS = {"red": (200, 30, 30), "blue": (30, 30, 200), "green": (30, 160, 30), "grey": (120, 120, 120)}
PRIOR = ("a cat", "a cat", "a house", "a car", "a tree")
OPTIONS = ("--steps", 8, "--batch-size", 2, "--evaluations", 2, "--samples", 2, "--held-out", 0.25, "--json")
RATE = ("--learning-rate", 1e-2)
FEW = (*RATE, "--steps", 4, "--evaluations", 2, "--samples", 1)


@pytest.fixture(scope="module", autouse=True)
def here(tmp_path_factory, tiny_model, tiny_processor):
    """A folder with a checkpoint `start` and captioned pictures `photos`, one of them torn, in which all runs."""
    import copy

    folder = tmp_path_factory.mktemp("finetune")
    torch.manual_seed(1)
    enlarge_(copy.deepcopy(tiny_model)).save_pretrained(folder / "start")
    tiny_processor.save_pretrained(folder / "start")
    (folder / "photos").mkdir()
    lines = []
    for number in range(9):
        name, colour = list(COLOURS.items())[number % 4]
        picture = Image.new("RGB", (24, 24), colour)
        picture.putpixel((number, number), (255, 255, 255))
        picture.save(folder / "photos" / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": f"a {name} box"}))
    (folder / "photos" / "8.png").write_bytes((folder / "photos" / "7.png").read_bytes()[:60])
    (folder / "photos" / "metadata.jsonl").write_text("\n".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        yield folder


def status_of(photos, output, *options) -> int:
    return main(list(map(str, ("finetune", photos, "--model", "start", "--output", output, *OPTIONS, *options))))


def tune(photos, output, *options) -> dict:
    with redirect_stdout(io.StringIO()) as out:
        assert status_of(photos, output, *options) == 0
    return json.loads(out.getvalue()[out.getvalue().index("{\n") :])


@pytest.fixture(scope="module")
def whole(here) -> dict:
    """What adapters come to, in a folder of that name."""
    return tune("photos", "whole", *RATE)


@pytest.fixture(scope="module")
def short(here) -> dict:
    """What they come to in half of the steps."""
    return tune("photos", "short", *FEW)


def codes(model, processor) -> torch.Tensor:
    inputs = processor.apply_chat_template([{"role": "user", "content": "a red box"}], generation_mode="image")
    return model.generate(**inputs, generation_mode="image", seed=3)


@pytest.mark.parametrize("name, options", [("whole", RATE), ("full", ("--full", *RATE))])
def test_a_folder_becomes_a_model_that_draws(whole, capsys, name, options):
    figures = tune("photos", name, *options)
    assert (figures["pictures"], figures["held out"], figures["left out"]) == (8, 2, 1)
    assert figures["loss after"] < figures["loss before"] and figures["steps"] <= 8
    folder = Path(name)
    assert (folder / "adapter_config.json").exists() == ("--full" not in options)
    if "--full" not in options:
        adapters = json.loads((folder / "adapter_config.json").read_text())
        assert (adapters["r"], adapters["lora_alpha"]) == (16, 32)
    assert Image.open(folder / "sheet.png").size[0] > 100
    read = lambda name: json.loads((folder / "data" / name / "manifest.json").read_text())  # noqa: E731
    training, held_out = (read(f"{split}-codes")["settings"] for split in ("training", "held-out"))
    assert (training["variants"], training["self_correction"]["temperature"], training["drop_text"]) == (16, 0.1, 0.1)
    assert (held_out["variants"], held_out["self_correction"], held_out["drop_text"]) == (1, None, 0.0)
    packs = [[shard["rows"] for shard in read(f"{split}-packs")["shards"]] for split in ("training", "held-out")]
    assert packs == [[6], [2]]  # each of one picture
    assert not [path.name for path in folder.iterdir() if path.suffix in (".pt", ".pth", ".bin")]  # of the training
    assert {path.name for path in (folder / "samples").iterdir()} >= {"step-0", "step-4"}
    model, processor = load_model(name)
    drawn = codes(model, processor)
    assert torch.equal(codes(NextFlowForConditionalGeneration.from_pretrained(name).eval(), processor), drawn)
    assert torch.equal(codes(model, NextFlowProcessor.from_pretrained(name)), drawn)
    assert not torch.equal(codes(*load_model("start")), drawn)
    assert main(["evaluate", "loss", f"{name}/data/held-out-packs", "--model", name, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(figures["loss after"], rel=1e-4)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert tune("photos", name, *options) == figures
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_pictures_that_cannot_be_coded_are_left_out_at_once(tmp_path):
    """Of no known range, without a pixel, too large: extraction would leave them out after they were counted."""
    photos = Path(shutil.copytree("photos", tmp_path / "photos"))
    Image.new("F", (24, 24), 0.5).save(photos / "8.tiff")
    (photos / "9.grib").write_bytes(b"GRIB" + b"\1" * 30)
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    (photos / "10.png").write_bytes(b"\x89PNG\r\n\x1a\n" + struct.pack(">I", len(header)) + chunk)
    with open(photos / "metadata.jsonl", "a") as lines:
        for name in ("8.tiff", "9.grib", "10.png"):
            lines.write("\n" + json.dumps({"file_name": name, "text": "a box"}))
    figures = tune(photos, tmp_path / "run", "--steps", 1, "--evaluations", 1, "--held-out", 0.01)
    assert (figures["pictures"], figures["held out"], figures["left out"]) == (8, 1, 4)


def test_a_stopped_run_goes_on_as_if_it_had_not_been_stopped(whole, capsys, monkeypatch):
    """Stopped before it begins to train, and again before its result is written."""

    def stop(first, *args, **kwargs):
        if not str(first).endswith("adapter_config.json"):  # with which the folder would be one of adapters
            raise OSError("no space left")

    for owner, name in ((SamplesCallback, "write"), (finetuning.shutil, "copyfile")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, stop)
            assert status_of("photos", "stopped", *RATE) == 2
        assert bool([*Path("stopped").glob("checkpoint-*")]) == (name == "copyfile")
        assert not (Path("stopped") / "adapter_config.json").exists()
    assert tune("photos", "stopped", *RATE) == whole
    one, other = (load_model(name)[0].state_dict() for name in ("whole", "stopped"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert status_of("photos", "stopped", *RATE, "--steps", 9) == 2
    assert "was begun with another steps" in capsys.readouterr().err


def test_a_run_that_is_killed_between_two_checkpoints_goes_on_from_the_first(short, monkeypatch):
    step = NextFlowTrainer.training_step

    def stop_at_the_fourth(trainer, *args, **kwargs):
        if trainer.state.global_step == 3:
            raise OSError("no space left")
        return step(trainer, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(NextFlowTrainer, "training_step", stop_at_the_fourth)
        assert status_of("photos", "in-two", *FEW) == 2
    assert [path.name for path in Path("in-two").glob("checkpoint-*")] == ["checkpoint-2"]
    assert tune("photos", "in-two", *FEW) == short


def test_a_run_that_is_killed_while_it_writes_a_checkpoint_goes_on_from_the_one_before(short, capsys, monkeypatch):
    """Also where there is none before."""
    write, torn = NextFlowTrainer._save_checkpoint, []

    def write_in_part(trainer, *args, **kwargs):
        if trainer.state.global_step in torn:
            return write(trainer, *args, **kwargs)
        torn.append(trainer.state.global_step)
        folder = Path(trainer.args.output_dir, f"checkpoint-{torn[-1]}")
        folder.mkdir(exist_ok=True)
        (folder / "trainer_state.json").write_text('{"global_step": 4, "log_his')
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(NextFlowTrainer, "_save_checkpoint", write_in_part)
        for steps in ([2], [2, 4]):
            assert status_of("photos", "torn", *FEW) == 2
            assert torn == steps and "no space left" in capsys.readouterr().err
    assert tune("photos", "torn", *FEW) == short


def test_a_run_that_had_enough_is_not_trained_on(monkeypatch):
    """At a rate that moves nothing, stopped before the best step's weights are loaded."""
    options = ("--learning-rate", 1e-30, "--steps", 200, "--evaluations", 200, "--patience", 1, "--samples", 1)

    def stop(*args, **kwargs):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(NextFlowTrainer, "_load_best_model", stop)
        assert status_of("photos", "enough", *options) == 2
        patch.setattr(NextFlowTrainer, "training_step", stop)
        figures = tune("photos", "enough", *options)
    assert (figures["best step"], figures["steps"]) == (1, 2) and figures["loss after"] == figures["loss before"]
    history = json.loads(Path("enough", "checkpoint-2", "trainer_state.json").read_text())["log_history"]
    rates = [row["learning_rate"] for row in history if "learning_rate" in row]
    assert rates == pytest.approx([0.0, 1e-30 / 20], rel=1e-6, abs=0)  # of 20 steps to warm up


def test_a_prior_is_what_the_model_drew_before():
    Path("prompts.txt").write_text("\n  \n".join(PRIOR) + "\n")
    options = ("--prior", "prompts.txt", "--steps", 2, "--evaluations", 1, "--seed", 5)
    figures = tune("photos", "with-prior", *options)
    assert figures["pictures"] == 8
    rows = datasets.load_dataset("parquet", data_files="with-prior/data/training.parquet", split="train")
    keys = rows["key"]
    assert sum("#" in key for key in keys) == 1  # one picture comes again, by another key
    assert len(keys) == 12 and len(set(keys)) == 12 and sum(key.startswith("prior/") for key in keys) == 5
    model, processor = load_model("start")
    drawn = [Image.open(f"with-prior/data/prior/{place:04}.png").tobytes() for place in range(5)]
    assert len(set(drawn)) == 5  # of a prompt that comes again other pictures
    for first in (0, 2, 4):  # two prompts at once, each picture by a seed of its own
        chats = [[{"role": "user", "content": prompt}] for prompt in PRIOR[first : first + 2]]
        inputs = processor.apply_chat_template(chats, generation_mode="image")
        seeds = [5 + place for place in range(first, first + len(chats))]
        tokens = model.generate(**inputs, generation_mode="image", seed=seeds)
        pictures = processor.post_process_image(model.decode_image_tokens(tokens, (3, 3)))
        assert [picture.tobytes() for picture in pictures] == drawn[first : first + 2]


def test_one_picture_is_trained_on_whatever_is_held_out():
    options = ("--held-out", 0.99, "--steps", 1, "--evaluations", 1)
    figures = tune("photos", "held-out", *options)
    assert (figures["pictures"], figures["held out"]) == (8, 7)


@pytest.mark.parametrize("prompt", ["  ", "\ud800"])
def test_a_prior_that_is_nothing_to_draw_is_named_before_anything_is_drawn(prompt, monkeypatch):
    monkeypatch.setattr(finetuning, "load_model", None)
    settings = FinetuneSettings(prior=("a cat", prompt))
    with pytest.raises(ValueError, match="prompt 1 of the prior, .*: no"):
        finetuning.finetune(Source("photos"), "start", "refused", settings)
    assert not Path("refused").exists()


@pytest.mark.parametrize("form", ["parquet", "webdataset"])
def test_other_forms_of_captioned_pictures(form):
    path = Path(form)
    path.mkdir()
    if form == "parquet":
        pictures = [{"bytes": Path(f"photos/{number}.png").read_bytes(), "path": None} for number in range(4)]
        table = datasets.Dataset.from_dict({"picture": pictures, "caption": list(COLOURS)}).cast_column(
            "picture", datasets.Image()
        )
        table.to_parquet(str(path / "rows.parquet"))
    else:
        with tarfile.open(path / "rows.tar", "w") as tar:
            for number, name in enumerate(COLOURS):
                for suffix, data in (("png", Path(f"photos/{number}.png").read_bytes()), ("txt", name.encode())):
                    info = tarfile.TarInfo(f"{number}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    figures = tune(path, f"{form}-run", "--steps", 2, "--evaluations", 1)
    assert (figures["pictures"], figures["held out"], figures["steps"]) == (4, 1, 2)


def test_what_cannot_be_tuned_to_is_named(capsys, tmp_path):
    def said(photos, *options) -> str:
        arguments = ("finetune", photos, "--model", "start", "--output", tmp_path / "refused", *options)
        assert main(list(map(str, arguments))) == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    (tmp_path / "alone").mkdir()
    Image.new("RGB", (24, 24)).save(tmp_path / "alone" / "a.png")
    assert "metadata.jsonl" in said(tmp_path / "alone")
    assert "held_out must lie in (0, 1), got 1.0" in said("photos", "--held-out", 1)
    (tmp_path / "alone" / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a"}')
    assert "two pictures with captions or more" in said(tmp_path / "alone")
    two = shutil.copytree(tmp_path / "alone", tmp_path / "two")
    shutil.copy(two / "a.png", two / "b.png")
    with open(two / "metadata.jsonl", "a") as lines:
        lines.write('\n{"file_name": "b.png", "text": "b"}')
    with pytest.raises(ValueError, match="prompt 0 of the prior"):  # two are enough
        finetuning.finetune(Source(str(two)), "start", tmp_path / "refused", FinetuneSettings(prior=(" ",)))
    assert "the source has" in said("photos", "--caption-column", "title")
    assert "is neither a file, a folder nor" in said("nowhere")
