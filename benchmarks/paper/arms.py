"""What the paper's claims share here: arms trained over several seeds, held-out losses along the way, intervals, and
the paper's sign beside ours.

Arms of a claim differ in one thing. A seed is the start of the weights and the order of the packs, the same in every
arm, so differences are taken seed by seed. An arm that is finished is not trained again.
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

import torch
from transformers import PrinterCallback, TrainerCallback

from benchmarks.harness import in_processes, interval, machine, report
from examples.shapes.transformer import EXTRACTION, PACKS, new_model, new_trainer
from transformers_nextflow import NextFlowForConditionalGeneration, NextFlowProcessor, NextFlowVQModel
from transformers_nextflow.data import PackCollator, PackedDataset
from transformers_nextflow.data.extraction import check_plan
from transformers_nextflow.files import write_atomically
from transformers_nextflow.losses import IGNORE
from transformers_nextflow.training import NextFlowTrainer

RESULTS = Path(__file__).parents[1] / "results" / "paper"
HELD_OUT = dataclasses.replace(EXTRACTION, self_correction=None, drop_text=0.0, seed=1)  # documents of another seed
COARSE_SCALES = 4  # of six: which colour and kind stand where; the last two draw it
POINTS = 10  # of a curve
SIGNS = ("-", "+", "0 or -", None)


@dataclass(frozen=True)
class Claim:
    """A difference that the paper speaks of: `measure` of the arm `first` minus that of `second`.

    Args:
        says, where: the paper, in words, and its figure, table or section; None where it does not speak of it after
            all, and the difference is shown beside those of which it does.
        sign: of the difference in the paper, one of `SIGNS`.
    """

    says: str | None
    where: str | None
    first: str
    second: str
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
    first, second = ([runs[arm][seed] for seed in seeds] for arm in (claim.first, claim.second))
    ours = interval([a["final"][claim.measure] - b["final"][claim.measure] for a, b in zip(first, second)])
    result = {
        "paper": {"says": claim.says, "where": claim.where, "sign": claim.sign},
        "difference": f"{claim.measure}: {claim.first} - {claim.second}",
        "ours": ours,
        "verdict": verdict(ours, claim.sign),
    }
    points = []
    for rows in zip(*(run.get("curve", []) for run in first + second)):
        if claim.measure not in rows[0]:
            break
        halves = rows[: len(seeds)], rows[len(seeds) :]
        difference = interval([a[claim.measure] - b[claim.measure] for a, b in zip(*halves)])
        points.append(
            {
                "step": rows[0]["step"],
                "samples": [round(statistics.mean(row["samples"] for row in half)) for half in halves],
                "means": [round(statistics.mean(row[claim.measure] for row in half), 5) for half in halves],
                "difference": difference["mean"],
                "half_interval": difference["half_interval"],
            }
        )
    return result | ({"along_the_way": points} if points else {})


def summary(claims: Sequence[Claim], runs: dict[str, dict[int, dict]]) -> dict:
    """Every measure of every arm over the seeds, and the claims.

    Args:
        runs: by arm and seed, `final` measures and, of some, a `curve` of them.
    """
    arms = {}
    for arm, by_seed in runs.items():
        finals = [by_seed[seed]["final"] for seed in sorted(by_seed)]
        arms[arm] = {name: interval([final[name] for final in finals]) for name in finals[0]}
    return {"claims": [compare(claim, runs) for claim in claims], "arms": arms}


def parse(description: str, needs: Sequence[str], steps: int, documents: int | None = None) -> argparse.Namespace:
    """Options of a claim, whose RUN must hold the folders `needs`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder that examples.shapes.train wrote")
    parser.add_argument("--folder", type=Path, default=Path("runs/paper"), help="of packs and finished arms")
    parser.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=steps, help="of each arm (default: %(default)s)")
    if documents is not None:
        parser.add_argument("--documents", type=int, default=documents, help="trained on (default: %(default)s)")
    parser.add_argument("--held-out", type=int, default=200, help="documents or pictures (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="JSON file (default: benchmarks/results/paper/CLAIM.json)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    for name in needs:
        if not (options.run / name).exists():
            parser.error(f"{options.run} holds no {name}: train it further with examples.shapes.train")
    return options


def begin(name: str, options: argparse.Namespace) -> Path:
    """The claim's folder, which holds arms of one setting alone."""
    folder = options.folder / name
    check_plan(folder, {"settings": settings_of(options)})
    return folder


def settings_of(options: argparse.Namespace) -> dict:
    left_out = ("folder", "output", "json", "seeds")
    return {name: str(value) for name, value in vars(options).items() if name not in left_out}


def untrained(
    run: Path, seed: int, vq_model: NextFlowVQModel | None = None, **config
) -> tuple[NextFlowForConditionalGeneration, NextFlowProcessor]:
    """The recipe's transformer at its start around a vision tokenizer, by default that of the joint stage."""
    processor = NextFlowProcessor.from_pretrained(run / "start")
    vq_model = NextFlowVQModel.from_pretrained(run / "joint") if vq_model is None else vq_model
    return new_model(processor.tokenizer, vq_model, seed, **config), processor


class HeldOut(TrainerCallback):
    """Cross-entropies of held-out packs, unweighted, at `POINTS` steps of a training.

    `rows` have `step`, `samples` (documents trained on) and, for each set of packs, after its prefix: `text`,
    `vision`, `coarse` (the codes of the first `COARSE_SCALES` scales), `fine` (the others), `scale_1` ..

    Args:
        sets: prefix of the names to packs.
    """

    def __init__(self, sets: dict[str, PackedDataset]):
        self.batches, self.rows, self.trainer = {}, [], None
        for prefix, packs in sets.items():
            collator, starts = PackCollator(packs), range(0, len(packs), PACKS)
            self.batches[prefix] = [
                collator([packs[index] for index in range(start, min(start + PACKS, len(packs)))]) for start in starts
            ]

    def on_step_end(self, args, state, control, model=None, **kwargs):
        ends = {-(-args.max_steps * point // POINTS) for point in range(1, POINTS + 1)}
        if state.global_step in ends:
            row = {"step": state.global_step, "samples": self.trainer.samples}
            model.eval()
            for prefix, batches in self.batches.items():
                row |= {prefix + name: round(value, 5) for name, value in self.losses(model, batches).items()}
            model.train()
            self.rows.append(row)

    @torch.no_grad()
    def losses(self, model: NextFlowForConditionalGeneration, batches: list[dict]) -> dict[str, float]:
        num_scales = model.model.schedules.max_scales
        sums, counts = torch.zeros(2, 1 + num_scales, dtype=torch.float64)
        for batch in batches:
            with torch.autocast("cpu", torch.bfloat16):
                token_losses = model(**batch, logits_over="none", use_cache=False).token_losses
            layout = model.model.lay_out(
                batch["input_ids"], batch.get("image_grid_hw"), document_ids=batch["document_ids"]
            )
            at = batch["shift_labels"] != IGNORE
            losses = token_losses[at].double()
            sums.index_add_(0, layout.scale_ids[at], losses)
            counts.index_add_(0, layout.scale_ids[at], torch.ones_like(losses))
        scales = {f"scale_{scale}": slice(scale, scale + 1) for scale in range(1, 1 + num_scales)}
        groups = {"text": slice(0, 1), "vision": slice(1, None)}
        groups |= {"coarse": slice(1, 1 + COARSE_SCALES), "fine": slice(1 + COARSE_SCALES, None)} | scales
        return {name: float(sums[at].sum() / counts[at].sum()) for name, at in groups.items() if counts[at].sum()}


class ArmTrainer(NextFlowTrainer):
    """Counts the documents that it trains on, as `samples`."""

    samples = 0

    def compute_loss(self, model, inputs, **kwargs):
        self.samples += int((inputs["document_ids"].amax(dim=1) + 1).sum())
        return super().compute_loss(model, inputs, **kwargs)


def train_arm(
    folder: Path,
    model: NextFlowForConditionalGeneration,
    processor: NextFlowProcessor,
    packs: Path,
    held_out: HeldOut,
    steps: int,
    seed: int,
    packs_of_a_step: int = PACKS,
) -> dict:
    """Train as the recipe does, on one process; returns the CPU's seconds, the `curve` of held-out losses and the
    `final` ones."""
    values = {"save_strategy": "no", "warmup_steps": min(100, steps // 4)}
    trainer = new_trainer(
        *(folder / "work", model, processor, packs, packs_of_a_step, steps, seed, ArmTrainer, values),
        callbacks=[held_out],
    )
    trainer.remove_callback(PrinterCallback)  # standard output is for the result
    held_out.trainer = trainer
    started = time.process_time()
    trainer.train()
    final = {name: value for name, value in held_out.rows[-1].items() if name not in ("step", "samples")}
    return {"cpu_seconds": round(time.process_time() - started, 1), "curve": held_out.rows, "final": final}


def run_arms(
    folder: Path, function: Callable[[str, int, argparse.Namespace], dict], arms: Sequence[str], options
) -> dict[str, dict[int, dict]]:
    """Results of `function(arm, seed, options)` by arm and seed, each arm in a process of one thread; those of
    finished arms are read from `folder`."""
    paths = {(arm, seed): folder / f"{arm}-{seed}.json" for seed in range(1, options.seeds + 1) for arm in arms}
    todo = [(function, path, *job, options) for job, path in paths.items() if not path.exists()]
    for (_, path, arm, seed, _), seconds in in_processes(_run, todo) if todo else ():
        print(f"{arm}, seed {seed}: {seconds:.0f} s of CPU, {path}", file=sys.stderr, flush=True)
    runs: dict[str, dict[int, dict]] = {}
    for (arm, seed), path in paths.items():
        runs.setdefault(arm, {})[seed] = json.loads(path.read_text())
    return runs


def _run(function: Callable, path: Path, arm: str, seed: int, options) -> float:
    started = time.process_time()
    result = function(arm, seed, options)
    write_atomically(path, lambda partial: partial.write_text(json.dumps(result, indent=1)))
    return time.process_time() - started


def conclude(name: str, claims: Sequence[Claim], runs: dict, options, notes: Sequence[str] = ()) -> None:
    """Print and write the summary, with what a reader must know beside it."""
    result = summary(claims, runs) | {
        "notes": list(notes),
        "cpu_seconds": {
            arm: [round(run["cpu_seconds"]) for _, run in sorted(by_seed.items())] for arm, by_seed in runs.items()
        },
        "settings": {name: value for name, value in settings_of(options).items() if name != "run"}
        | {"seeds": options.seeds},
        "machine": machine(torch.device("cpu")),
    }
    report(result, options.json, options.output or RESULTS / f"{name}.json")
