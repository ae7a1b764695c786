"""A tiny Llama learns to draw by the one command: what is trained, what is kept, what is scored, what goes on."""

import json
import resource
import shutil
import sys
from contextlib import nullcontext

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import TrainerState

from examples.emoji.scoring import MODEL, TOKENIZER
from examples.emoji.splits import PAIR, SEEN
from examples.emoji.stages import Log
from examples.smollm2 import run
from examples.smollm2.questions import QUESTIONS
from examples.smollm2.run import curve
from examples.smollm2.training import PICTURES, PicturesAlone, train
from tests.conversion.text_models import llama, llama_tokenizer, save
from transformers_nextflow import NextFlowForConditionalGeneration, NextFlowProcessor
from transformers_nextflow.data import PackedDataset
from transformers_nextflow.losses import IGNORE

pytest.importorskip("peft")
STEPS = 3
ADAPTER = "adapter_model.safetensors"
CODES = 155  # of a picture of 64 pixels


@pytest.fixture(scope="module")
def command(world_folder, emoji_checkpoint, tmp_path_factory) -> list[str]:
    tokenizer, folder = llama_tokenizer(), tmp_path_factory.mktemp("smollm2")
    save(llama(tokenizer, tie_word_embeddings=True), tokenizer, folder / "text")
    options = {"text": folder / "text", "vq": emoji_checkpoint, "data": world_folder, "output": folder / "output"}
    options |= {"steps": STEPS, "prompts": 2, "max-new-tokens": 4}
    return ["run", *(str(part) for name, value in options.items() for part in (f"--{name}", value))]


def ran(command: list[str]):
    """The folder of the converted model and that of the run."""
    with pytest.MonkeyPatch.context() as patch, torch.compiler.set_stance("force_eager"):
        patch.setattr(sys, "argv", command)
        run.main()
    output = run.Path(command[command.index("--output") + 1])
    return output / "converted", output / f"steps-{STEPS}"


@pytest.fixture(scope="module")
def folders(command):
    return ran(command)


def test_the_converted_model_answers_as_its_source(folders):
    asked = json.loads((folders[1] / "smollm2.json").read_text())["questions"]
    assert [each["question"] for each in asked] == list(QUESTIONS)
    for each in asked:
        assert each["answers"].keys() == {"source", "converted", "trained"}
        assert each["answers"]["converted"] == each["answers"]["source"] != ""
        assert each["largest difference of logits"]["converted"] == 0 < each["largest difference of logits"]["trained"]


def test_layers_and_new_parts_are_trained_and_nothing_else(folders):
    before, after = (NextFlowForConditionalGeneration.from_pretrained(f).state_dict() for f in named(*folders))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    layers = "model.language_model.layers."
    linear = {name for name in before if name.startswith(layers) and name.endswith("_proj.weight")}
    new = ("code_head", "model.code_embeddings", "model.connector", "model.scale_embedding")
    assert len(linear) == 2 * 7
    assert changed == linear | {name for name in before if name.startswith(new)}


def test_new_parts_are_aligned_before_the_layers_change(folders, tmp_path):
    converted, folder = folders
    with torch.compiler.set_stance("force_eager"):
        train(tmp_path / "adapter", converted, folder / "data" / "packs", steps=2)
    start, end = (load_file(tmp_path / "adapter" / f"checkpoint-{step}" / ADAPTER) for step in (1, 2))
    layers = {name for name in start if ".lora_B." in name}
    assert len(layers) == 2 * 7
    assert not any(start[name].any() for name in layers) and all(end[name].any() for name in layers)


def named(converted, folder):
    return converted, folder / "trained"


def test_codes_alone_are_targets(folders):
    converted, folder = folders
    model, processor = (
        each.from_pretrained(converted) for each in (NextFlowForConditionalGeneration, NextFlowProcessor)
    )
    dataset = PackedDataset(folder / "data" / "packs", model, processor)
    assert len(dataset) == STEPS
    batch = PicturesAlone(dataset)([dataset[0]])
    targets = batch["shift_labels"] != IGNORE
    assert targets.shape[0] == PICTURES and targets.sum(1).tolist() == [CODES] * PICTURES
    assert batch["input_ids"][targets].unique().tolist() == sorted((processor.boi_token_id, processor.image_token_id))


def test_drawings_are_scored_and_shown(folders):
    result = json.loads((folders[1] / "smollm2.json").read_text())
    for part in (SEEN, PAIR):
        for who in (MODEL, TOKENIZER):
            assert {measure: figure["n"] for measure, figure in result["drawings"][part][who].items()} == {
                **{"picture": 2, "name": 2, "style": 2}
            }
    assert Image.open(folders[1] / "smollm2.png").width > 8 * 2 * 64


def test_the_curve_has_every_step(folders):
    result = json.loads((folders[1] / "smollm2.json").read_text())
    assert [row["step"] for row in result["curve"]] == [1, 2, 3]
    assert all(row["loss_vision"] > 0 and "loss_text" not in row for row in result["curve"])


@pytest.mark.parametrize(
    "stopped", ["while it wrote one", pytest.param("before a checkpoint", marks=pytest.mark.slow)]
)
def test_the_same_command_goes_on_where_it_was_stopped(stopped, command, folders):
    folder = folders[1]
    log, expected = (folder / "log.jsonl").read_text(), load_file(folder / "adapter" / ADAPTER)
    drawings = json.loads((folder / "smollm2.json").read_text())["drawings"]
    for name in ("finished", ADAPTER):
        (folder / "adapter" / name).unlink()
    last = folder / "adapter" / f"checkpoint-{STEPS}"
    (last / "trainer_state.json").unlink()  # which is written last
    for lost in (folder / "trained", *([last] if stopped == "before a checkpoint" else [])):
        shutil.rmtree(lost)
    ran(command)
    again = load_file(folder / "adapter" / ADAPTER)
    assert again.keys() == expected.keys() and all(torch.equal(again[name], expected[name]) for name in again)
    result = json.loads((folder / "smollm2.json").read_text())
    assert [row["step"] for row in result["curve"]] == [1, 2, 3] and result["drawings"] == drawings
    added = (folder / "log.jsonl").read_text().removeprefix(log).splitlines()
    assert [json.loads(line)["step"] for line in added] == [3]


@pytest.mark.parametrize("option", ["--steps", "--prompts", "--max-new-tokens"])
def test_less_than_one_is_refused(option, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run", option, "0"])
    with pytest.raises(SystemExit):
        run.main()
    assert f"{option} must be at least 1, got 0" in capsys.readouterr().err


def test_a_log_on_a_full_disk_is_one_to_go_on_with(tmp_path):
    state = TrainerState(global_step=1)
    for number in range(2):
        log = Log(tmp_path / "log.jsonl", "stage")
        log.on_train_begin(None, state, None)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        full = (tmp_path / "log.jsonl").stat().st_size + 10 if number else limits[0]
        with pytest.raises(OSError, match="File too large") if number else nullcontext():
            resource.setrlimit(resource.RLIMIT_FSIZE, (full, limits[1]))
            try:
                log.on_log(None, state, None, {"loss": 1.0})
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    Log(tmp_path / "log.jsonl", "stage").on_train_begin(None, state, None)
    assert [row["loss"] for row in curve(tmp_path / "log.jsonl")] == [1.0]
