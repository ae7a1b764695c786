"""The committed settings of DeepSpeed, run on a CPU by the launcher; where DeepSpeed is (`DS_BUILD_OPS=0 pip install
deepspeed`), which compiles an operator at its first run."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from data_samples import SETTINGS

from transformers_nextflow import NextFlowForConditionalGeneration
from transformers_nextflow.cli import main
from transformers_nextflow.data import ComputeBudget, CostModel, extract, pack

ROOT = Path(__file__).parents[2]
RUN = ("train", "transformer", "--max_steps", "2", "--learning_rate", "1e-3", "--lr_scheduler_type", "constant")
RUN += ("--logging_steps", "1", "--save_steps", "2", "--report_to", "none", "--use_cpu", "--disable_tqdm", "True")
NAMES = ("loss", "grad_norm", "loss_text", "loss_vision")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed"),
]


def launch(settings: str, *words, processes: int = 2, precision: tuple = ()) -> None:
    accelerate(settings, *precision, "--num_processes", processes, "-m", "transformers_nextflow", *RUN, *words)


def accelerate(settings: str, *words, error: str | None = None) -> None:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    command += ["--config_file", str(ROOT / "examples" / "accelerate" / f"{settings}.yaml"), *map(str, words)]
    path = os.pathsep.join(map(str, (ROOT / "src", ROOT, ROOT / "tests", ROOT / "tests" / "grpo")))
    on_cpu = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, env=os.environ | on_cpu, capture_output=True, text=True)
    assert (done.returncode == 0) if error is None else (error in done.stderr), done.stderr[-4000:]


def logged(output: Path) -> list[list[float]]:
    history = json.loads((output / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]
    return [[row[name] for name in NAMES] for row in history if "loss" in row]


@pytest.fixture(scope="module")
def words(packs, data_checkpoint) -> tuple:
    return ("--packs", packs, "--model", data_checkpoint)


@pytest.fixture(scope="module")
def alone(words, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("alone")
    assert main([*RUN, *map(str, words), "--gradient_accumulation_steps", "4", "--output", str(output)]) == 0
    return output


@pytest.mark.parametrize("settings", ["deepspeed_zero2", "deepspeed_zero3"])
def test_two_processes_train_as_one(settings, words, alone, tmp_path):
    options = ("--gradient_accumulation_steps", "2", "--output", tmp_path)
    launch(settings, *words, *options, precision=("--mixed_precision", "no"))
    assert np.allclose(logged(tmp_path), logged(alone), rtol=1e-4, atol=0)
    expected, got = (NextFlowForConditionalGeneration.from_pretrained(folder) for folder in (alone, tmp_path))
    assert got.model.vq_model.quantizer is not None
    weights = dict(expected.named_parameters())
    assert max(float((each - weights[name]).abs().max()) for name, each in got.named_parameters()) < 1e-5


@pytest.mark.parametrize("settings", ["deepspeed_zero2", "deepspeed_zero3"])
def test_in_bfloat16_a_stage_follows_a_stage(settings, words, alone, document_source, tmp_path):
    """As the file says, without a word of `--bf16`; on shards of the first model, and on new ones of the second."""
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    launch(settings, *words, "--gradient_accumulation_steps", "4", "--output", first, processes=1)
    assert np.allclose(np.array(logged(first))[:, 0], np.array(logged(alone))[:, 0], rtol=0.02)
    launch(settings, *words[:2], "--model", first, "--bf16", "--output", second, processes=1)
    assert np.isfinite(logged(second)).all() and logged(second)[0][0] < logged(alone)[0][0]
    extract(document_source, str(second), tmp_path / "documents", SETTINGS)
    pack([tmp_path / "documents"], tmp_path / "packs", ComputeBudget(300), CostModel("blocks", 1.0, 3e-4, 0.5))
    new = ("--packs", tmp_path / "packs", "--model", second, "--output", third)
    assert main([*RUN, *map(str, new)]) == 0
    tokenizers = (NextFlowForConditionalGeneration.from_pretrained(name).model.vq_model for name in (words[3], third))
    before, after = (tokenizer.state_dict() for tokenizer in tokenizers)
    assert all(torch.equal(before[name].float(), after[name].float()) for name in before)


@pytest.mark.parametrize("kind", ["supervised", "preferences"])
def test_answers_with_pictures_in_bfloat16(kind, data_checkpoint, tmp_path):
    """What gives codes stays as it was, in the training and in its result; all that computes learns."""
    pytest.importorskip("trl", reason="the trainers are TRL's")
    script = Path(__file__).with_name("answers_under_deepspeed.py")
    accelerate("deepspeed_zero2", "--num_processes", 2, script, kind, data_checkpoint, tmp_path)
    history = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    losses = [row["loss"] for row in history if "loss" in row]
    assert losses[-1] < losses[0]
    assert kind == "supervised" or losses[0] == pytest.approx(np.log(2), abs=1e-6)  # model and reference agree
    before, after = (
        NextFlowForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).state_dict()
        for folder in (data_checkpoint, tmp_path / "checkpoint-4")
    )
    kept = {name for name in before if torch.equal(before[name], after[name])}
    assert {name for name in before if name.startswith("model.vq_model.")} <= kept
    computing = {name for name in before if name.endswith(("_proj.weight", "code_head.weight", "embed_tokens.weight"))}
    assert not kept & {name for name in computing if "vq_model" not in name}


GRPO = ("train", "grpo", "--reward_funcs", "test_grpo_trainer.redness", "--num_generations", "4", "--save_steps", "2")
GRPO += ("--max_steps", "2", "--learning_rate", "1e-3", "--lr_scheduler_type", "constant", "--logging_steps", "1")
GRPO += ("--report_to", "none", "--use_cpu", "--disable_tqdm", "True")


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_rollouts_of_two_processes_train_as_those_of_one(precision, data_checkpoint, tmp_path, monkeypatch):
    (tmp_path / "prompts").mkdir()
    rows = [json.dumps({"prompt": f"a cat, {number}"}) for number in range(8)]
    (tmp_path / "prompts" / "train.jsonl").write_text("\n".join(rows))
    words = (*GRPO, "--model", str(data_checkpoint), "--dataset_name", str(tmp_path / "prompts"))
    words += ("--bf16", str(precision == "bf16"))
    monkeypatch.syspath_prepend(ROOT / "tests" / "grpo")
    assert main([*words, "--per_device_train_batch_size", "8", "--output", str(tmp_path / "alone")]) == 0
    launch = ("--num_processes", 2, "--mixed_precision", precision, "-m", "transformers_nextflow", *words)
    accelerate("deepspeed_zero2", *launch, "--per_device_train_batch_size", 4, "--output", tmp_path / "two")
    before, alone, two = (
        NextFlowForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).state_dict()
        for folder in (data_checkpoint, tmp_path / "alone", tmp_path / "two")
    )
    assert all(torch.equal(before[name], two[name]) for name in before if "vq_model" in name)
    moved = {name for name in before if not torch.equal(before[name], alone[name])}
    assert moved and all(not torch.equal(before[name], two[name]) for name in moved)
    if precision == "no":
        assert max(float((alone[name] - two[name]).abs().max()) for name in before) < 1e-5


def test_rollouts_of_weights_in_shards_are_refused(data_checkpoint, tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps({"prompt": "a cat"}))
    words = (*GRPO, "--model", data_checkpoint, "--dataset_name", tmp_path, "--output", tmp_path / "out", "--bf16")
    error = "rollouts need whole weights, which FSDP2 gathers for them: not FSDP1 or ZeRO-3"
    accelerate("deepspeed_zero3", "--num_processes", 2, "-m", "transformers_nextflow", *words, error=error)


def test_a_tokenizer_that_would_be_rounded_is_refused(data_checkpoint, tmp_path):
    pytest.importorskip("trl", reason="the trainers are TRL's")
    words = (Path(__file__).with_name("answers_under_deepspeed.py"), "supervised", data_checkpoint, tmp_path)
    error = "ValueError: ZeRO-3 in 16 bits would round the vision tokenizer"
    accelerate("deepspeed_zero3", "--num_processes", 1, *words, error=error)
