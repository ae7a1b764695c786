"""Score a checkpoint on the emoji world: `python -m examples.emoji.evaluate --json --output scores.json`.

For every group of prompts of the test split, apart by kind and by whether the target was held out: the model's share,
its 95% interval and number of prompts, the vision tokenizer's own on the truth (the ceiling), and baselines. One
picture for each prompt from the seed of its number, none chosen. Groups are in `groups.py`, what is right in
`scoring.py` and `judge.py`.
"""

import argparse
import time
from pathlib import Path

import torch
from tqdm.auto import tqdm

from benchmarks.harness import machine, report, save
from transformers_nextflow import NextFlowForConditionalGeneration, NextFlowProcessor
from transformers_nextflow.utils.loading import DEFAULT_MODEL

from .artist import Artist
from .groups import GROUPS
from .scoring import Exam
from .tasks import Tasks
from .world import World

SAMPLING = ("guidance_scale", "temperature", "top_k", "top_p")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", type=Path, default=DEFAULT_MODEL, help="folder of the checkpoint (default: %(default)s)"
    )
    parser.add_argument("--data", type=Path, default=Path("runs/emoji/data"), help="of `examples.emoji.data`")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--output", type=Path, help="also write the JSON to this file, after each group")


def load_artist(folder: Path, data: Path, device: torch.device, **sampling) -> Artist:
    """The checkpoint in a folder, before the data set in another."""
    model = NextFlowForConditionalGeneration.from_pretrained(folder).to(device).eval()
    return Artist(model, NextFlowProcessor.from_pretrained(folder), World(data), **sampling)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser)
    parser.add_argument("--split", choices=("test", "dev"), default="test", help="dev is for choosing settings")
    parser.add_argument("--prompts", type=int, default=1_000, help="of a figure, or all that its split has")
    parser.add_argument(
        "--only", nargs="+", choices=GROUPS, default=list(GROUPS), metavar="GROUP", help=", ".join(GROUPS)
    )
    sampling = parser.add_argument_group("sampling (default: the checkpoint's own)")
    for name in SAMPLING:
        sampling.add_argument(f"--{name.replace('_', '-')}", type=int if name == "top_k" else float)
    arguments = parser.parse_args()
    if arguments.prompts < 1:
        parser.error(f"--prompts must be at least 1, got {arguments.prompts}")
    given = {name: getattr(arguments, name) for name in SAMPLING if getattr(arguments, name) is not None}
    artist = load_artist(arguments.model, arguments.data, arguments.device, **given)
    exam = Exam(artist, Tasks.of(artist.world), arguments.split, arguments.prompts)
    scores = {
        "settings": {
            "split": exam.split,
            "prompts": exam.prompts,
            "pictures_per_prompt": 1,
            "sampling": artist.model.config.image_generation | given,
        },
        "machine": machine(arguments.device),
        "seconds": {},
    }
    for group in tqdm(arguments.only, desc="groups"):
        started = time.perf_counter()
        scores[group] = GROUPS[group](exam)
        scores["seconds"][group] = round(time.perf_counter() - started, 1)
        if arguments.output:
            save(scores, arguments.output)
    report(scores, arguments.json)


if __name__ == "__main__":
    main()
