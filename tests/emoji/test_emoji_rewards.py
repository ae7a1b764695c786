"""The margin of the judge's metric, and the prompts of GRPO."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

from examples.emoji import rewards
from examples.emoji.judge import Judge, features
from examples.emoji.rewards import margin, margins, prompts
from examples.emoji.tasks import Tasks


@pytest.fixture(scope="module")
def judge(small_world) -> Judge:
    return Judge(small_world)


def test_the_picture_asked_for_has_the_margin_one(judge):
    rows = list(range(len(judge.world)))
    assert margins(judge, judge.world.pictures, rows).tolist() == [1.0] * len(rows)


def test_another_picture_has_the_margin_minus_one(judge):
    rows = list(range(1, len(judge.world)))
    assert margins(judge, judge.world.pictures[:-1], rows).tolist() == [-1.0] * len(rows)


def test_the_margin_is_the_difference_of_distances_by_their_sum(judge):
    rng = np.random.default_rng(0)
    drawings = rng.integers(0, 256, (6, 64, 64, 3), dtype=np.uint8)
    targets = rng.integers(0, len(judge.world), 6)
    all_features = features(judge.world.pictures)
    for drawing, target, value in zip(drawings, targets, margins(judge, drawings, targets)):
        distances = np.linalg.norm(features([drawing]) - all_features, axis=1)
        other = np.delete(distances, target).min()
        assert value == pytest.approx((other - distances[target]) / (other + distances[target]), rel=1e-4)
        assert (value > 0) == bool(judge.right([drawing], [target])["picture"][0])


def test_an_equal_picture_is_not_another(small_world, monkeypatch):
    twins = small_world.twins.copy()
    twins[3] = 0
    pictures = small_world.pictures.copy()
    pictures[3] = pictures[0]
    monkeypatch.setattr(small_world, "twins", twins)
    monkeypatch.setattr(small_world, "pictures", pictures)
    judge = Judge(small_world)
    assert margins(judge, pictures[[0, 0]], [0, 3]).tolist() == [1.0, 1.0]


def test_prompts_ask_for_seen_pictures_and_the_reward_reads_them(small_world, small_world_folder):
    folder = str(small_world_folder)
    rows = list(prompts(Tasks.of(small_world), folder, 20, seed=1))
    assert rows == list(prompts(Tasks.of(small_world), folder, 20, seed=1))
    assert rows != list(prompts(Tasks.of(small_world), folder, 20, seed=2))
    for row in rows:
        (message,) = row["prompt"]
        assert small_world.names[row["target"]] in message["content"]
        assert small_world.styles[row["target"]] in message["content"]
        assert small_world.splits[row["target"]] == "train"
    columns = {name: [row[name] for row in rows] for name in ("prompt", "target", "world")}
    images = [Image.fromarray(small_world.pictures[row["target"]]) for row in rows]
    assert margin(images=images, completions=[None] * 20, **columns) == [1.0] * 20
    assert margin(images=images[::-1], **columns) != [1.0] * 20


def test_the_command_writes_a_dataset_of_prompts(small_world_folder, tmp_path, monkeypatch):
    import datasets

    given = ["rewards", "--data", str(small_world_folder), "--output", str(tmp_path / "prompts"), "--count", "5"]
    monkeypatch.setattr(sys, "argv", given)
    rewards.main()
    lines = (tmp_path / "prompts" / "train.jsonl").read_text().splitlines()
    loaded = datasets.load_dataset(str(tmp_path / "prompts"), split="train", cache_dir=str(tmp_path / "cache"))
    assert [json.loads(line) for line in lines] == list(loaded)
    assert len(lines) == 5
