"""The paper's claims: intervals and verdicts, resuming, held-out losses, the heads' loss."""

import argparse
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.harness import interval
from benchmarks.paper import arms
from benchmarks.paper.arms import Claim, HeldOut, compare, run_arms, summary
from benchmarks.paper.heads import separate_cross_entropy, separate_heads
from tests.tiny_models import BOI, IMAGE, SQUARE, WIDE, Picture, batch_of, tiny_model
from transformers_nextflow.layout import find_images, shift_labels_of
from transformers_nextflow.losses import IGNORE


def claim(sign: str | None) -> Claim:
    return Claim("one is below the other", "fig. 0", "one", "other", "vision", sign)


def runs_of(**values: list[float]) -> dict:
    """Seeds in another order for each arm."""
    return {
        arm: {
            seed: {"final": {"vision": value}} for seed, value in list(enumerate(rows))[:: 1 if arm == "one" else -1]
        }
        for arm, rows in values.items()
    }


def test_interval_is_students():
    row = interval([1.0, 2.0, 3.0])
    assert row["mean"] == 2.0
    assert row["half_interval"] == pytest.approx(4.302653 / 3**0.5, abs=1e-4)  # 97.5% of t with 2 degrees of freedom
    assert interval([1.0])["half_interval"] is None


@pytest.mark.parametrize(
    "differences, sign, expected",
    [
        ([0.10, 0.11, 0.12], "+", "agree"),
        ([0.10, 0.11, 0.12], "-", "disagree"),
        ([0.10, 0.11, 0.12], "0 or -", "disagree"),
        ([-0.10, -0.11, -0.12], "+", "disagree"),
        ([-0.10, -0.11, -0.12], "-", "agree"),
        ([-0.10, -0.11, -0.12], "0 or -", "agree"),
        ([-0.10, 0.11, 0.12], "+", "the interval holds 0"),
        ([0.0, 0.0, 0.0], "0 or -", "the interval holds 0"),
        ([0.10], "+", "one seed has no interval"),
        ([0.10, 0.11, 0.12], None, "no claim of the paper's"),
    ],
)
def test_verdict_is_of_differences_seed_by_seed(differences, sign, expected):
    seeds = [3.0, 30.0, 300.0][: len(differences)]  # seeds differ far more than arms
    runs = runs_of(one=[seed + difference for seed, difference in zip(seeds, differences)], other=seeds)
    result = compare(claim(sign), runs)
    assert result["verdict"] == expected
    assert result["ours"]["seeds"] == pytest.approx(differences)
    assert result["paper"] == {"says": "one is below the other", "where": "fig. 0", "sign": sign}


def test_a_claim_has_one_of_the_signs():
    with pytest.raises(ValueError, match="sign must be one of"):
        claim("lower")


def test_summary_keeps_curves_of_the_difference():
    runs = runs_of(one=[1.0, 2.0], other=[3.0, 5.0])
    for arm in ("one", "other"):
        for run in runs[arm].values():
            end = run["final"]["vision"]
            run["curve"] = [{"step": 1, "vision": 2 * end}, {"step": 2, "vision": end}]
    result = summary([claim("-")], runs)
    assert {arm: row["vision"]["mean"] for arm, row in result["arms"].items()} == {"one": 1.5, "other": 4.0}
    first, last = result["claims"][0]["along_the_way"]
    assert first["means"] == [3.0, 8.0] and first["difference"]["mean"] == -5.0
    assert (last["step"], last["difference"]["mean"]) == (2, -2.5)
    assert last["difference"]["half_interval"] == result["claims"][0]["ours"]["half_interval"]


def test_a_measure_that_is_a_difference_is_compared_with_nothing():
    result = compare(Claim("it gains", "fig. 0", "one", None, "vision", "+"), runs_of(one=[1.0, 1.1, 1.2]))
    assert result["verdict"] == "agree" and result["ours"]["mean"] == pytest.approx(1.1)


def options_of(folder: Path, **values) -> argparse.Namespace:
    return argparse.Namespace(**{"folder": folder, "output": None, "json": False, "seeds": 2, "steps": 5} | values)


def test_finished_arms_are_not_run_again(tmp_path, monkeypatch):
    monkeypatch.setattr(arms, "in_processes", lambda function, jobs: ((job, function(*job)) for job in jobs))
    done = []

    def train(folder, arm, seed, options):
        if (arm, seed) == broken:
            raise RuntimeError("stopped")
        done.append((arm, seed))
        return {"cpu_seconds": 0.0, "final": {"vision": float(len(done))}}

    broken, options = ("b", 2), options_of(tmp_path)
    with pytest.raises(RuntimeError, match="stopped"):
        run_arms(tmp_path, train, ("a", "b"), options)
    assert sorted(done) == [("a", 1), ("a", 2), ("b", 1)]
    broken = None
    runs = run_arms(tmp_path, train, ("a", "b"), options)
    assert len(done) == 4 and done[-1] == ("b", 2)
    again = run_arms(tmp_path, train, ("a", "b"), options_of(tmp_path, seeds=3))
    assert len(done) == 6 and {arm: {seed: rows[seed] for seed in (1, 2)} for arm, rows in again.items()} == runs


def test_finished_arms_are_of_one_setting(tmp_path, monkeypatch):
    monkeypatch.setattr(arms, "in_processes", lambda function, jobs: ((job, function(*job)) for job in jobs))
    for folder in ("run/start", "run/data"):
        (tmp_path / folder).mkdir(parents=True)
    done = []

    def conduct(*more: str) -> None:
        given = ["claim", str(tmp_path / "run"), "--folder", str(tmp_path), "--output", str(tmp_path / "out.json")]
        monkeypatch.setattr("sys.argv", [*given, *more])
        arms.conduct("name", "text", [claim("-")], ("one", "other"), train)

    def train(folder, arm, seed, options):
        done.append((arm, seed, options.steps))
        return {"cpu_seconds": 1.0, "final": {"vision": 1.0 if arm == "one" else 2.0 + seed / 100}}

    conduct("--seeds", "2")
    conduct("--seeds", "3")
    assert len(done) == 6
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["claims"][0]["verdict"] == "agree"
    assert result["cpu_seconds"] == {"one": [1.0] * 3, "other": [1.0] * 3}
    with pytest.raises(ValueError, match="another steps"):
        conduct("--steps", "6")
    with pytest.raises(SystemExit):
        arms.conduct("name", "text", [claim("-")], ("one", "other"), train, needs=("joint",))


def batch(model, *row) -> dict:
    inputs = batch_of(model, row)
    del inputs["attention_mask"]
    images = find_images(model.config, inputs["input_ids"], inputs.get("image_grid_hw"))
    return inputs | {
        "document_ids": torch.zeros_like(inputs["input_ids"]),
        "shift_labels": shift_labels_of(inputs["input_ids"], images, BOI),
    }


@pytest.mark.filterwarnings("ignore:.*bicubic")
def test_held_out_losses_pool_the_targets_of_all_batches(monkeypatch):
    monkeypatch.setattr(arms, "COARSE_SCALES", 2)
    model = tiny_model()
    batches = [batch(model, 1, 2, Picture(SQUARE)), batch(model, 3, Picture(WIDE, 1), 4, 5, Picture(WIDE, 2), 6)]
    losses = HeldOut({}).losses(model, batches)
    by_scale: dict[int, list[torch.Tensor]] = {}
    for inputs in batches:
        with torch.no_grad():
            token_losses = model(**inputs, use_cache=False).token_losses.double()
        vision = (inputs["input_ids"] == BOI) | (inputs["input_ids"] == IMAGE)
        text = ~vision & (inputs["shift_labels"] != IGNORE)
        by_scale.setdefault(0, []).append(token_losses[text])
        lengths = [1, 4, 9] if len(inputs["image_grid_hw"]) == 1 else [1, 2, 8, 1, 2, 8]
        for place, part in enumerate(token_losses[vision].split(lengths)):
            by_scale.setdefault(1 + place % 3, []).append(part)
    pooled = {scale: torch.cat(parts) for scale, parts in by_scale.items()}
    coarse = torch.cat([pooled[1], pooled[2]])
    expected = {"text": pooled[0], "vision": torch.cat([coarse, pooled[3]]), "coarse": coarse, "fine": pooled[3]}
    assert losses == pytest.approx({name: float(values.mean()) for name, values in expected.items()})


def test_separate_heads_are_two_cross_entropies():
    generator = torch.Generator().manual_seed(0)
    hidden, text_rows, code_rows = (torch.randn(n, 6, generator=generator, requires_grad=True) for n in (7, 5, 9))
    heads = [nn.Linear(6, len(rows), bias=False) for rows in (text_rows, code_rows)]
    for head, rows in zip(heads, (text_rows, code_rows)):
        head.weight.data.copy_(rows)
    targets = torch.tensor([4, 5, IGNORE, 0, 13, 9, 2])
    weights = torch.rand(7, generator=generator)
    total, losses = separate_cross_entropy(hidden, heads, 14, targets, weights)
    text = F.cross_entropy((hidden @ text_rows.T)[[0, 3, 6]], targets[[0, 3, 6]], reduction="none")
    codes = F.cross_entropy((hidden @ code_rows.T)[[1, 4, 5]], targets[[1, 4, 5]] - 5, reduction="none")
    expected = torch.zeros(7).index_copy(0, torch.tensor([0, 3, 6, 1, 4, 5]), torch.cat([text, codes]))
    torch.testing.assert_close(losses, expected.detach())
    torch.testing.assert_close(total, (expected * weights).sum())
    for ours, theirs in zip(
        torch.autograd.grad(total, (hidden, *(head.weight for head in heads))),
        torch.autograd.grad((expected * weights).sum(), (hidden, text_rows, code_rows)),
    ):
        torch.testing.assert_close(ours, theirs)


def test_separate_heads_end_with_their_block():
    model = tiny_model()
    inputs = batch(model, 1, 2, Picture(SQUARE), 3)
    joint = model(**inputs).token_losses
    with pytest.raises(RuntimeError), separate_heads():
        separate = model(**inputs).token_losses
        raise RuntimeError
    at = inputs["shift_labels"] != IGNORE
    assert (separate[at] < joint[at]).all()
    assert torch.equal(model(**inputs).token_losses, joint)
