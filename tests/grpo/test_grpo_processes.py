"""A step is the same by one process, accumulated, and by two; what breaks that is seen."""

import os
import shutil
from pathlib import Path

import pytest
import sharded_policy
import torch
from grpo_samples import policy_of
from safetensors.torch import load_file
from two_processes import ACCUMULATED, AT_ONCE, BUGS, ONE, PICTURES, differences, train

from tests.fresh import run
from tests.ranks import launched

ROOT = Path(__file__).parents[2]
PATHS = [ROOT / "src", ROOT, ROOT / "tests", ROOT / "tests" / "grpo"]
PATH = os.pathsep.join(map(str, PATHS))


@pytest.fixture(scope="module")
def policy(tiny_model):
    policy = policy_of(tiny_model)
    with torch.no_grad():
        policy.lm_head.weight[policy.config.boi_token_id] *= 8  # texts of different lengths
    return policy


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def saved(policy, tiny_processor, folder) -> Path:
    policy.save_pretrained(folder / "policy")
    tiny_processor.save_pretrained(folder / "policy")
    return folder / "policy"


@pytest.fixture(scope="module")
def by_two(saved, folder) -> dict[str, dict]:
    """What two processes come to."""
    run(ROOT / "tests" / "grpo" / "two_processes.py", saved, folder, PYTHONPATH=PATH)
    return torch.load(folder / "results.pt")


@pytest.fixture(scope="module")
def by_two_with_bugs(saved, folder) -> dict[str, dict]:
    """By the bug that is planted."""
    run(ROOT / "tests" / "grpo" / "two_processes.py", saved, folder, "bugs", PYTHONPATH=PATH)
    return torch.load(folder / "bugs.pt")


@pytest.fixture(scope="module")
def by_fsdp2(saved, folder) -> dict:
    """What two processes come to that share weights."""
    environment = launched("fsdp2", "--mixed_precision", "no")[1] | {"PYTHONPATH": PATH}
    run(ROOT / "tests" / "grpo" / "sharded_policy.py", saved, folder, **environment)
    return torch.load(folder / "sharded.pt")


def test_two_processes_train_as_one(policy, tiny_processor, tmp_path, by_two):
    """Weights, every logged value, codes and advantages, over two generations."""
    whole, accumulated = (train(policy, tiny_processor, tmp_path, layout) for layout in (ONE, ACCUMULATED))
    assert len(whole["codes"]) == 2 and whole["advantages"][1].any()
    assert {"loss", "reward", "reward_std", "frac_reward_zero_std", "kl", "text/entropy"} <= whole["log"][0].keys()
    assert not differences(whole, accumulated)
    assert not differences(whole, by_two["both"])


def test_two_processes_train_pictures_alone_as_one(policy, tiny_processor, tmp_path, by_two):
    """Guided, by two forwards under checkpointing, which leave some parameters without a gradient."""
    assert not differences(train(policy, tiny_processor, tmp_path, ONE, **PICTURES), by_two["pictures"])


def test_two_processes_go_on_in_the_order_of_their_epoch(by_two):
    """Of prompts: one that begins anew knows no epoch but the first."""
    whole, again = by_two["epochs"], by_two["resumed"]
    assert [row["epoch"] for row in again["log"]] == [0.5, 1.0, 1.5, 2.0, 2.5]
    assert len(again["codes"]) == 2
    assert not differences(whole | {name: whole[name][3:] for name in ("codes", "advantages")}, again)


def test_a_reward_that_dies_on_one_process_ends_both_with_what_was_trained(
    policy, tiny_processor, tmp_path, by_two, folder
):
    """One process goes on to the same end."""
    assert by_two["fault"] == "a reward function is at fault on process 1"
    shutil.copytree(folder / "died", tmp_path / "died")
    again = train(policy, tiny_processor, tmp_path / "died", ACCUMULATED, resume=True)
    assert [row["step"] for row in again["log"]] == [1, 2, 3] and len(again["codes"]) == 1
    whole = by_two["both"]
    assert not differences(again, whole | {name: whole[name][1:] for name in ("codes", "advantages")})


@pytest.mark.slow
@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_sets_two_processes_apart(policy, tiny_processor, tmp_path, by_two_with_bugs, bug):
    """One that one process has too is compared with itself."""
    _, shows = BUGS[bug]
    assert shows <= differences(train(policy, tiny_processor, tmp_path, ONE, bug, **AT_ONCE), by_two_with_bugs[bug])


def test_a_reward_that_dies_where_weights_are_shared_ends_both(by_fsdp2, folder):
    """Before further pictures of its prefixes, and an evaluation's next prompt, for which both gather weights."""
    faults = by_fsdp2["faults"]
    assert faults == dict.fromkeys(sharded_policy.FAULTS, "a reward function is at fault on process 1")
    assert all([*(folder / name).glob("checkpoint-*")] for name in faults)  # what was trained until then


def test_two_processes_under_fsdp2_train_as_one(policy, tiny_processor, tmp_path, by_fsdp2, folder):
    """Rollouts, evaluations, reference, checkpoints and the result."""
    two, one = by_fsdp2, sharded_policy.train(policy, tiny_processor, tmp_path, ONE)
    assert two["sharded"] and not one["sharded"]
    for a, b in zip(one["log"], two["log"], strict=True):
        assert a == pytest.approx(b, rel=2e-3, abs=1e-5)
    assert {"eval_reward", "eval_loss"} <= one["log"][-1].keys() and one["log"][-2]["kl"] > 0
    for file in ("model.safetensors", "checkpoint-2/reference.safetensors"):
        expected, got = load_file(tmp_path / file), load_file(folder / "sharded" / file)
        assert expected.keys() == got.keys()
        assert all(torch.allclose(expected[name], got[name], rtol=1e-4, atol=1e-5) for name in expected)
