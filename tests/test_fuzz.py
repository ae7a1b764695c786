"""Mutated inputs end served or refused: no traceback from the depths, no hang, no memory over 4 GB."""

import json
import math

import pytest
import torch

from tests import fresh, fuzzing
from transformers_nextflow import ScaleSchedule, image_generation, prompts, sampling
from transformers_nextflow.data import documents


@pytest.mark.parametrize("inputs", [500, pytest.param(5000, marks=pytest.mark.slow)])
def test_mutated_inputs(inputs, tiny_checkpoint, tmp_path):
    """In a process of its own, whose memory is limited and measured."""
    output = tmp_path / "result.json"
    fresh.run("-m", "tests.fuzzing", tiny_checkpoint, "--inputs", inputs, "--output", output)
    result = json.loads(output.read_text())
    assert result["failures"] == [], json.dumps(result["failures"][:10], indent=1)
    assert result["inputs"] == inputs
    assert result["peak_bytes"] < 4e9
    for name, endings in result["targets"].items():
        assert endings["slowest"] < fuzzing.SECONDS
        refused = sum(count for ending, count in endings.items() if ending.startswith("refused"))
        assert endings.get("served", 0) > 0 and refused > 0, f"{name} reaches one ending alone: {endings}"


def accidents():
    empty = []
    yield lambda: empty[3]
    yield lambda: {}["a"]
    yield lambda: None.shape
    yield lambda: 1 / 0
    yield lambda: math.log(-1)
    yield lambda: int("a")
    yield lambda: json.loads("{")
    yield lambda: torch.zeros(2) + torch.zeros(3)
    yield lambda: sampling.check_seed()
    yield lambda: (_ for _ in ()).throw(ValueError("raised by a test, not by the package"))


@pytest.mark.parametrize("accident", list(accidents()))
def test_an_accident_is_no_refusal(accident):
    with pytest.raises(Exception) as caught:
        accident()
    assert not fuzzing.is_refusal(caught.value)


@pytest.mark.parametrize(
    "refused", [lambda: sampling.check_seed("a"), lambda: ScaleSchedule(()), lambda: open("nowhere")]
)
def test_a_refusal_is_one(refused):
    with pytest.raises((ValueError, OSError)) as caught:
        refused()
    assert fuzzing.is_refusal(caught.value)


@pytest.mark.parametrize(
    ("module", "name", "fault", "target"),
    [
        (documents, "_string", lambda cell: cell, fuzzing.document),
        (prompts, "check_prompt", lambda *args: None, fuzzing.request),
        (image_generation, "integer", lambda name, value, *limits: value, fuzzing.request),
    ],
)
def test_planted_faults_are_found(tiny_checkpoint, monkeypatch, module, name, fault, target):
    monkeypatch.setattr(module, name, fault)
    with fuzzing.quiet_world(tiny_checkpoint) as world:
        assert any(fuzzing.run(world, target, range(number, number + 1), seed=0)[1] for number in range(400))


def test_a_hang_is_found(tiny_checkpoint, monkeypatch):
    def hang(world, rng):
        while True:
            pass

    monkeypatch.setattr(fuzzing, "SECONDS", 0.05)
    with fuzzing.quiet_world(tiny_checkpoint) as world:
        _, (failure,), _ = fuzzing.run(world, hang, range(1), seed=0)
    assert failure["error"].startswith("TooSlow")
