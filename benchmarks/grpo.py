"""Prefix-tuning GRPO on the shapes world: `python -m benchmarks.grpo MODEL PACKS --json`.

From one checkpoint of the recipe, stopped early (`examples.shapes.train --stop-at 750`), and for several seeds:

- `prefix`: GRPO on the scales whose codes fit `--prefix-tokens`, the judge as reward;
- `shuffled`: the control, `prefix` with the rewards of a batch dealt out at random;
- `vanilla`: GRPO on all scales, as many rollouts as `prefix`; scored also when `prefix`'s seconds are over;
- `supervised`: the recipe goes on, on PACKS, for `prefix`'s seconds, over which its learning rate comes down.

The dev split decides everything but the result: how GRPO trains, by trainings of a seed of their own (`RECIPES`,
or `--recipe`); which categories training's prompts come from, the more the worse the checkpoint does; and the sampler
(of `SAMPLERS`) that is best for the checkpoint, under which it and every arm are judged. Scores are of held-out
prompts of the test split, which share none with training's. Seconds are the CPU's, of one thread, without those of
measuring. What is finished is not run again. Beside the JSON, curves and pictures before and after.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback, TrainerCallback

from benchmarks.grpo_figures import draw_curves, draw_strips
from benchmarks.harness import in_processes, interval, machine, report
from examples.shapes.assemble import IMAGE_GENERATION
from examples.shapes.evaluate import Evaluator, text_to_image
from examples.shapes.grammar import CATEGORIES, held_out_prompts
from examples.shapes.rewards import shapes_judge, training_prompts
from examples.shapes.transformer import PACKS, PEAK, new_optimizer
from transformers_nextflow import NextFlowForConditionalGeneration, NextFlowProcessor
from transformers_nextflow.data import PackedDataset
from transformers_nextflow.data.extraction import check_plan
from transformers_nextflow.files import write_atomically
from transformers_nextflow.lora import lora_config
from transformers_nextflow.training import NextFlowTrainer, NextFlowTrainingArguments
from transformers_nextflow.training.grpo import NextFlowGRPOConfig, NextFlowGRPOTrainer
from transformers_nextflow.training.grpo.rollouts import rollout_logps

OUTPUT = Path(__file__).parent / "results" / "grpo.json"
PAPER = "fig. 12: prefixes of 512, 256, 128 and 64 tokens climb faster and higher than vanilla GRPO"
ARMS = ("prefix", "vanilla", "shuffled", "supervised")
SAMPLERS = {
    "guided": {"guidance_scale": 2.0, "temperature": 1.0},
    "guided-cool": {"guidance_scale": 2.0, "temperature": 0.6},
    "by-scale": IMAGE_GENERATION,
}
# How GRPO may train: what is drawn and whose probabilities count, how far a step goes, what holds it back. Pictures
# are judged under guidance; `plain` draws without it, `conditional` forgets it in training.
GUIDED = {"guidance_scale": 2.0, "logprob_mode": "behaviour"}
RECIPES = {
    "full": GUIDED | {"learning_rate": 3e-5},
    "full-fast": GUIDED | {"learning_rate": 1e-4},
    "adapters": GUIDED | {"learning_rate": 2e-4},
    "adapters-fast": GUIDED | {"learning_rate": 5e-4},
    "adapters-fast-kl": GUIDED | {"learning_rate": 5e-4, "beta": 0.05},
    "adapters-fast-conditional": GUIDED | {"learning_rate": 5e-4, "logprob_mode": "conditional"},
    "adapters-fast-plain": {"learning_rate": 5e-4},
}  # `full` trains all but the tokenizer, `adapters` a LoRA alone
SWEEP_SEED = 0  # no arm's
POINTS = 4  # of a training, at which dev prompts and gradients are measured
NUM_PROMPTS = 4_000  # trained on
SHOWN = 2  # pictures of each category on the sheet
WARMUP = 20  # steps of the supervised arm
KEPT = ("reward", "reward_std", "frac_reward_zero_std", "entropy")


class Shuffled:
    """The judge's rewards, dealt out at random."""

    def __init__(self, seed: int):
        self.generator, self.__name__ = torch.Generator().manual_seed(seed), "shuffled_judge"

    def __call__(self, **kwargs) -> list[float]:
        rewards = shapes_judge(**kwargs)
        return [rewards[place] for place in torch.randperm(len(rewards), generator=self.generator)]


class Watch(TrainerCallback):
    """Follows a training; its clock stands still while it measures.

    Args:
        name: of the arm, for the lines of progress.
        limit: seconds after which a training ends that has no number of steps.
        dev: the score of dev prompts, at `POINTS` times.
        at_seconds: when to take `score` on the way.
    """

    def __init__(
        self,
        name: str,
        dev: Callable[[], float],
        score: Callable[[], dict] | None,
        limit: float | None = None,
        at_seconds: float = math.inf,
    ):
        self.name, self.dev, self.score, self.limit, self.at_seconds = name, dev, score, limit, at_seconds
        self.started, self.apart, self.trainer = 0.0, 0.0, None
        self.rewards, self.held_out, self.norms, self.on_the_way = [], [], [], None

    @property
    def seconds(self) -> float:
        return round(time.process_time() - self.started - self.apart, 1)

    def progress(self, state) -> float:
        """From 0 to 1."""
        return self.seconds / self.limit if self.limit else state.global_step / state.max_steps

    def measure(self, what: Callable):
        started = time.process_time()
        result = what()
        self.trainer.model.train()
        self.apart += time.process_time() - started
        return result

    def on_train_begin(self, args, state, control, **kwargs):
        self.started = time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        progress, at = self.progress(state), {"step": state.global_step, "seconds": self.seconds}
        if self.on_the_way is None and self.at_seconds < at["seconds"]:
            self.on_the_way = at | self.measure(self.score)
        if progress >= (len(self.held_out) + 1) / POINTS:
            self.held_out.append(at | {"dev": self.measure(self.dev)})
            if self.limit is None:
                self.norms.append(at | {"by_scale": self.measure(lambda: gradient_norms(self.trainer))})
            print(f"{self.name}: {progress:.0%}, {self.held_out[-1]}", file=sys.stderr, flush=True)
        if self.limit:
            control.should_training_stop |= progress >= 1

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "reward" in logs:
            row = {"step": state.global_step, "seconds": self.seconds}
            self.rewards.append(row | {name: round(logs[name], 4) for name in KEPT})
            if state.global_step % 25 == 0:
                print(f"{self.name}: {self.rewards[-1]}", file=sys.stderr, flush=True)


def gradient_norms(trainer: NextFlowGRPOTrainer) -> list[float]:
    """Of the gradient that each scale of the prefix gives alone, on the last rollouts."""
    rollouts = trainer._buffer[0]
    logps, _ = rollout_logps(trainer.model, rollouts, trainer.prefix, trainer.schedule, trainer.args)
    terms = -logps * rollouts.advantages[:, None] * trainer.token_weights
    parameters = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    norms = []
    for part in terms.split(list(trainer.prefix.lengths), dim=1):
        gradients = torch.autograd.grad(part.sum(dim=1).mean(), parameters, retain_graph=True, allow_unused=True)
        norms.append(torch.stack([each.norm() for each in gradients if each is not None]).norm().item())
    return [round(norm, 5) for norm in norms]


def mean_norms(rows: list[list[float]]) -> list[float]:
    """Of norms by scale, measured at several times."""
    return [round(statistics.mean(norms), 4) for norms in zip(*rows, strict=True)]


def score(model, processor, sampling: dict, prompts: int, split: str) -> dict:
    """Share of pictures that show what held-out prompts ask, over all and by category."""
    rows = text_to_image(Evaluator(model.eval(), processor, seed=0, **sampling), prompts, 1, split)
    return {name: row["score"] for name, row in rows.items()}


def shown_prompts() -> list[str]:
    return [request.text for category in CATEGORIES for request in held_out_prompts(category, SHOWN, 0, "test")]


def strip(model, processor, sampling: dict) -> Image.Image:
    """The first test prompts' pictures, side by side."""
    groups = Evaluator(model.eval(), processor, seed=0, **sampling).pictures(shown_prompts())
    return Image.fromarray(np.concatenate([group[0] for group in groups], axis=1))


def path_of(options, name: str, part: str | int) -> Path:
    """Where the result of an arm and a seed, or of a recipe in the sweep, goes."""
    return options.folder / f"{name}-{part}.json"


def finish(path: Path, result: dict, picture: Image.Image | None = None) -> dict:
    if picture is not None:
        write_atomically(path.with_suffix(".png"), lambda partial: picture.save(partial, format="PNG"))
    write_atomically(path, lambda partial: partial.write_text(json.dumps(result, indent=1)))
    return result


def load(options) -> tuple[NextFlowForConditionalGeneration, NextFlowProcessor]:
    model = NextFlowForConditionalGeneration.from_pretrained(options.model)
    model.model.vq_model.requires_grad_(False)
    model.set_attn_implementation("eager")  # the fastest backward at these lengths on a CPU
    return model, NextFlowProcessor.from_pretrained(options.model)


def run_before(name: str, part: int, options) -> dict:
    """The checkpoint as it is."""
    model, processor = load(options)
    dev = {name: score(model, processor, sampling, options.prompts, "dev") for name, sampling in SAMPLERS.items()}
    chosen = max(SAMPLERS, key=lambda name: dev[name]["overall"])
    test = score(model, processor, SAMPLERS[chosen], options.prompts, "test")
    result = {"sampler": chosen, "dev": dev, "test": test}
    return finish(path_of(options, name, part), result, strip(model, processor, SAMPLERS[chosen]))


def run_trial(name: str, recipe: str, before: dict, options) -> dict:
    """A training by one of `RECIPES`, scored on the dev split under the checkpoint's sampler."""
    model, processor = load(options)
    sampling = SAMPLERS[before["sampler"]]
    dev = lambda prompts: score(model, processor, sampling, prompts, "dev")["overall"]  # noqa: E731
    watch = Watch(f"sweep, {recipe}", lambda: dev(options.curve_prompts), None)
    trainer = policy_trainer("prefix", SWEEP_SEED, recipe, before, model, processor, watch, options)
    trainer.train()
    result = {"seconds": watch.seconds, "dev": dev(options.prompts), "held_out": watch.held_out}
    return finish(path_of(options, name, recipe), result | {"rewards": watch.rewards})


def run_arm(arm: str, seed: int, recipe: str, before: dict, options, seconds: float = math.inf) -> dict:
    """Train one arm from the checkpoint and score it; `seconds` are those of `prefix`."""
    model, processor = load(options)
    sampling = SAMPLERS[before["sampler"]]
    watch = Watch(
        f"{arm}, seed {seed}",
        lambda: score(model, processor, sampling, options.curve_prompts, "dev")["overall"],
        lambda: {"test": score(model, processor, sampling, options.prompts, "test")},
        limit=seconds if arm == "supervised" else None,
        at_seconds=seconds if arm == "vanilla" else math.inf,
    )
    if arm == "supervised":
        trainer = supervised(seed, model, processor, watch, options)
    else:
        trainer = policy_trainer(arm, seed, recipe, before, model, processor, watch, options)
    trainer.train()
    result = {"seconds": watch.seconds, "steps": trainer.state.global_step} | watch.measure(watch.score)
    if arm == "vanilla":  # one that took no longer than `prefix` is scored at its end
        result["at_equal_seconds"] = watch.on_the_way or dict(result)
    result |= {"held_out": watch.held_out, "gradient_norms": watch.norms, "rewards": watch.rewards}
    return finish(path_of(options, arm, seed), result, strip(model, processor, sampling))


def common_arguments(name: str, seed: int, options) -> dict:
    work = options.folder / "work" / f"{name}-{seed}"
    common = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "seed": seed, "use_cpu": True}
    return common | {"bf16": True, "output_dir": str(work), "weight_decay": 0.05, "adam_beta2": 0.95}


def followed(trainer, watch: Watch):
    trainer.remove_callback(PrinterCallback)  # standard output is for the result
    watch.trainer = trainer
    return trainer


def policy_trainer(
    arm: str, seed: int, recipe: str, before: dict, model, processor, watch: Watch, options
) -> NextFlowGRPOTrainer:
    """GRPO by one of `RECIPES`."""
    arguments = NextFlowGRPOConfig(
        lr_scheduler_type="linear",
        warmup_steps=options.steps // 10,
        num_generations=options.group,
        per_device_train_batch_size=options.group * options.prompts_at_once,
        prefix_tokens=None if arm == "vanilla" else options.prefix_tokens,
        max_steps=options.steps,
        logging_steps=min(5, options.steps),
        gradient_checkpointing=False,
        **common_arguments(arm, seed, options),
        **RECIPES[recipe],
    )
    reward = Shuffled(seed) if arm == "shuffled" else shapes_judge
    prompts = training_prompts(NUM_PROMPTS, seed, categories_by_need(before))
    adapters = lora_config(modules_to_save=None) if recipe.startswith("adapters") else None
    trainer = NextFlowGRPOTrainer(
        model, reward, arguments, prompts, processing_class=processor, peft_config=adapters, callbacks=[watch]
    )
    return followed(trainer, watch)


def categories_by_need(before: dict) -> list[str]:
    """Each category once, and once more for every tenth of its dev prompts that the checkpoint gets wrong."""
    scores = before["dev"][before["sampler"]]
    return [name for name in CATEGORIES for _ in range(1 + round(10 * (1 - scores[name])))]


def supervised(seed: int, model, processor, watch: Watch, options) -> NextFlowTrainer:
    """The recipe's trainer, whose learning rate follows the watch."""
    values = {"per_device_train_batch_size": options.packs_at_once, "max_steps": 1_000_000, "logging_steps": 50}
    arguments = NextFlowTrainingArguments(**values, **common_arguments("supervised", seed, options))
    optimizer = new_optimizer(model, arguments, options.supervised_learning_rate)
    decay = lambda: 0.02 + 0.49 * (1 + math.cos(math.pi * min(watch.progress(watch.trainer.state), 1)))  # noqa: E731
    schedule = LambdaLR(optimizer, lambda step: min((step + 1) / WARMUP, 1) * (decay() if step else 1))
    packs = PackedDataset(options.packs, model, processor, seed=seed)
    trainer = NextFlowTrainer(
        model, arguments, train_dataset=packs, callbacks=[watch], optimizers=(optimizer, schedule)
    )
    return followed(trainer, watch)


def prompts_in_common(before: dict, options) -> dict[str, int]:
    """How many prompts the splits have, and how many training shares with them."""
    trained = {
        row["prompt"][0]["content"]
        for seed in (SWEEP_SEED, *range(1, options.seeds + 1))
        for row in training_prompts(NUM_PROMPTS, seed, categories_by_need(before))
    }
    texts = {
        split: [r.text for category in CATEGORIES for r in held_out_prompts(category, options.prompts, 0, split)]
        for split in ("dev", "test")
    }
    return {
        "trained on": len(trained),
        "test": len(texts["test"]),
        "test, different": len(set(texts["test"])),
        "test and training": len(trained & set(texts["test"])),
        "test and dev": len(set(texts["dev"]) & set(texts["test"])),
        "dev and training": len(trained & set(texts["dev"])),
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of the checkpoint")
    parser.add_argument("packs", help="folder of the recipe's packs")
    parser.add_argument("--folder", type=Path, default=Path("runs/grpo-benchmark"), help="of finished arms")
    parser.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--recipe", choices=RECIPES, help="of GRPO; default: the best of the sweep on the dev split")
    parser.add_argument("--steps", type=int, default=100, help="of GRPO (default: %(default)s)")
    parser.add_argument("--group", type=int, default=8, help="pictures of a prompt (default: %(default)s)")
    parser.add_argument("--prompts-at-once", type=int, default=16, help="of a step (default: %(default)s)")
    parser.add_argument("--prefix-tokens", type=int, default=10, help="default: %(default)s, four of six scales")
    parser.add_argument("--supervised-learning-rate", type=float, default=PEAK, help="default: %(default)s")
    parser.add_argument("--packs-at-once", type=int, default=PACKS, help="of a step (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=50, help="for each of six categories (default: %(default)s)")
    parser.add_argument("--curve-prompts", type=int, default=20, help="the same along the way (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="JSON file (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args(arguments)


def settings_of(options: argparse.Namespace) -> dict[str, str]:
    left_out = ("folder", "output", "json", "seeds", "recipe")
    settings = {name: str(value) for name, value in vars(options).items() if name not in left_out}
    return settings | {"samplers": json.dumps(SAMPLERS)}


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    check_plan(options.folder, {"settings": settings_of(options)})
    seeds = range(1, options.seeds + 1)
    done: dict[str, dict[int, dict]] = {arm: {} for arm in ARMS}

    def run(function: Callable, jobs: list[tuple]) -> dict[tuple, dict]:
        """Results by the first two arguments; those of finished jobs are read."""
        paths = {job[:2]: path_of(options, *job[:2]) for job in jobs}
        todo = [job for job in jobs if not paths[job[:2]].exists()]
        for job, outcome in in_processes(function, todo) if todo else ():
            found = outcome["test"]["overall"] if "test" in outcome else outcome["dev"]
            print(f"{job[0]}, {job[1]}: {found} after {outcome.get('seconds', 0)} s", file=sys.stderr, flush=True)
        return {job: json.loads(path.read_text()) for job, path in paths.items()}

    (before,) = run(run_before, [("before", 0, options)]).values()
    common = prompts_in_common(before, options)
    if common["test and training"]:
        raise ValueError(f"training shares {common['test and training']} prompts with the test split")
    recipe, sweep = options.recipe, None
    if recipe is None:
        trials = run(run_trial, [("sweep", name, before, options) for name in RECIPES])
        sweep = {name: row["dev"] for (_, name), row in trials.items()}
        recipe = max(RECIPES, key=sweep.get)
    check_plan(options.folder / "arms", {"settings": {"recipe": RECIPES[recipe]}})
    # two phases, since `vanilla` and `supervised` need the seconds of `prefix`
    given = recipe, before, options
    arms = run(run_arm, [(arm, seed, *given) for arm in ("prefix", "shuffled") for seed in seeds])
    spent = {seed: arms["prefix", seed]["seconds"] for seed in seeds}
    rest = [(arm, seed, *given, spent[seed]) for arm in ("vanilla", "supervised") for seed in seeds]
    for (arm, seed), outcome in (arms | run(run_arm, rest)).items():
        done[arm][seed] = outcome

    def gains(scores: list[dict]) -> dict:
        return interval([round(row["test"]["overall"] - before["test"]["overall"], 4) for row in scores])

    gain = {arm: gains([done[arm][seed] for seed in seeds]) for arm in ARMS}
    at_equal_seconds = [done["vanilla"][seed]["at_equal_seconds"] for seed in seeds]
    ends = {arm: [done[arm][seed]["test"]["overall"] for seed in seeds] for arm in ARMS}
    lead = lambda others: interval([round(p - v, 4) for p, v in zip(ends["prefix"], others, strict=True)])  # noqa: E731
    result = {
        "sweep": {"chosen": recipe, "recipe": RECIPES[recipe], "dev": sweep},
        "prompts": common,
        "before": before,
        "gain": gain | {"vanilla, at the seconds of prefix": gains(at_equal_seconds)},
        "prefix against vanilla": {
            "paper": PAPER,
            "at equal rollouts": lead(ends["vanilla"]),
            "at equal seconds": lead([row["test"]["overall"] for row in at_equal_seconds]),
            "seconds": {arm: [done[arm][seed]["seconds"] for seed in seeds] for arm in ("prefix", "vanilla")},
        },
        "mean gradient norm by scale": {
            arm: mean_norms([row["by_scale"] for seed in seeds for row in done[arm][seed]["gradient_norms"]])
            for arm in ("prefix", "vanilla")
        },
        "goals": {
            "prefix rises by 0.10": gain["prefix"]["mean"] >= 0.10,
            "shuffled stays within 0.05": abs(gain["shuffled"]["mean"]) <= 0.05,
        },
        "categories": {
            arm: {
                name: round(statistics.mean(done[arm][seed]["test"][name] for seed in seeds), 4)
                for name in before["test"]
            }
            for arm in ARMS
        },
        "arms": {arm: {str(seed): done[arm][seed] for seed in seeds} for arm in ARMS},
        "settings": settings_of(options)
        | {name: Path(getattr(options, name)).name for name in ("model", "packs")}
        | {"seeds": options.seeds},
        "machine": machine(torch.device("cpu")) | {"threads": 1},
    }
    strips = {"before": path_of(options, "before", 0)} | {arm: path_of(options, arm, seeds[0]) for arm in ARMS}
    sheets = {
        "curves": draw_curves(done, before["test"]["overall"], before["dev"][before["sampler"]]["overall"]),
        "pictures": draw_strips(
            {name: Image.open(path.with_suffix(".png")) for name, path in strips.items()}, shown_prompts()
        ),
    }
    for name, sheet in sheets.items():
        path = options.output.with_name(f"{options.output.stem}_{name}.png")
        write_atomically(path, lambda partial, sheet=sheet: sheet.save(partial, format="PNG"))
    report(result, options.json, options.output)


if __name__ == "__main__":
    main()
