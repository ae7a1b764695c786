"""Whether images that are only read should carry their last scale as one more input block: captions and edits with and
without it, at equal training: `python -m benchmarks.condition_images RUN --json`.

RUN is a folder in which `examples.shapes.train` has trained the tokenizer. Each arm trains from new weights on the
same captions and edits in the same order; text-to-image shows no condition and is left out. Arms differ in
`condition_last_scale` alone, seeds in weights and order. Scores are of the dev split, by the judge.
"""

import argparse
import random
from pathlib import Path

import torch

from benchmarks.harness import in_processes, interval, machine, report
from examples.shapes.assemble import IMAGE_GENERATION
from examples.shapes.evaluate import Evaluator, captions, edits
from examples.shapes.text import train_text_tokenizer
from examples.shapes.transformer import code_documents, new_model, new_processor, train_on_packs
from examples.shapes.world import sample_scene
from transformers_nextflow import NextFlowVQModel

OUTPUT = Path(__file__).parent / "results" / "condition_images.json"
MIXTURE = {"caption": 0.3, "edit": 0.7}


def start_of(run: Path, seed: int, last_scale: bool):
    tokenizer, vq_model = train_text_tokenizer(), NextFlowVQModel.from_pretrained(run / "joint")
    model = new_model(tokenizer, vq_model, seed=seed, condition_last_scale=last_scale)
    return model, new_processor(model, tokenizer), tokenizer


def folder_of(run: Path, last_scale: bool) -> Path:
    return run / "condition_images" / ("with" if last_scale else "without")


def run_arm(run: Path, seed: int, last_scale: bool, steps: int, count: int) -> dict[str, float]:
    """Train one arm and score it."""
    model, processor, _ = start_of(run, seed, last_scale)
    folder = folder_of(run, last_scale)
    train_on_packs(folder / f"seed-{seed}", model, processor, folder / "packs", steps, seed)
    model.config.image_generation |= IMAGE_GENERATION
    evaluator = Evaluator(model.eval(), processor, seed=0)
    return {
        "captions": captions(evaluator, dev_scenes(5 * count))["score"],
        "edits": edits(evaluator, count, "dev")["overall"]["score"],
    }


def dev_scenes(count: int) -> list:
    rng = random.Random("condition images, dev")
    return [sample_scene(rng, training=False) for _ in range(count)]


def summary(scores: dict[str, list[float]]) -> dict:
    return {name: interval(values) for name, values in scores.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder that examples.shapes.train wrote")
    parser.add_argument("--documents", type=int, default=30_000, help="trained on (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=3_000, help="of each arm (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--count", type=int, default=40, help="edits for each operation, and five captions for each")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    for last in (True, False):
        model, _, tokenizer = start_of(arguments.run, 1, last)
        code_documents(folder_of(arguments.run, last), model, tokenizer, arguments.documents, MIXTURE)
    arms: dict[bool, dict[str, list[float]]] = {True: {}, False: {}}
    pairs: dict[int, dict[bool, dict]] = {}
    seeds = range(1, arguments.seeds + 1)
    jobs = [(arguments.run, seed, last, arguments.steps, arguments.count) for seed in seeds for last in (True, False)]
    for (_, seed, last, *_), scores in in_processes(run_arm, jobs):
        print(f"seed {seed}, last scale {'with' if last else 'without'}: {scores}", flush=True)
        pairs.setdefault(seed, {})[last] = scores
        for name, score in scores.items():
            arms[last].setdefault(name, []).append(score)
    names = list(next(iter(pairs.values()))[True])
    gains = {name: [pair[True][name] - pair[False][name] for _, pair in sorted(pairs.items())] for name in names}
    names_of_settings = ("documents", "steps", "seeds", "count")
    result = {
        "with_last_scale": summary(arms[True]),
        "without": summary(arms[False]),
        "gain": summary(gains),
        "settings": {name: getattr(arguments, name) for name in names_of_settings},
        "machine": machine(torch.device("cpu")),
    }
    report(result, arguments.json, OUTPUT)


if __name__ == "__main__":
    main()
