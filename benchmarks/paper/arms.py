"""What the paper's claims share: arms that differ in one thing, trained over several seeds, held-out losses along the
way, and the paper's sign beside ours.

A seed is the start of the weights and the order of the packs, the same in every arm, so differences are taken seed by
seed. RUN is a folder that `examples.emoji.train` wrote. An arm that is finished is not trained again.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PrinterCallback, TrainerCallback

from benchmarks.harness import in_processes, interval, machine, report
from examples.emoji.attention import DOCUMENTS
from examples.emoji.documents import EXTRACTION, Stage, build_packs
from examples.emoji.judge import Judge
from examples.emoji.sizes import LEVELS
from examples.emoji.splits import PAIR
from examples.emoji.stages import settings
from examples.emoji.tasks import Item
from examples.emoji.transformer import TRAININGS, WEIGHT_DECAY, new_model, new_optimizer, new_processor
from transformers_nextflow import NextFlowForConditionalGeneration, NextFlowProcessor, NextFlowVQModel
from transformers_nextflow.data import ExtractionSettings, FixedLength, PackCollator, PackedDataset
from transformers_nextflow.data.extraction import check_plan
from transformers_nextflow.losses import IGNORE
from transformers_nextflow.training import NextFlowTrainer, NextFlowTrainingArguments
from transformers_nextflow.utils.files import output_folder, write_atomically

RESULTS = Path(__file__).parents[1] / "results" / "paper"
RECIPE = TRAININGS["pretraining-64"]
HALVES = 2  # of a step, which one process takes in turn
T2I = Stage("64", {"text-to-image": 1.0})
MIXTURE = Stage("64", {"text-to-image": 0.5, "captioning": 0.2, "editing": 0.3})
HELD_OUT = dataclasses.replace(EXTRACTION, self_correction=None, variants=1, drop_text=0.0)
COARSE_SCALES = LEVELS["32"]  # what the lower level has
POINTS = 10  # of a curve
SIGNS = ("-", "+", "0 or -", None)


@dataclass(frozen=True)
class Claim:
    """A difference that the paper speaks of: `measure` of the arm `first` minus that of `second`, or of nothing.

    Args:
        second: None where the measure is a difference itself.
        says, where: the paper, in words, and its figure, table or section; None where it does not speak of it, and the
            difference is shown beside those of which it does.
        sign: of the difference in the paper, one of `SIGNS`.
    """

    says: str | None
    where: str | None
    first: str
    second: str | None
    measure: str
    sign: str | None

    def __post_init__(self):
        if self.sign not in SIGNS:
            raise ValueError(f"sign must be one of {SIGNS}, got {self.sign!r}")


def verdict(difference: dict, sign: str | None) -> str:
    """Whether a difference, as [`interval`] gives it, has the paper's sign."""
    if sign is None:
        return "no claim of the paper's"
    if difference["half_interval"] is None:
        return "one seed has no interval"
    if abs(difference["mean"]) <= difference["half_interval"]:
        return "the interval holds 0"
    return "agree" if (difference["mean"] > 0) == (sign == "+") else "disagree"


def compare(claim: Claim, runs: dict[str, dict[int, dict]]) -> dict:
    """The paper's word on a difference and ours: at the end, and along the way where the arms have curves."""
    seeds = sorted(runs[claim.first])
    nothing = {seed: {"final": {claim.measure: 0.0}} for seed in seeds}
    first = [runs[claim.first][seed] for seed in seeds]
    second = [runs.get(claim.second, nothing)[seed] for seed in seeds]
    ours = interval([a["final"][claim.measure] - b["final"][claim.measure] for a, b in zip(first, second)])
    result = {
        "paper": {"says": claim.says, "where": claim.where, "sign": claim.sign},
        "difference": f"{claim.measure}: {claim.first} - {claim.second or 'nothing'}",
        "ours": ours,
        "verdict": verdict(ours, claim.sign),
    }
    points = []
    for rows in zip(*(run.get("curve", []) for run in first + second)):
        if claim.measure not in rows[0]:
            break
        halves = [[row[claim.measure] for row in half] for half in (rows[: len(seeds)], rows[len(seeds) :])]
        difference = interval([a - b for a, b in zip(*halves)])
        means = [round(statistics.mean(half), 5) for half in halves]
        del difference["seeds"]
        points.append({"step": rows[0]["step"], "means": means, "difference": difference})
    return result | ({"along_the_way": points} if points else {})


def summary(claims: Sequence[Claim], runs: dict[str, dict[int, dict]]) -> dict:
    """The claims, and every measure of every arm over the seeds.

    Args:
        runs: by arm and seed, `final` measures and, of some, a `curve` of them.
    """
    arms = {}
    for arm, by_seed in runs.items():
        finals = [by_seed[seed]["final"] for seed in sorted(by_seed)]
        arms[arm] = {name: interval([final[name] for final in finals]) for name in finals[0]}
    return {"claims": [compare(claim, runs) for claim in claims], "arms": arms}


def parse(description: str, needs: Sequence[str], steps: int) -> argparse.Namespace:
    """Options of a claim, whose RUN must hold the folders `needs`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder that examples.emoji.train wrote")
    parser.add_argument("--data", type=Path, help="the data set (default: RUN/data)")
    parser.add_argument("--folder", type=Path, default=Path("runs/paper"), help="of packs and finished arms")
    parser.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=steps, help="of each arm (default: %(default)s)")
    parser.add_argument("--documents", type=int, default=12_000, help="trained on (default: %(default)s)")
    parser.add_argument("--held-out", type=int, default=200, help="documents or pictures (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="JSON file (default: benchmarks/results/paper/CLAIM.json)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    options.data = options.run / "data" if options.data is None else options.data
    for folder in (options.data, *(options.run / name for name in needs)):
        if not folder.exists():
            parser.error(f"there is no {folder}: make it with examples.emoji.data or examples.emoji.train")
    return options


def conduct(
    name: str,
    description: str,
    claims: Sequence[Claim],
    arms: Sequence[str],
    run_arm: Callable[[Path, str, int, argparse.Namespace], dict],
    prepare: Callable[[Path, argparse.Namespace], None] = lambda folder, options: None,
    needs: Sequence[str] = ("start",),
    steps: int = 250,
) -> None:
    """A claim's command: `prepare(folder, options)`, then `run_arm(folder, arm, seed, options)` for every arm and
    seed, then the summary, printed and written.

    Args:
        description: the docstring of the claim's module.
        run_arm: returns `final` measures, `cpu_seconds` and where there is one a `curve`.
        prepare: codes what the arms share.
        needs: folders that RUN must hold.
        steps: of each arm, by default.
    """
    options = parse(description, needs, steps)
    folder = options.folder / name
    check_plan(folder, {"settings": settings_of(options)})
    prepare(folder, options)
    runs = run_arms(folder, run_arm, arms, options)
    result = summary(claims, runs) | {
        "cpu_seconds": {
            arm: [run["cpu_seconds"] for _, run in sorted(by_seed.items())] for arm, by_seed in runs.items()
        },
        "settings": {option: value for option, value in settings_of(options).items() if option not in ("run", "data")},
        "machine": machine(torch.device("cpu")) | {"threads": 1},
    }
    report(result, options.json, options.output or RESULTS / f"{name}.json")


def settings_of(options: argparse.Namespace) -> dict:
    """What finished arms depend on: another number of seeds keeps them."""
    left_out = ("folder", "output", "json", "seeds")
    return {name: str(value) for name, value in vars(options).items() if name not in left_out}


def run_arms(folder: Path, function: Callable, arms: Sequence[str], options) -> dict[str, dict[int, dict]]:
    """Results of `function(folder, arm, seed, options)` by arm and seed, each in a process of one thread; those of
    finished arms are read from `folder`."""
    paths = {(arm, seed): folder / f"{arm}-{seed}.json" for seed in range(1, options.seeds + 1) for arm in arms}
    todo = [(function, path, folder, *job, options) for job, path in paths.items() if not path.exists()]
    for (_, path, *_), result in in_processes(_run, todo) if todo else ():
        print(f"{path}: {result['cpu_seconds']} s of CPU", file=sys.stderr, flush=True)
    runs: dict[str, dict[int, dict]] = {}
    for (arm, seed), path in paths.items():
        runs.setdefault(arm, {})[seed] = json.loads(path.read_text())
    return runs


def _run(function: Callable, path: Path, folder: Path, arm: str, seed: int, options) -> dict:
    result = function(folder, arm, seed, options)
    write_atomically(path, lambda partial: partial.write_text(json.dumps(result, indent=1)))
    return result


def untrained(
    run: Path, seed: int, vq_model: NextFlowVQModel | None = None, **config
) -> tuple[NextFlowForConditionalGeneration, NextFlowProcessor]:
    """The recipe's transformer at its start around a vision tokenizer, by default RUN's."""
    tokenizer = NextFlowProcessor.from_pretrained(run / "start").tokenizer
    if vq_model is None:
        vq_model = NextFlowForConditionalGeneration.from_pretrained(run / "start").model.vq_model
    model = new_model(tokenizer, vq_model, seed, **config)
    return model, new_processor(model, tokenizer)


def code(
    folder: Path, options, stage: Stage, extraction: ExtractionSettings = EXTRACTION, start: Path | None = None
) -> Path:
    """Packs of `options.documents` documents that are trained on, or of `options.held_out` that are not; coded by the
    tokenizers in `start`, by default RUN's."""
    held_out = stage.split != "train"
    return build_packs(
        folder,
        start or options.run / "start",
        options.data,
        stage,
        options.held_out if held_out else options.documents,
        extraction,
        FixedLength(RECIPE.pack_length),
        1 if held_out else RECIPE.packs,
    )


def dev(stage: Stage) -> Stage:
    """The same of pairs of name and style that no training sees."""
    return dataclasses.replace(stage, split="dev", part=PAIR)


def save_start(folder: Path, model: NextFlowForConditionalGeneration, processor: NextFlowProcessor) -> Path:
    """Tokenizers other than RUN's, for [`code`]."""
    if not folder.exists():
        with output_folder(folder) as partial:
            model.save_pretrained(partial)
            processor.save_pretrained(partial)
    return folder


class HeldOut(TrainerCallback):
    """Cross-entropies of held-out packs, unweighted, at `POINTS` steps of a training.

    `rows` have `step` and, for each set of packs, after its prefix: `text`, `vision`, `coarse` (the codes of the first
    `COARSE_SCALES` scales) and `fine` (the others).

    Args:
        sets: prefix of the names to packs.
    """

    def __init__(self, sets: dict[str, PackedDataset]):
        self.rows = []
        self.batches = {
            prefix: [PackCollator(packs)([packs[index]]) for index in range(len(packs))]
            for prefix, packs in sets.items()
        }

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step in {-(-args.max_steps * point // POINTS) for point in range(1, POINTS + 1)}:
            row = {"step": state.global_step}
            model.eval()
            for prefix, batches in self.batches.items():
                row |= {prefix + name: round(value, 5) for name, value in self.losses(model, batches).items()}
            model.train()
            self.rows.append(row)

    @torch.no_grad()
    def losses(self, model: NextFlowForConditionalGeneration, batches: list[dict]) -> dict[str, float]:
        sums, counts = torch.zeros(2, 1 + model.model.schedules.max_scales, dtype=torch.float64)
        for batch in batches:
            output = model(**batch, logits_over="none", use_cache=False)
            at = batch["shift_labels"] != IGNORE
            losses, scales = output.token_losses[at].double(), output.scale_ids[at]
            sums.index_add_(0, scales, losses)
            counts.index_add_(0, scales, torch.ones_like(losses))
        groups = {"text": slice(0, 1), "vision": slice(1, None)}
        groups |= {"coarse": slice(1, 1 + COARSE_SCALES), "fine": slice(1 + COARSE_SCALES, None)}
        return {name: float(sums[at].sum() / counts[at].sum()) for name, at in groups.items() if counts[at].sum()}


def train_arm(
    folder: Path,
    parts: tuple[NextFlowForConditionalGeneration, NextFlowProcessor],
    packs: Path,
    held_out: dict[str, Path],
    steps: int,
    seed: int,
    packs_of_a_half: int = RECIPE.packs // HALVES,
    losses_class: type[HeldOut] = HeldOut,
) -> dict:
    """Train a model and its processor as the recipe does, in one process.

    Args:
        held_out: prefix of the names of held-out losses to packs.

    Returns:
        The CPU's seconds, the `curve` of held-out losses and the `final` ones.
    """
    model, processor = parts
    model.model.vq_model.requires_grad_(False)
    model.set_attn_implementation({"text_config": DOCUMENTS})
    values = settings(steps, RECIPE.peak, RECIPE.decay_share) | {
        "use_cpu": True,
        "save_strategy": "no",
        "weight_decay": WEIGHT_DECAY,
        "per_device_train_batch_size": packs_of_a_half,
        "gradient_accumulation_steps": HALVES,
        "seed": seed,
    }
    arguments = NextFlowTrainingArguments(folder / "work", **values)
    losses = losses_class({prefix: PackedDataset(each, model, processor) for prefix, each in held_out.items()})
    trainer = NextFlowTrainer(
        model,
        arguments,
        train_dataset=PackedDataset(packs, model, processor, seed=seed),
        optimizers=(new_optimizer(model, arguments, RECIPE.peak), None),
        callbacks=[losses],
    )
    trainer.remove_callback(PrinterCallback)  # standard output is for the result
    started = time.process_time()
    trainer.train()
    model.eval()
    final = {name: value for name, value in losses.rows[-1].items() if name != "step"}
    return {"cpu_seconds": round(time.process_time() - started, 1), "curve": losses.rows, "final": final}


def share_right(judge: Judge, drawings: Sequence[np.ndarray], items: Sequence[Item]) -> float:
    """R@1 of pictures that were asked for alone."""
    return round(float(judge.right(drawings, [item.targets[0] for item in items])["picture"].mean()), 4)
