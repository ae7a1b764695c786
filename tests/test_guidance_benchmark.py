"""The benchmark of guidance at a tiny size: every row draws the same prompts with its own controls."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import guidance
from examples.shapes import evaluate
from transformers_nextflow import NextFlowForConditionalGeneration

ROOT = Path(__file__).parents[1]


@pytest.fixture
def calls(monkeypatch) -> list[dict]:
    """What `generate` is asked for; of prompts and edits one kind each."""
    monkeypatch.setattr(evaluate, "CATEGORIES", evaluate.CATEGORIES[:1])
    monkeypatch.setattr(evaluate, "EDITS", evaluate.EDITS[:1])
    seen, generate = [], NextFlowForConditionalGeneration.generate
    monkeypatch.setattr(
        NextFlowForConditionalGeneration,
        "generate",
        lambda self, **kwargs: seen.append(kwargs) or generate(self, **kwargs),
    )
    return seen


def test_rows_differ_in_their_controls_alone(calls, tiny_checkpoint, tmp_path, capsys):
    output = tmp_path / "guidance.json"
    guidance.main(
        ["--model", str(tiny_checkpoint), "--prompts", "1", "--pictures", "1", "--json", "--output", str(output)]
    )
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads(output.read_text()) and result["split"] == "dev"
    firsts = {}
    for name, controls in guidance.new_rows(3).items():
        row = result["rows"][name]
        for task in guidance.tasks_of(controls):
            call = calls.pop(0)
            assert {control: call[control] for control in controls} == controls
            first = firsts.setdefault(task, call)
            assert torch.equal(call["input_ids"], first["input_ids"]) and call["seed"] == first["seed"]
            assert (set(call) ^ set(first)) <= set(controls)
            scores = row.pop(task)
            assert 0 <= scores["low"] <= scores["score"] <= scores["high"] <= 1 and scores["n"] == 1
            assert scores["cpu_seconds_per_picture"] > 0
        assert set(row) == set(controls)
    assert calls == []
    scales = {name: row["guidance_scale"] for name, row in result["rows"].items() if "guidance_scale" in row}
    assert scales["text guidance 0 to 3"] == [0.0, 1.5, 3.0]
    assert scales["text guidance 3, first half of the scales"] == [3.0, 1.0, 1.0]
    assert scales["text guidance 3, second half of the scales"] == [1.0, 3.0, 3.0]


def test_the_committed_figures_are_of_these_rows_and_the_readmes():
    result = json.loads((ROOT / "benchmarks" / "results" / "guidance.json").read_text())
    config = json.loads((ROOT / "checkpoints" / "nextflow-shapes" / "config.json").read_text())
    num_scales = len(config["image_generation"]["guidance_scale"])
    assert set(result["rows"]) == set(guidance.new_rows(num_scales))
    assert result["checkpoint"] == config["image_generation"]
    readme = " ".join((ROOT / "README.md").read_text().split())
    own, constant, none = (
        "{:.2f} and {:.2f}".format(*(result["rows"][name][task]["score"] for task in ("text_to_image", "edit")))
        for name in ("the checkpoint's own", "text guidance 3", "text guidance 1")
    )
    assert f"it gets {own} right, a constant 3 {constant}, no guidance (1.0) {none};" in readme
