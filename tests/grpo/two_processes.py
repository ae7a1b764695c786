"""One training in several layouts, and bugs of layouts planted: `two_processes.py POLICY FOLDER` writes what
two processes come to, and with `PICTURES` alone, and where one's reward dies; with `bugs` after it, also with them."""

import os
import sys
from pathlib import Path

import pytest
import torch
from test_grpo_trainer import redness, state, trainer

from tests.ranks import on_ranks
from transformers_nextflow import NextFlowForConditionalGeneration, NextFlowProcessor
from transformers_nextflow.training.grpo import NextFlowGRPOTrainer, RewardError, metrics
from transformers_nextflow.training.grpo import trainer as module

ROWS, GROUP = 6, 4  # of a process, of a prompt: of three groups the second is on both processes
SETTINGS = {
    "num_generations": GROUP,
    "optimize": "both",
    "max_completion_length": 8,
    "scale_rewards": "batch",
    "beta": 0.1,
    "num_iterations": 2,
    "max_steps": 3,  # of two generations
    "learning_rate": 1e-3,
}
PICTURES = {"optimize": "image", "logprob_mode": "behaviour", "guidance_scale": 2.0, "gradient_checkpointing": True}
EPOCHS = {"optimize": "image", "num_iterations": 1, "max_steps": 5}  # of two steps
AT_ONCE = {"max_steps": 1}  # a bug shows
ONE = {"per_device_train_batch_size": 2 * ROWS}
ACCUMULATED = {"per_device_train_batch_size": ROWS, "gradient_accumulation_steps": 2}
TWO = {"per_device_train_batch_size": ROWS, "ddp_backend": "gloo"}
TIMES = ("step_time", "rollout_share")


def train(policy, processor, folder: Path, layout: dict, bug: str | None = None, resume=None, **values) -> dict:
    """Weights, log, and every generation's codes and advantages."""
    generations = []
    with pytest.MonkeyPatch.context() as patch:
        if bug is not None:
            BUGS[bug][0](patch)
        run = trainer(policy, processor, folder, **SETTINGS | layout | values)
        generate = run._generate
        run._generate = lambda rows: generations.append(generate(rows)) or generations[-1]
        run.train(resume)
    gather = lambda name: [run.accelerator.gather(getattr(each, name)) for each in generations]  # noqa: E731
    return {
        "weights": state(run.model),
        "log": [{k: row[k] for k in row if k not in TIMES} for row in run.state.log_history if "loss" in row],
        "codes": gather("codes"),
        "advantages": gather("advantages"),
    }


def differences(one: dict, two: dict) -> set[str]:
    """What differs by more than rounding: weights, codes, advantages, or logged values by their names."""
    close = lambda a, b: torch.allclose(a, b, rtol=1e-4, atol=1e-5)  # noqa: E731
    found = {name for name in ("codes", "advantages") if not all(map(close, one[name], two[name]))}
    if not all(close(value, two["weights"][name]) for name, value in one["weights"].items()):
        found.add("weights")
    assert len(one["log"]) == len(two["log"])
    for a, b in zip(one["log"], two["log"]):
        assert a.keys() == b.keys(), a.keys() ^ b.keys()
        found |= {name for name in a if a[name] != pytest.approx(b[name], rel=1e-3, abs=1e-4)}
    return found


def place() -> tuple[int, int]:
    """This process's rank, and of how many."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def own(values: torch.Tensor) -> torch.Tensor:
    """This process's rows, the others' without reward."""
    mask = torch.full_like(values, torch.nan)
    rank, world = place()
    mask[rank * len(values) // world : (rank + 1) * len(values) // world] = 0.0
    return values + mask


def ungathered_rewards(patch):
    group_advantages = module.group_advantages
    patch.setattr(module, "group_advantages", lambda rewards, *rest: group_advantages(own(rewards), *rest))


def advantages_of_the_first_process(patch):
    group_advantages = module.group_advantages

    def first(*arguments):
        advantages, deviations = group_advantages(*arguments)
        _, world = place()
        return advantages.chunk(world)[0].repeat(world), deviations

    patch.setattr(module, "group_advantages", first)


def seeds_by_process(patch):
    seed_of = module.seed_of
    patch.setattr(module, "seed_of", lambda *parts: seed_of(*parts, place()[0]))


def texts_weighed_by_their_batch(patch):
    parts_of = NextFlowGRPOTrainer._parts

    def parts(self, rollouts):
        text, image = parts_of(self, rollouts)
        weights = text.sampled / text.sampled.sum() * len(text.sampled)
        return [module.Part(text.name, weights, text.sampled, text.lengths, text.share), image]

    patch.setattr(NextFlowGRPOTrainer, "_parts", parts)


def gradients_left_where_they_are(patch):
    compute_loss = NextFlowGRPOTrainer.compute_loss

    def apart(self, model, *arguments, **kwargs):
        with self.accelerator.no_sync(model):
            return compute_loss(self, model, *arguments, **kwargs)

    patch.setattr(NextFlowGRPOTrainer, "compute_loss", apart)


def metrics_of_one_process(patch):
    patch.setattr(metrics, "gather_object", lambda own: own)


def rewards_of_one_process(patch):
    count = NextFlowGRPOTrainer._count_rewards
    patch.setattr(
        NextFlowGRPOTrainer,
        "_count_rewards",
        lambda self, rewards_NF, deviations: count(self, own(rewards_NF), deviations),
    )


BUGS = {  # what is planted, and where it shows
    "ungathered rewards": (ungathered_rewards, {"advantages", "weights"}),
    "advantages of the first process": (advantages_of_the_first_process, {"advantages", "weights"}),
    "seeds by process": (seeds_by_process, {"codes", "weights", "reward"}),
    "texts weighed by their batch": (texts_weighed_by_their_batch, {"weights", "loss"}),
    "gradients left where they are": (gradients_left_where_they_are, {"weights"}),
    "metrics of one process": (metrics_of_one_process, {"entropy", "text/entropy"}),
    "rewards of one process": (rewards_of_one_process, {"reward_std", "rewards/redness/std"}),
}


def dies_on_the_second_process(call: int = 2):
    """Rewards that it has until it is asked so many times."""
    calls = []

    def reward(images, **kwargs):
        calls.append(images)
        if place()[0] == 1 and len(calls) == call:
            raise ConnectionError("server gone")
        return redness(images)

    reward.__name__ = "redness"  # in the log
    return reward


def main() -> None:
    policy_folder, folder = map(Path, sys.argv[1:3])
    policy = NextFlowForConditionalGeneration.from_pretrained(policy_folder)
    processor = NextFlowProcessor.from_pretrained(policy_folder)
    if sys.argv[3:] == ["bugs"]:
        results = {bug: train(policy, processor, folder / "bug", TWO, bug, **AT_ONCE) for bug in BUGS}
    else:
        results = without_bugs(policy, processor, folder)
    if place()[0] == 0:
        torch.save(results, folder / ("bugs.pt" if sys.argv[3:] else "results.pt"))


def without_bugs(policy, processor, folder: Path) -> dict:
    results = {"both": train(policy, processor, folder / "run", TWO)}
    results["pictures"] = train(policy, processor, folder / "run", TWO, **PICTURES)
    results["epochs"] = train(policy, processor, folder / "cut", TWO, **EPOCHS, save_strategy="steps", save_steps=3)
    results["resumed"] = train(
        policy, processor, folder / "cut", TWO, resume=str(folder / "cut/checkpoint-3"), **EPOCHS
    )
    try:
        train(policy, processor, folder / "died", TWO, reward=dies_on_the_second_process())
    except RewardError as error:
        results["fault"] = str(error)
    return results


if __name__ == "__main__":
    on_ranks(main)
