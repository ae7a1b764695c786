"""The benchmark of decoding on a GPU at a tiny size: that it runs, refuses, and compares equal pictures."""

import json

import pytest
import torch

from benchmarks import gpu_decode
from benchmarks.decode import new_model


@pytest.fixture(scope="module")
def drawing():
    return gpu_decode.Drawing(new_model(64, 1, torch.float32, torch.device("cpu")), "256")


def test_the_check_runs_everything_and_prints_no_figure(capsys, tmp_path, monkeypatch):
    def once(jobs: dict, *_) -> dict[str, list[float]]:
        for job in jobs.values():
            job()
        return {name: [1.0] for name in jobs}

    monkeypatch.setattr(gpu_decode, "interleaved_seconds", once)
    with torch.compiler.set_stance("force_eager"):
        gpu_decode.main(["--tiny", "--json", "--output", str(tmp_path / "check.json")])
    printed = capsys.readouterr().out
    check = json.loads(printed)
    assert check == json.loads((tmp_path / "check.json").read_text())
    assert check["check"].startswith("tiny model")
    names = check.pop("would_measure")
    assert {"seconds_per_picture", "parts", "seconds_without", "peak_gigabytes"} <= names.keys()
    assert "vision decoder" in names["parts"] and len(names["seconds_without"]) == 3

    def leaves(tree):
        return [leaf for value in tree.values() for leaf in (leaves(value) if isinstance(value, dict) else [value])]

    assert set(leaves(names)) == {"measured"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_are_no_figures(capsys):
    with pytest.raises(SystemExit, match="2"):
        gpu_decode.main(["--json"])
    captured = capsys.readouterr()
    assert captured.out == "" and "there is no GPU" in captured.err


@pytest.mark.slow
def test_what_is_taken_away_changes_no_picture(drawing):
    """Otherwise seconds would be compared of different work."""
    expected = drawing.tokens()
    contexts = gpu_decode.without(drawing.model)
    for name, context in contexts.items():
        with context():
            assert (drawing.tokens() == expected).float().mean() > 0.99, name
    with gpu_decode.compiled(drawing.model, "eager"):
        assert (drawing.tokens() == expected).float().mean() > 0.99
    assert torch.equal(drawing.tokens(), expected), "everything is put back"


def test_parts_cover_a_picture(drawing):
    parts = drawing.parts()
    assert all(seconds > 0 for seconds in parts.values())


def test_goals_that_were_not_measured_are_not_met():
    result = {"seconds_per_picture": 0.7, "peak_gigabytes": {"bfloat16": 25.0, "4 bits": None}}
    met = [goal["met"] for goal in gpu_decode.goals(result).values()]
    assert met == [True, False, None]
