"""The benchmark of GRPO around its arms: which run, what they are given, what is made of their results."""

import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from benchmarks import grpo
from benchmarks.grpo_figures import smooth
from transformers_nextflow.training.grpo import NextFlowGRPOConfig

SCORES = {"prefix": 0.6, "vanilla": 0.5, "shuffled": 0.41, "supervised": 0.45}
SWEEP = dict.fromkeys(grpo.RECIPES, 0.3) | {"adapters": 0.4}


def scores(value: float) -> dict:
    return {"overall": value} | dict.fromkeys(grpo.CATEGORIES, value)


@pytest.fixture
def jobs(monkeypatch) -> list[tuple]:
    """Arms that are not trained; what was asked for."""
    asked = []
    picture = Image.new("RGB", (64 * 12, 64))

    def judged(value: float) -> dict:
        return {"sampler": "guided-cool", "dev": {"guided-cool": scores(value)}, "test": scores(value)}

    def before(name, part, options):
        asked.append((name, part))
        return grpo.finish(grpo.path_of(options, name, part), judged(0.4), picture)

    def trial(name, recipe, before, options):
        asked.append((name, recipe))
        return grpo.finish(grpo.path_of(options, name, recipe), {"seconds": 9, "dev": SWEEP[recipe]})

    def arm(name, seed, recipe, before, options, seconds=None):
        asked.append((name, seed, recipe, seconds))
        found = SCORES[name] + seed / 100
        result = {"seconds": 100 + seed, "steps": 9} | judged(found)
        if name == "vanilla":
            result["at_equal_seconds"] = judged(0.45 + seed / 100)
        result |= {
            "held_out": [{"step": 9, "seconds": 100 + seed, "dev": found}],
            "gradient_norms": [{"by_scale": [0.1, seed]}],
        }
        rewards = [{"step": step, "seconds": step, "reward": 0.1 * step} for step in range(1, 9)]
        result["rewards"] = [] if name == "supervised" else rewards
        return grpo.finish(grpo.path_of(options, name, seed), result, picture)

    monkeypatch.setattr(grpo, "run_before", before)
    monkeypatch.setattr(grpo, "run_trial", trial)
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
    assert result["sweep"] == {"chosen": "adapters", "recipe": grpo.RECIPES["adapters"], "dev": SWEEP}
    assert [job for job in jobs if len(job) == 2] == [("before", 0), *(("sweep", name) for name in grpo.RECIPES)]
    arms = [job for job in jobs if len(job) == 4]
    assert len(arms) == 8 and all(recipe == "adapters" for _, _, recipe, _ in arms)
    # the arms of equal seconds get those of `prefix` with their seed
    assert all(seconds == (None if name in ("prefix", "shuffled") else 100 + seed) for name, seed, _, seconds in arms)
    assert result["gain"]["prefix"]["mean"] == pytest.approx(0.215)
    against = result["prefix against vanilla"]
    assert against["at equal rollouts"]["mean"] == pytest.approx(0.1)
    assert against["at equal seconds"]["mean"] == pytest.approx(0.15)
    assert result["mean gradient norm by scale"]["vanilla"] == [0.1, 1.5]
    assert result["goals"] == {"prefix rises by 0.10": True, "shuffled stays within 0.05": True}
    assert result["prompts"]["test"] == 18 and result["prompts"]["test and training"] == 0
    for name in ("curves", "pictures"):
        assert Image.open(tmp_path / f"grpo_{name}.png").size[0] > 500

    jobs.clear()
    for name in ("vanilla-2", "sweep-full"):
        (tmp_path / "arms" / f"{name}.json").unlink()
    grpo.main(options)
    assert jobs == [("sweep", "full"), ("vanilla", 2, "adapters", 102)]
    assert json.loads(capsys.readouterr().out) == result
    with pytest.raises(ValueError, match="was begun with another steps"):
        grpo.main([*options, "--steps", "7"])
    with pytest.raises(ValueError, match="was begun with another recipe"):
        grpo.main([*options, "--recipe", "full"])


def test_a_recipe_by_name_needs_no_sweep(jobs, tmp_path, capsys):
    options = ["model", "packs", "--folder", str(tmp_path / "arms"), "--output", str(tmp_path / "grpo.json")]
    grpo.main([*options, "--seeds", "1", "--prompts", "3", "--recipe", "full", "--json"])
    assert json.loads(capsys.readouterr().out)["sweep"]["dev"] is None
    assert [job[0] for job in jobs] == ["before", "prefix", "shuffled", "vanilla", "supervised"]
    assert {job[2] for job in jobs[1:]} == {"full"}


def test_prompts_come_from_what_the_checkpoint_gets_wrong():
    dev = {"overall": 0.5} | dict.fromkeys(grpo.CATEGORIES, 1.0) | {"position": 0.28, "two_objects": 0.75}
    drawn = grpo.categories_by_need({"sampler": "guided", "dev": {"guided": dev}})
    assert {name: drawn.count(name) for name in grpo.CATEGORIES} == dict.fromkeys(grpo.CATEGORIES, 1) | {
        "position": 8,
        "two_objects": 3,
    }


@pytest.mark.parametrize("recipe", grpo.RECIPES)
def test_every_recipe_is_one_that_the_trainer_takes(tmp_path, recipe):
    NextFlowGRPOConfig(str(tmp_path), use_cpu=True, report_to="none", **grpo.RECIPES[recipe])


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
