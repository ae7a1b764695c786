"""The benchmark of GRPO around its arms: which run, what they are given, what is made of their results."""

import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from benchmarks import grpo
from benchmarks.grpo_figures import smooth

SCORES = {"prefix": 0.6, "vanilla": 0.5, "shuffled": 0.41, "supervised": 0.45}
DEV = {"guided": 0.3, "guided-cool": 0.4, "by-scale": 0.35}


@pytest.fixture
def jobs(monkeypatch) -> list[tuple]:
    """Arms that are not trained; what was asked for."""
    asked = []
    picture = Image.new("RGB", (64 * 12, 64))

    def before(sampler, split, options):
        asked.append((sampler, split))
        found = DEV[sampler] if split == "dev" else 0.4
        return grpo.finish(grpo.path_of(options, sampler, split), {"overall": found, "colors": found}, picture)

    def arm(name, seed, sampling, options, seconds=None):
        asked.append((name, seed, sampling["temperature"], seconds))
        found = SCORES[name] + seed / 100
        result = {"seconds": 100 + seed, "steps": 9, "score": {"overall": found, "colors": found}}
        if name == "vanilla":
            result["at_equal_seconds"] = {"overall": 0.45 + seed / 100}
        result |= {"held_out": [{"step": 9, "seconds": 100 + seed, "dev": found}], "gradient_norms": []}
        rewards = [{"step": step, "seconds": step, "reward": 0.1 * step} for step in range(1, 9)]
        result["rewards"] = [] if name == "supervised" else rewards
        return grpo.finish(grpo.path_of(options, name, seed), result, picture)

    monkeypatch.setattr(grpo, "run_before", before)
    monkeypatch.setattr(grpo, "run_arm", arm)
    monkeypatch.setattr(grpo, "in_processes", lambda function, jobs: ((job, function(*job)) for job in jobs))
    monkeypatch.setattr(grpo, "NUM_PROMPTS", 50)
    return asked


def test_a_run_ends_with_figures_and_goes_on_where_it_was_killed(jobs, tmp_path, capsys):
    options = ["model", "packs", "--folder", str(tmp_path / "arms"), "--output", str(tmp_path / "grpo.json")]
    options += ["--seeds", "2", "--prompts", "3", "--json"]
    grpo.main(options)
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((tmp_path / "grpo.json").read_text())
    assert result["sampler"] == {"chosen": "guided-cool", "dev": DEV}
    assert [job for job in jobs if len(job) == 2] == [(name, "dev") for name in DEV] + [("guided-cool", "test")]
    arms = [job for job in jobs if len(job) == 4]
    assert len(arms) == 8 and all(temperature == 0.6 for _, _, temperature, _ in arms)
    # the arms of equal seconds get those of `prefix` with their seed
    assert all(seconds == (None if name in ("prefix", "shuffled") else 100 + seed) for name, seed, _, seconds in arms)
    assert result["gain"]["prefix"]["mean"] == pytest.approx(0.215)
    against = result["prefix against vanilla"]
    assert against["at equal rollouts"]["mean"] == pytest.approx(0.1)
    assert against["at equal seconds"]["mean"] == pytest.approx(0.15)
    assert result["goals"] == {"prefix rises by 0.10": True, "shuffled stays within 0.05": True}
    assert result["prompts"]["test"] == 18 and result["prompts"]["test and training"] == 0
    for name in ("curves", "pictures"):
        assert Image.open(tmp_path / f"grpo_{name}.png").size[0] > 500

    jobs.clear()
    (tmp_path / "arms" / "vanilla-2.json").unlink()
    grpo.main(options)
    assert jobs == [("vanilla", 2, 0.6, 102)] and json.loads(capsys.readouterr().out) == result
    with pytest.raises(ValueError, match="was begun with another steps"):
        grpo.main([*options, "--steps", "7"])


def test_shuffled_rewards_are_the_judges_in_another_order(monkeypatch):
    monkeypatch.setattr(grpo, "shapes_judge", lambda **kwargs: [float(number) for number in range(32)])
    dealt = [grpo.Shuffled(seed)() for seed in (1, 1, 2)]
    assert dealt[0] == dealt[1] != dealt[2] and sorted(dealt[0]) == sorted(dealt[2]) != dealt[0]


def test_the_clock_stands_still_while_it_measures(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(grpo.time, "process_time", lambda: now[0])

    def measured(seconds, result):
        def take():
            now[0] += seconds
            return result

        return take

    watch = grpo.Watch("arm", measured(50.0, 0.5), measured(70.0, {"overall": 0.6}), limit=None, at_seconds=12.0)
    watch.trainer = SimpleNamespace(model=torch.nn.Linear(1, 1))
    monkeypatch.setattr(grpo, "gradient_norms", lambda trainer: measured(30.0, [1.0])())
    watch.on_train_begin(None, None, None)
    control = SimpleNamespace(should_training_stop=False)
    for step in range(1, 9):
        now[0] += 5.0
        watch.on_step_end(None, SimpleNamespace(global_step=step, max_steps=8), control)
    assert watch.seconds == 40.0 and not control.should_training_stop
    assert watch.on_the_way == {"step": 3, "seconds": 15.0, "overall": 0.6}
    assert [row["step"] for row in watch.held_out] == [2, 4, 6, 8]
    assert [row["seconds"] for row in watch.norms] == [10.0, 20.0, 30.0, 40.0]

    watch = grpo.Watch("supervised", measured(50.0, 0.5), None, limit=20.0, at_seconds=float("inf"))
    watch.trainer = SimpleNamespace(model=torch.nn.Linear(1, 1))
    watch.on_train_begin(None, None, None)
    for step in range(1, 5):
        assert not control.should_training_stop
        now[0] += 5.0
        watch.on_step_end(None, SimpleNamespace(global_step=step, max_steps=10**6), control)
    assert control.should_training_stop and len(watch.held_out) == 4


def test_curves_are_smoothed_over_what_came_before():
    assert smooth([(1, 0.0), (2, 1.0), (3, 2.0)], 2) == [(1, 0.0), (2, 0.5), (3, 1.5)]
