"""Whether images that are only read should carry their last scale as one more input block: captions and edits with and
without it, at equal training: `python -m benchmarks.condition_images RUN --json`.

RUN is a folder in which `examples.shapes.train` has trained the tokenizer and coded the documents. Each arm trains
from new weights on the same documents in the same order; arms differ in `condition_last_scale` alone, seeds in weights
and order. Scores are of the dev split, by the judge.
"""

import argparse
import os
import random
import statistics
from pathlib import Path

import torch

from benchmarks.harness import machine, report
from examples.shapes.assemble import finish, load_vq_model
from examples.shapes.evaluate import Evaluator, captions, edits
from examples.shapes.text import train_text_tokenizer
from examples.shapes.transformer import extract, new_model, train_on_codes
from examples.shapes.world import sample_scene

OUTPUT = Path(__file__).parent / "results" / "condition_images.json"


def run_arm(folder: Path, seed: int, last_scale: bool, steps: int, count: int) -> dict[str, float]:
    """Train one arm and score it."""
    tokenizer, vq_model = train_text_tokenizer(), load_vq_model(folder).requires_grad_(False)
    model = new_model(tokenizer, vq_model, seed=seed, condition_last_scale=last_scale)
    output = folder / "condition_images" / f"{'with' if last_scale else 'without'}-{seed}"
    model = train_on_codes(output, model, tokenizer, extract(folder, vq_model), steps, seed).float().eval()
    evaluator = Evaluator(model, finish(model, tokenizer), seed=0)
    scenes = dev_scenes(5 * count)
    return {
        "captions": captions(evaluator, scenes)["score"],
        "edits": edits(evaluator, count, "dev")["overall"]["score"],
    }


def dev_scenes(count: int) -> list:
    rng = random.Random("condition images, dev")
    return [sample_scene(rng, training=False) for _ in range(count)]


def _work(rank: int, jobs, folder: Path, steps: int, count: int, results) -> None:
    torch.set_num_threads(1)
    while True:
        job = jobs.get()
        if job is None:
            return
        results.put((*job, run_arm(folder, *job, steps, count)))


def summary(scores: dict[str, list[float]]) -> dict:
    """Mean and the 95% interval of a t distribution over the seeds."""
    from scipy.stats import t

    rows = {}
    for name, values in scores.items():
        half = (
            t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
        )
        rows[name] = {"mean": statistics.mean(values), "half_interval": half, "seeds": values}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder that examples.shapes.train wrote")
    parser.add_argument("--steps", type=int, default=600, help="of each arm (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--count", type=int, default=40, help="edits for each operation, and five captions for each")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    jobs_list = [(seed, last) for seed in range(1, arguments.seeds + 1) for last in (True, False)]
    context = torch.multiprocessing.get_context("spawn")
    jobs, results = context.Queue(), context.Queue()
    workers = min(len(os.sched_getaffinity(0)), len(jobs_list))
    for job in [*jobs_list, *[None] * workers]:
        jobs.put(job)
    run = (jobs, arguments.run, arguments.steps, arguments.count, results)
    processes = torch.multiprocessing.spawn(_work, run, nprocs=workers, join=False)
    arms: dict[bool, dict[str, list[float]]] = {True: {}, False: {}}
    pairs: dict[int, dict[bool, dict]] = {}
    for _ in jobs_list:
        seed, last, scores = results.get()
        print(f"seed {seed}, last scale {'with' if last else 'without'}: {scores}", flush=True)
        pairs.setdefault(seed, {})[last] = scores
        for name, score in scores.items():
            arms[last].setdefault(name, []).append(score)
    processes.join()
    names = list(next(iter(pairs.values()))[True])
    gains = {name: [pair[True][name] - pair[False][name] for _, pair in sorted(pairs.items())] for name in names}
    result = {
        "with_last_scale": summary(arms[True]),
        "without": summary(arms[False]),
        "gain": summary(gains),
        "settings": {"steps": arguments.steps, "seeds": arguments.seeds, "count": arguments.count},
        "machine": machine(torch.device("cpu")),
    }
    report(result, arguments.json, OUTPUT)


if __name__ == "__main__":
    main()
