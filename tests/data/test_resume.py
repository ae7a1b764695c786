"""A training that is killed, twice, and resumed is the undisturbed one."""

import copy
import json
import os
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from trainings import train, with_dropout
from transformers import TrainerCallback

from tests.fresh import run
from transformers_nextflow.training import EMACallback, NextFlowTrainer
from transformers_nextflow.training.checkpoints import checkpoint_to_resume

ROOT = Path(__file__).parents[2]
STEPS, SAVE_STEPS = 8, 2


def test_a_killed_training_resumes_as_if_nothing_had_happened(dataset, data_model, tmp_path):
    """Killed at a random step, and again while it writes the checkpoint after that, in the same or the next epoch."""
    model = with_dropout(data_model)
    model.save_pretrained(tmp_path / "model")
    step = random.Random(4).randrange(SAVE_STEPS + 1, STEPS - SAVE_STEPS)
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    path = os.pathsep.join(map(str, (ROOT / "src", ROOT / "tests" / "data")))
    run(script, dataset.folder, tmp_path, STEPS, SAVE_STEPS, step, PYTHONPATH=path)

    left = {path.name: {file.name for file in path.iterdir()} for path in tmp_path.glob("left/checkpoint-*")}
    newest = f"checkpoint-{((step - 1) // SAVE_STEPS + 1) * SAVE_STEPS}"
    assert {"model.safetensors", "optimizer.pt", "ema.safetensors"} <= left[newest]
    assert [name for name, files in left.items() if "trainer_state.json" not in files] == [newest]
    whole, resumed = (json.loads((tmp_path / name / "losses.json").read_text()) for name in ("whole", "killed"))
    assert [row["step"] for row in whole] == list(range(1, STEPS + 1)) and resumed == whole
    for file in ("model", "ema"):
        expected, got = (
            load_file(tmp_path / name / f"checkpoint-{STEPS}" / f"{file}.safetensors") for name in ("whole", "killed")
        )
        assert got.keys() == expected.keys() and all(torch.equal(got[name], expected[name]) for name in expected)
    assert len({row["loss"] for row in whole}) == STEPS


KILLED = """
import json, os, shutil, signal, sys
from pathlib import Path
from trainings import losses, train, with_dropout
from transformers import TrainerCallback
from transformers_nextflow import NextFlowForConditionalGeneration
from transformers_nextflow.data.loading import PackReader
from transformers_nextflow.data.shards import open_shards, sequence_spec
from transformers_nextflow.training import EMACallback, NextFlowTrainer

packs, output = map(Path, sys.argv[1:3])
steps, save_steps, last = map(int, sys.argv[3:])


def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)


class Killed(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == last:
            die()


def run(folder, callbacks=(), resume=None):
    folder_of_packs, manifest = open_shards(packs, "packs")
    dataset = PackReader(folder_of_packs, manifest, sequence_spec(manifest["identity"]))
    model = with_dropout(NextFlowForConditionalGeneration.from_pretrained(output / "model"))
    dataset.padded, dataset.config = False, model.config
    arguments = {"max_steps": steps, "gradient_accumulation_steps": 2, "save_strategy": "steps"}
    arguments |= {"save_steps": save_steps, "save_total_limit": 2}
    trainer = train(model, dataset, folder, resume, [EMACallback(0.9), *callbacks], **arguments)
    (folder / "losses.json").write_text(json.dumps(losses(trainer)))


def killed_while_saving():
    NextFlowTrainer._save_rng_state = die  # after weights and optimizer
    run(output / "killed", resume=True)


def in_a_process(function, *args):
    sys.stdout.flush()
    if (child := os.fork()) == 0:
        function(*args)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


assert in_a_process(run, output / "whole") == 0
assert in_a_process(run, output / "killed", [Killed()]) == -signal.SIGKILL
assert in_a_process(killed_while_saving) == -signal.SIGKILL
shutil.copytree(output / "killed", output / "left")
assert in_a_process(run, output / "killed", [], True) == 0
"""


@pytest.mark.parametrize("averaged", [False, True])
def test_a_checkpoint_that_takes_anothers_place_is_whole_when_all_of_it_is_there(
    averaged, dataset, data_model, tmp_path, monkeypatch
):
    """Killed before it is, there is the one before them, not weights of this and an optimizer of that training."""
    run = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    callbacks = [EMACallback(0.5)] if averaged else []
    train(copy.deepcopy(data_model), dataset, tmp_path, callbacks=callbacks, **run)
    first = str(tmp_path / "checkpoint-1")

    def die(*args, **kwargs):
        raise KeyboardInterrupt

    class Killed(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            die()

    monkeypatch.setattr(NextFlowTrainer, "_save_optimizer_and_scheduler", die)
    callbacks += [Killed()] * averaged  # as in an evaluation, which follows the average
    with pytest.raises(KeyboardInterrupt):
        train(copy.deepcopy(data_model), dataset, tmp_path, resume=first, callbacks=callbacks, **run)
    assert checkpoint_to_resume(True, str(tmp_path)) == first


def test_the_checkpoint_to_go_on_from_is_the_newest_whole_one(tmp_path):
    assert checkpoint_to_resume(None, str(tmp_path)) is None and checkpoint_to_resume(False, str(tmp_path)) is None
    with pytest.raises(ValueError, match="there is no whole checkpoint"):
        checkpoint_to_resume(True, str(tmp_path))
    for step, text in ((9, '{"global_step": 9}'), (10, '{"global_step": 10}'), (11, '{"global_st'), (12, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if text is not None:
            (folder / "trainer_state.json").write_text(text)
    (tmp_path / "checkpoint-old").mkdir()
    assert checkpoint_to_resume(True, str(tmp_path)) == str(tmp_path / "checkpoint-10")
    assert checkpoint_to_resume(str(tmp_path / "checkpoint-9"), str(tmp_path)) == str(tmp_path / "checkpoint-9")
    with pytest.raises(ValueError, match="checkpoint-12 is no whole checkpoint: it has no trainer_state.json"):
        checkpoint_to_resume(str(tmp_path / "checkpoint-12"), str(tmp_path))
    with pytest.raises(ValueError, match="checkpoint-11/trainer_state.json is no JSON file"):
        checkpoint_to_resume(str(tmp_path / "checkpoint-11"), str(tmp_path))


def test_a_checkpoint_with_a_damaged_file_is_none(tmp_path):
    """As a copy that was broken off leaves it."""
    for step in (1, 2):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        save_file({"a": torch.zeros(99)}, folder / "model.safetensors")
        torch.save({"a": torch.zeros(99)}, folder / "optimizer.pt")
        (folder / "trainer_state.json").write_text("{}")
    for name in ("model.safetensors", "optimizer.pt"):
        path = tmp_path / "checkpoint-2" / name
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        assert checkpoint_to_resume(True, str(tmp_path)) == str(tmp_path / "checkpoint-1")
        with pytest.raises(ValueError, match=f"checkpoint-2 is no whole checkpoint, {name} is damaged"):
            checkpoint_to_resume(str(tmp_path / "checkpoint-2"), str(tmp_path))
        path.write_bytes(whole)
    assert checkpoint_to_resume(True, str(tmp_path)) == str(tmp_path / "checkpoint-2")
