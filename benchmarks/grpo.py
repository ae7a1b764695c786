"""Prefix-tuning GRPO on the emoji world: `python -m benchmarks.grpo MODEL --data runs/emoji/data --json`.

From one checkpoint, with adapters on equally many prompts for seen pictures, other ones for each seed:

- `prefix`: GRPO on the scales that have at most `--prefix-tokens` codes, by the margin of the judge's metric;
- `shuffled`: the control, `prefix` with the rewards of a batch dealt out at random;
- `vanilla`: GRPO on all scales, as many rollouts as `prefix`; scored also when `prefix`'s seconds are over;
- `supervised`: the control that knows the pictures, `NextFlowSFTTrainer` on them for `prefix`'s seconds.

GRPO draws at the checkpoint's own temperature, without guidance. Scored is R@1 among all pictures, of drawings of the
trained prompts, `REPEATS` of each, and of `--prompts` held-out pairs of name and style of the test split; without
guidance, as was trained, and by the checkpoint's own sampling. Learning rates, GRPO's and the supervised one, are the
best in trainings of a seed of their own. Gains have 95% intervals over prompts. Seconds are the CPU's, of one thread,
without those of measuring. What is finished is not run again. Beside the JSON, curves and pictures.
"""

import argparse
import json
import math
import sys
import time
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from matplotlib.figure import Figure
from PIL import Image
from transformers import PrinterCallback, TrainerCallback
from trl import SFTConfig

from benchmarks.harness import in_processes, machine, report
from examples.emoji.artist import Artist
from examples.emoji.intervals import paired_difference
from examples.emoji.panels import in_rows
from examples.emoji.rewards import judge_of, margin, prompts
from examples.emoji.splits import PAIR
from examples.emoji.stages import bfloat16_is_fast
from examples.emoji.tasks import Item, Tasks
from transformers_nextflow import ImageGenerationConfig, NextFlowForConditionalGeneration, NextFlowProcessor
from transformers_nextflow.data.extraction import check_plan
from transformers_nextflow.lora import lora_config
from transformers_nextflow.training import NextFlowSFTTrainer
from transformers_nextflow.training.grpo import NextFlowGRPOConfig, NextFlowGRPOTrainer
from transformers_nextflow.utils.files import write_atomically

OUTPUT = Path(__file__).parent / "results" / "grpo.json"
PAPER = "fig. 12: prefixes of 512, 256, 128 and 64 tokens climb faster and higher than vanilla GRPO"
ARMS = ("prefix", "vanilla", "shuffled", "supervised")
OWN, HELD_OUT = "trained prompts", "held-out pairs"
UNGUIDED, GUIDED = "without guidance", "by the checkpoint's sampling"
MANNERS: dict[str, dict] = {UNGUIDED: {"guidance_scale": 1.0}, GUIDED: {}}
REPEATS = 4  # drawings of a trained prompt
SWEEP_SEED = 0  # no arm's
POINTS = 5  # of a training, at which trained prompts are drawn
SHOWN = 10  # pictures on the sheet

Verdicts = dict[str, dict[str, list[float]]]  # share of right drawings: by manner, kind, prompt


class Exam:
    """Drawings of a model, which may be in training, for the prompts of a seed.

    Attributes:
        own, held_out: items that are trained on, and that no training saw.
    """

    def __init__(self, model, processor: NextFlowProcessor, seed: int, options):
        self.model, self.processor, self.judge = model, processor, judge_of(options.data)
        self.own = [self.tasks.draw("text-to-image", "train", number, seed) for number in range(options.trained)]
        numbers = range(options.prompts)
        self.held_out = [self.tasks.draw("text-to-image", "test", number, part=PAIR) for number in numbers]

    @cached_property
    def tasks(self) -> Tasks:
        return Tasks.of(self.judge.world)

    def draw(self, items: list[Item], manner: str) -> list[np.ndarray]:
        self.model.eval()
        return Artist(self.model, self.processor, self.judge.world, **MANNERS[manner]).draw(items)

    def right(self, items: list[Item], manner: str, repeats: int = 1) -> list[float]:
        """Of each item, the share of its drawings that are right."""
        targets = [item.targets[0] for item in items * repeats]
        right = self.judge.right(self.draw(items * repeats, manner), targets)["picture"]
        return right.reshape(repeats, len(items)).mean(0).tolist()

    def verdicts(self, *manners: str) -> Verdicts:
        kinds = {OWN: (self.own, REPEATS), HELD_OUT: (self.held_out, 1)}
        return {each: {kind: self.right(items, each, n) for kind, (items, n) in kinds.items()} for each in manners}

    def strip(self) -> Image.Image:
        """Pictures of the first trained prompts, side by side."""
        return Image.fromarray(np.concatenate(self.draw(self.own[:SHOWN], UNGUIDED), axis=1))


class Shuffled:
    """The margins, dealt out at random."""

    def __init__(self, seed: int):
        self.generator, self.__name__ = torch.Generator().manual_seed(seed), "shuffled_margin"

    def __call__(self, **kwargs) -> list[float]:
        rewards = margin(**kwargs)
        return [rewards[place] for place in torch.randperm(len(rewards), generator=self.generator)]


class Watch(TrainerCallback):
    """Follows a training; its clock stands still while it measures.

    Args:
        limit: seconds after which a training ends that has no number of steps.
        at_seconds: when everything is drawn on the way.
    """

    def __init__(self, name: str, exam: Exam, limit: float | None, at_seconds: float):
        self.name, self.exam, self.limit, self.at_seconds = name, exam, limit, at_seconds
        self.started, self.apart = 0.0, 0.0
        self.rewards: list[dict] = []
        self.curve: list[dict] = []
        self.on_the_way: Verdicts | None = None

    @property
    def seconds(self) -> float:
        return round(time.process_time() - self.started - self.apart, 1)

    def on_train_begin(self, args, state, control, **kwargs):
        self.started = time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        seconds = self.seconds
        progress = seconds / self.limit if self.limit else state.global_step / state.max_steps
        started = time.process_time()
        if self.on_the_way is None and self.at_seconds < seconds:
            self.on_the_way = self.exam.verdicts(*MANNERS)
        if progress >= (len(self.curve) + 1) / POINTS:
            right = round(float(np.mean(self.exam.right(self.exam.own, UNGUIDED))), 4)
            self.curve.append({"step": state.global_step, "seconds": seconds, "right": right})
            print(f"{self.name}: {progress:.0%}, {self.curve[-1]}", file=sys.stderr, flush=True)
        self.exam.model.train()
        self.apart += time.process_time() - started
        if self.limit:
            control.should_training_stop |= progress >= 1

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "reward" in logs:
            row = {"step": state.global_step, "seconds": self.seconds}
            self.rewards.append(row | {name: round(logs[name], 4) for name in ("reward", "reward_std", "entropy")})


def run_arm(arm: str, seed: int, rate: float, options, seconds: float = math.inf, manners=tuple(MANNERS)) -> dict:
    """Train one arm from the checkpoint, `supervised` for so many `seconds`, and let it draw; `before` is as it is."""
    model = NextFlowForConditionalGeneration.from_pretrained(options.model)
    model.model.vq_model.requires_grad_(False)
    model.set_attn_implementation("eager")  # the fastest backward at these lengths on a CPU
    exam = Exam(model, NextFlowProcessor.from_pretrained(options.model), seed, options)
    path, result = path_of(options, arm, seed, rate), {}
    if arm != "before":
        limit, at_seconds = seconds if arm == "supervised" else None, seconds if arm == "vanilla" else math.inf
        watch = Watch(f"{arm}, seed {seed}, rate {rate}", exam, limit, at_seconds)
        trainer = (supervised if arm == "supervised" else policy)(arm, seed, rate, watch, options)
        trainer.remove_callback(PrinterCallback)  # standard output is for the result
        trainer.train()
        result = {"seconds": watch.seconds, "steps": trainer.state.global_step, "curve": watch.curve}
        result |= {"rewards": watch.rewards, "at_equal_seconds": watch.on_the_way}
    result["right"] = exam.verdicts(*manners)
    picture = exam.strip()
    write_atomically(path.with_suffix(".png"), lambda partial: picture.save(partial, format="PNG"))
    write_atomically(path, lambda partial: partial.write_text(json.dumps(result, indent=1)))
    return result


def common_arguments(arm: str, seed: int, rate: float, options) -> dict:
    work = options.folder / "work" / f"{arm}-{seed}-{rate}"
    fixed = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    return fixed | {
        "output_dir": str(work),
        "seed": seed,
        "learning_rate": rate,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": options.steps // 10,
        "bf16": bfloat16_is_fast(),
        "gradient_checkpointing": False,
    }


def policy(arm: str, seed: int, rate: float, watch: Watch, options) -> NextFlowGRPOTrainer:
    exam = watch.exam
    arguments = NextFlowGRPOConfig(
        num_generations=options.group,
        per_device_train_batch_size=options.group * options.prompts_at_once,
        prefix_tokens=None if arm == "vanilla" else options.prefix_tokens,
        max_steps=options.steps,
        logging_steps=min(5, options.steps),
        temperature=ImageGenerationConfig(**exam.model.config.image_generation).temperature,
        beta=options.beta,
        **common_arguments(arm, seed, rate, options),
    )
    return NextFlowGRPOTrainer(
        exam.model,
        Shuffled(seed) if arm == "shuffled" else margin,
        arguments,
        list(prompts(exam.tasks, options.data, options.trained, seed)),
        processing_class=exam.processor,
        peft_config=lora_config(modules_to_save=None),
        callbacks=[watch],
    )


def supervised(arm: str, seed: int, rate: float, watch: Watch, options) -> NextFlowSFTTrainer:
    exam, common = watch.exam, common_arguments(arm, seed, rate, options)
    arguments = SFTConfig(max_steps=1_000_000, per_device_train_batch_size=options.group, logging_steps=50, **common)
    pictures, answer = exam.judge.world.pictures, [{"role": "assistant", "content": [{"type": "image"}]}]
    rows = [
        {"prompt": item.user[0], "completion": answer, "images": [Image.fromarray(pictures[item.targets[0]])]}
        for item in exam.own
    ]
    return NextFlowSFTTrainer(
        exam.model,
        arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=exam.processor,
        peft_config=lora_config(modules_to_save=None),
        callbacks=[watch],
    )


def path_of(options, arm: str, seed: int, rate: float) -> Path:
    """Where the result of a training goes."""
    return options.folder / f"{arm}-{seed}-{rate}.json"


def run(jobs: list[tuple], options) -> dict[tuple, dict]:
    """Results of [`run_arm`] by its first three arguments; those of finished jobs are read."""
    paths = {job[:3]: path_of(options, *job[:3]) for job in jobs}
    todo = [job for job in jobs if not paths[job[:3]].exists()]
    for job, _ in in_processes(run_arm, todo) if todo else ():
        print(f"{job[:3]} is finished", file=sys.stderr, flush=True)
    return {job: json.loads(path.read_text()) for job, path in paths.items()}


def sweep(arm: str, rates: list[float], options, seconds: float = math.inf) -> tuple[dict[float, float], float]:
    """R@1 of trained prompts by learning rate, and the mean seconds of a training."""
    trials = run([(arm, SWEEP_SEED, rate, options, seconds, (UNGUIDED,)) for rate in rates], options)
    by_rate = {rate: round(float(np.mean(row["right"][UNGUIDED][OWN])), 4) for (_, _, rate), row in trials.items()}
    return by_rate, float(np.mean([row["seconds"] for row in trials.values()]))


def compared(runs: list[Verdicts], others: list[Verdicts]) -> dict:
    """Differences over prompts: trained ones are other ones for each seed, held-out ones the same for all."""
    joined = {OWN: np.concatenate, HELD_OUT: lambda rows: np.mean(rows, axis=0)}
    values = lambda runs, manner, kind: joined[kind]([each[manner][kind] for each in runs])  # noqa: E731
    return {
        manner: {kind: paired_difference(values(runs, manner, kind), values(others, manner, kind)) for kind in joined}
        for manner in MANNERS
    }


def curves(arms: dict[str, list[dict]], before: list[float]) -> Figure:
    """Reward of training by step, and R@1 of trained prompts by seconds; a line for each seed."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    rewards, scores = figure.subplots(1, 2)
    for number, (arm, runs) in enumerate(arms.items()):
        for place, result in enumerate(runs):
            line = {"label": None if place else arm, "color": f"C{number}"}
            if result["rewards"]:
                rewards.plot(*zip(*[(row["step"], row["reward"]) for row in result["rewards"]]), **line)
            points = [(0, before[place]), *((row["seconds"], row["right"]) for row in result["curve"])]
            scores.plot(*zip(*points), marker=".", **line)
    rewards.set(xlabel="step", title="reward of training")
    scores.set(xlabel="CPU seconds", title="R@1 of trained prompts, without guidance")
    scores.legend()
    return figure


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of the checkpoint")
    parser.add_argument("--data", default="runs/emoji/data", help="the data set (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=Path("runs/grpo-benchmark"), help="of finished arms")
    parser.add_argument("--seeds", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--trained", type=int, default=64, help="prompts of a seed (default: %(default)s)")
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[3e-4, 1e-3], help="of GRPO")
    parser.add_argument("--supervised-rates", type=float, nargs="+", default=[3e-4, 1e-3], help="of the control")
    parser.add_argument("--steps", type=int, default=80, help="of GRPO (default: %(default)s)")
    parser.add_argument("--group", type=int, default=8, help="pictures of a prompt (default: %(default)s)")
    parser.add_argument("--prompts-at-once", type=int, default=8, help="of a step (default: %(default)s)")
    parser.add_argument("--prefix-tokens", type=int, default=30, help="default: %(default)s, four of seven scales")
    parser.add_argument("--beta", type=float, default=0.01, help="of the KL to the checkpoint (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=400, help="held-out pairs (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="JSON file (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    left_out = ("folder", "output", "json", "seeds")
    settings = {name: str(value) for name, value in vars(options).items() if name not in left_out}
    check_plan(options.folder, {"settings": settings})
    seeds = range(1, options.seeds + 1)
    trials, seconds = sweep("prefix", options.learning_rates, options)
    control_trials, _ = sweep("supervised", options.supervised_rates, options, seconds)
    rate, control_rate = max(trials, key=trials.get), max(control_trials, key=control_trials.get)
    # two phases, since `vanilla` and `supervised` need the seconds of `prefix`
    first = (("before", 0.0), ("prefix", rate), ("shuffled", rate))
    done = run([(arm, seed, each, options) for arm, each in first for seed in seeds], options)
    second = (("vanilla", rate), ("supervised", control_rate))
    done |= run(
        [(arm, seed, each, options, done["prefix", seed, rate]["seconds"]) for arm, each in second for seed in seeds],
        options,
    )
    runs = {arm: [done[arm, seed, each] for seed in seeds] for arm, each in first + second}
    right = {arm: [result["right"] for result in results] for arm, results in runs.items()}
    # one that took no longer than `prefix` is at its end
    right["vanilla, at the seconds of prefix"] = [row["at_equal_seconds"] or row["right"] for row in runs["vanilla"]]
    before, arms = right.pop("before"), {arm: runs[arm] for arm in ARMS}

    result = {
        "learning rates": {
            "grpo": {"chosen": rate, "right": trials},
            "supervised": {"chosen": control_rate, "right": control_trials},
        },
        "before": {
            manner: {
                kind: round(float(np.mean([each[manner][kind] for each in before])), 4) for kind in (OWN, HELD_OUT)
            }
            for manner in MANNERS
        },
        "gain": {arm: compared(results, before) for arm, results in right.items()},
        "prefix minus": {arm: compared(right["prefix"], results) for arm, results in right.items() if arm != "prefix"},
        "paper": PAPER,
        "seconds": {arm: [result["seconds"] for result in results] for arm, results in arms.items()},
        "rewards": {arm: [result["rewards"] for result in results] for arm, results in arms.items()},
        "curves": {arm: [result["curve"] for result in results] for arm, results in arms.items()},
        "settings": {name: value for name, value in settings.items() if name not in ("model", "data")},
        "machine": machine(torch.device("cpu")) | {"threads": 1},
    }
    strips = {arm: path_of(options, arm, seeds[0], each).with_suffix(".png") for arm, each in first + second}
    tasks = Tasks.of(judge_of(options.data).world)
    titles = [tasks.draw("text-to-image", "train", number, seeds[0]).user[0] for number in range(SHOWN)]
    pictures = in_rows({arm: Image.open(path) for arm, path in strips.items()}, titles)
    figure = curves(arms, [float(np.mean(each[UNGUIDED][OWN])) for each in before])
    for name, save in {"curves": figure.savefig, "pictures": pictures.save}.items():
        path = options.output.with_name(f"{options.output.stem}_{name}.png")
        write_atomically(path, lambda partial, save=save: save(partial, format="png"))
    report(result, options.json, options.output)


if __name__ == "__main__":
    main()
