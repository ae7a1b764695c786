"""Prefix-tuning GRPO on the emoji world: `python -m benchmarks.grpo MODEL PACKS --json`.

From one checkpoint of the recipe (any folder that `examples.emoji.train` saved in its last stage), for several seeds:

- `prefix`: GRPO on the scales that have at most `--prefix-tokens` codes, by the margin of the judge's metric;
- `shuffled`: the control, `prefix` with the rewards of a batch dealt out at random;
- `vanilla`: GRPO on all scales, as many rollouts as `prefix`; scored also when `prefix`'s seconds are over;
- `supervised`: the recipe goes on, on PACKS, for `prefix`'s seconds, over which its learning rate comes down.

GRPO trains on prompts for seen pictures. Scored are drawings of the test split by the checkpoint's own sampling: R@1
among all pictures, of `--prompts` seen pairs of name and style and as many held-out ones. GRPO's learning rate is the
one of `--learning-rates` that is best on the dev split, by trainings of a seed of their own. Seconds are the CPU's, of
one thread, without those of measuring. What is finished is not run again. Beside the JSON, curves and pictures.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback, TrainerCallback

from benchmarks.figures import draw_curves, draw_strips
from benchmarks.harness import in_processes, interval, machine, report
from examples.emoji.artist import Artist
from examples.emoji.rewards import judge_of, margin, prompts
from examples.emoji.splits import PAIR, SEEN
from examples.emoji.stages import bfloat16_is_fast
from examples.emoji.tasks import Item, Tasks
from examples.emoji.transformer import TRAININGS, WEIGHT_DECAY, new_optimizer
from transformers_nextflow import NextFlowForConditionalGeneration, NextFlowProcessor
from transformers_nextflow.data import PackedDataset
from transformers_nextflow.data.extraction import check_plan
from transformers_nextflow.lora import lora_config
from transformers_nextflow.training import NextFlowTrainer, NextFlowTrainingArguments
from transformers_nextflow.training.grpo import NextFlowGRPOConfig, NextFlowGRPOTrainer
from transformers_nextflow.utils.files import write_atomically

OUTPUT = Path(__file__).parent / "results" / "grpo.json"
PAPER = "fig. 12: prefixes of 512, 256, 128 and 64 tokens climb faster and higher than vanilla GRPO"
ARMS = ("prefix", "vanilla", "shuffled", "supervised")
PARTS = {"seen": SEEN, "held out": PAIR}
# adapters; drawn under guidance, as pictures are judged, and guidance is part of the trained distribution
GRPO = {"guidance_scale": 2.0, "logprob_mode": "behaviour", "beta": 0.05}
SWEEP_SEED = 0  # no arm's
POINTS = 4  # of a training, at which dev prompts are measured
NUM_PROMPTS = 4_000  # trained on
SHOWN = 12  # pictures on the sheet
WARMUP = 20  # steps of the supervised arm


class Exam:
    """Scores of a model, which may be in training."""

    def __init__(self, model, processor: NextFlowProcessor, data: str):
        self.model, self.judge = model, judge_of(data)
        self.artist = Artist(model, processor, self.judge.world)

    @cached_property
    def tasks(self) -> Tasks:
        return Tasks.of(self.judge.world)

    def items(self, split: str, part: str, count: int) -> list[Item]:
        return [self.tasks.draw("text-to-image", split, number, part=part) for number in range(count)]

    def score(self, split: str, count: int) -> dict[str, float]:
        """R@1 of each part, and of both together."""
        self.model.eval()
        shares = {}
        for name, part in PARTS.items():
            items = self.items(split, part, count)
            right = self.judge.right(self.artist.draw(items), [item.targets[0] for item in items])
            shares[name] = round(float(right["picture"].mean()), 4)
        return shares | {"both": round(statistics.mean(shares.values()), 4)}

    def strip(self) -> Image.Image:
        """The first pictures of held-out pairs of the test split, side by side."""
        self.model.eval()
        return Image.fromarray(np.concatenate(self.artist.draw(self.items("test", PAIR, SHOWN)), axis=1))


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
        exam: of the dev split at `POINTS` times, of the test split at `at_seconds`.
        limit: seconds after which a training ends that has no number of steps.
    """

    def __init__(self, name: str, exam: Exam, options, limit: float | None = None, at_seconds: float = math.inf):
        self.name, self.exam, self.options, self.limit, self.at_seconds = name, exam, options, limit, at_seconds
        self.started, self.apart = 0.0, 0.0
        self.rewards, self.dev, self.on_the_way = [], [], None

    @property
    def seconds(self) -> float:
        return round(time.process_time() - self.started - self.apart, 1)

    def progress(self, state) -> float:
        """From 0 to 1."""
        return self.seconds / self.limit if self.limit else state.global_step / state.max_steps

    def measure(self, split: str, count: int) -> dict[str, float]:
        started = time.process_time()
        scores = self.exam.score(split, count)
        self.exam.model.train()
        self.apart += time.process_time() - started
        return scores

    def on_train_begin(self, args, state, control, **kwargs):
        self.started = time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        progress, at = self.progress(state), {"step": state.global_step, "seconds": self.seconds}
        if self.on_the_way is None and self.at_seconds < at["seconds"]:
            self.on_the_way = at | {"test": self.measure("test", self.options.prompts)}
        if progress >= (len(self.dev) + 1) / POINTS:
            self.dev.append(at | {"dev": self.measure("dev", self.options.curve_prompts)})
            print(f"{self.name}: {progress:.0%}, {self.dev[-1]}", file=sys.stderr, flush=True)
        if self.limit:
            control.should_training_stop |= progress >= 1

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "reward" in logs:
            row = {"step": state.global_step, "seconds": self.seconds}
            self.rewards.append(row | {name: round(logs[name], 4) for name in ("reward", "reward_std", "entropy")})


def load(options) -> tuple[NextFlowForConditionalGeneration, NextFlowProcessor]:
    model = NextFlowForConditionalGeneration.from_pretrained(options.model)
    model.model.vq_model.requires_grad_(False)
    model.set_attn_implementation("eager")  # the fastest backward at these lengths on a CPU
    return model, NextFlowProcessor.from_pretrained(options.model)


def run_before(name: str, part: int, options) -> dict:
    """The checkpoint as it is."""
    exam = Exam(*load(options), options.data)
    scores = {split: exam.score(split, options.prompts) for split in ("dev", "test")}
    return finish(path_of(options, name, part), scores, exam.strip())


def run_trial(name: str, rate: float, options) -> dict:
    """A training at one learning rate, scored on the dev split."""
    model, processor = load(options)
    watch = Watch(f"sweep, {rate}", Exam(model, processor, options.data), options)
    policy_trainer("prefix", SWEEP_SEED, rate, model, processor, watch, options).train()
    result = {"seconds": watch.seconds, "dev": watch.measure("dev", options.prompts)}
    return finish(path_of(options, name, rate), result)


def run_arm(arm: str, seed: int, rate: float, options, seconds: float = math.inf) -> dict:
    """Train one arm from the checkpoint and score it; `seconds` are those of `prefix`."""
    model, processor = load(options)
    exam = Exam(model, processor, options.data)
    limit, at_seconds = seconds if arm == "supervised" else None, seconds if arm == "vanilla" else math.inf
    watch = Watch(f"{arm}, seed {seed}", exam, options, limit, at_seconds)
    if arm == "supervised":
        trainer = supervised(seed, model, processor, watch, options)
    else:
        trainer = policy_trainer(arm, seed, rate, model, processor, watch, options)
    trainer.train()
    result = {"seconds": watch.seconds, "steps": trainer.state.global_step}
    result["test"] = watch.measure("test", options.prompts)
    if arm == "vanilla":  # one that took no longer than `prefix` is scored at its end
        result["at_equal_seconds"] = watch.on_the_way or dict(result)
    return finish(path_of(options, arm, seed), result | {"dev": watch.dev, "rewards": watch.rewards}, exam.strip())


def common_arguments(name: str, seed: int, options) -> dict:
    work = options.folder / "work" / f"{name}-{seed}"
    common = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "seed": seed, "use_cpu": True}
    return common | {
        "bf16": bfloat16_is_fast(),
        "output_dir": str(work),
        "weight_decay": WEIGHT_DECAY,
        "adam_beta2": 0.95,
    }


def policy_trainer(arm: str, seed: int, rate: float, model, processor, watch: Watch, options) -> NextFlowGRPOTrainer:
    arguments = NextFlowGRPOConfig(
        learning_rate=rate,
        lr_scheduler_type="linear",
        warmup_steps=options.steps // 10,
        num_generations=options.group,
        per_device_train_batch_size=options.group * options.prompts_at_once,
        prefix_tokens=None if arm == "vanilla" else options.prefix_tokens,
        max_steps=options.steps,
        logging_steps=min(5, options.steps),
        gradient_checkpointing=False,
        **common_arguments(arm, seed, options),
        **GRPO,
    )
    trainer = NextFlowGRPOTrainer(
        model,
        Shuffled(seed) if arm == "shuffled" else margin,
        arguments,
        list(prompts(watch.exam.tasks, options.data, NUM_PROMPTS, seed)),
        processing_class=processor,
        peft_config=lora_config(modules_to_save=None),
        callbacks=[watch],
    )
    trainer.remove_callback(PrinterCallback)  # standard output is for the result
    return trainer


def supervised(seed: int, model, processor, watch: Watch, options) -> NextFlowTrainer:
    """The recipe's trainer, whose learning rate follows the watch."""
    values = {"per_device_train_batch_size": options.packs_at_once, "max_steps": 1_000_000, "logging_steps": 50}
    arguments = NextFlowTrainingArguments(**values, **common_arguments("supervised", seed, options))
    optimizer = new_optimizer(model, arguments, TRAININGS["pretraining-64"].peak)
    decay = lambda: 0.02 + 0.49 * (1 + math.cos(math.pi * min(watch.progress(None), 1)))  # noqa: E731
    schedule = LambdaLR(optimizer, lambda step: min((step + 1) / WARMUP, 1) * (decay() if step else 1))
    packs = PackedDataset(options.packs, model, processor, seed=seed)
    trainer = NextFlowTrainer(
        model, arguments, train_dataset=packs, callbacks=[watch], optimizers=(optimizer, schedule)
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def path_of(options, name: str, part: str | float) -> Path:
    """Where the result of an arm and a seed, or of a learning rate, goes."""
    return options.folder / f"{name}-{part}.json"


def finish(path: Path, result: dict, picture: Image.Image | None = None) -> dict:
    if picture is not None:
        write_atomically(path.with_suffix(".png"), lambda partial: picture.save(partial, format="PNG"))
    write_atomically(path, lambda partial: partial.write_text(json.dumps(result, indent=1)))
    return result


def run(function: Callable, jobs: list[tuple], options) -> dict[tuple, dict]:
    """Results by the first two arguments; those of finished jobs are read."""
    paths = {job[:2]: path_of(options, *job[:2]) for job in jobs}
    todo = [job for job in jobs if not paths[job[:2]].exists()]
    for job, outcome in in_processes(function, todo) if todo else ():
        print(f"{job[:2]}: {outcome.get('test', outcome['dev'])}", file=sys.stderr, flush=True)
    return {job: json.loads(path.read_text()) for job, path in paths.items()}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of the checkpoint")
    parser.add_argument("packs", help="folder of the recipe's packs")
    parser.add_argument("--data", default="runs/emoji/data", help="the data set (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=Path("runs/grpo-benchmark"), help="of finished arms")
    parser.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[2e-4, 5e-4], help="of GRPO")
    parser.add_argument("--steps", type=int, default=100, help="of GRPO (default: %(default)s)")
    parser.add_argument("--group", type=int, default=8, help="pictures of a prompt (default: %(default)s)")
    parser.add_argument("--prompts-at-once", type=int, default=16, help="of a step (default: %(default)s)")
    parser.add_argument("--prefix-tokens", type=int, default=30, help="default: %(default)s, four of seven scales")
    parser.add_argument("--packs-at-once", type=int, default=TRAININGS["pretraining-64"].packs, help="of a step")
    parser.add_argument("--prompts", type=int, default=500, help="of each part (default: %(default)s)")
    parser.add_argument("--curve-prompts", type=int, default=100, help="the same along the way")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="JSON file (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    left_out = ("folder", "output", "json", "seeds")
    settings = {name: str(value) for name, value in vars(options).items() if name not in left_out}
    check_plan(options.folder, {"settings": settings})
    seeds = range(1, options.seeds + 1)
    (before,) = run(run_before, [("before", 0, options)], options).values()
    rate, sweep = options.learning_rates[0], {}
    if len(options.learning_rates) > 1:
        trials = run(run_trial, [("sweep", each, options) for each in options.learning_rates], options)
        sweep = {each: row["dev"]["both"] for (_, each), row in trials.items()}
        rate = max(sweep, key=sweep.get)
    # two phases, since `vanilla` and `supervised` need the seconds of `prefix`
    done = run(run_arm, [(arm, seed, rate, options) for arm in ("prefix", "shuffled") for seed in seeds], options)
    spent = {seed: done["prefix", seed]["seconds"] for seed in seeds}
    rest = [(arm, seed, rate, options, spent[seed]) for arm in ("vanilla", "supervised") for seed in seeds]
    done |= run(run_arm, rest, options)
    arms = {arm: {seed: done[arm, seed] for seed in seeds} for arm in ARMS}

    ends = {arm: [arms[arm][seed]["test"] for seed in seeds] for arm in ARMS}
    ends["vanilla, at the seconds of prefix"] = [arms["vanilla"][seed]["at_equal_seconds"]["test"] for seed in seeds]

    def gain(scores: list[dict], start: list[dict]) -> dict:
        """Of each part over the seeds."""
        return {
            part: interval([round(row[part] - other[part], 4) for row, other in zip(scores, start)])
            for part in before["test"]
        }

    result = {
        "learning rate": {"chosen": rate, "dev": sweep},
        "before": before,
        "gain": {name: gain(scores, [before["test"]] * len(seeds)) for name, scores in ends.items()},
        "prefix against vanilla": {
            "paper": PAPER,
            "at equal rollouts": gain(ends["prefix"], ends["vanilla"]),
            "at equal seconds": gain(ends["prefix"], ends["vanilla, at the seconds of prefix"]),
            "seconds": {arm: [arms[arm][seed]["seconds"] for seed in seeds] for arm in ("prefix", "vanilla")},
        },
        "arms": arms,
        "settings": {name: value for name, value in settings.items() if name not in ("model", "packs", "data")} | GRPO,
        "machine": machine(torch.device("cpu")) | {"threads": 1},
    }
    strips = {"before": path_of(options, "before", 0)} | {arm: path_of(options, arm, seeds[0]) for arm in ARMS}
    tasks = Tasks.of(judge_of(options.data).world)
    titles = [tasks.draw("text-to-image", "test", number, part=PAIR).user[0] for number in range(SHOWN)]
    sheets = {
        "curves": draw_curves(arms, before["test"]["both"], before["dev"]["both"]),
        "pictures": draw_strips({name: Image.open(path.with_suffix(".png")) for name, path in strips.items()}, titles),
    }
    for name, sheet in sheets.items():
        path = options.output.with_name(f"{options.output.stem}_{name}.png")
        write_atomically(path, lambda partial, sheet=sheet: sheet.save(partial, format="PNG"))
    report(result, options.json, options.output)


if __name__ == "__main__":
    main()
