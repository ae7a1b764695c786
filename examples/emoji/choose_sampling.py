"""Choose guidance and temperature on dev: `python -m examples.emoji.choose_sampling --output RUN/sampling.json`.

Drawings of held-out pairs of the dev split, R@1 under every guidance scale and temperature; the best goes into the
checkpoint by `assemble`. A ramp goes linearly over the scales.
"""

import argparse
import time
from dataclasses import asdict

from tqdm.auto import tqdm

from benchmarks.harness import machine, report, save
from transformers_nextflow import LinearRamp

from .artist import Artist
from .evaluate import add_model_options, load_artist
from .intervals import proportion
from .scoring import DRAWING, Exam, judged
from .splits import PAIR
from .tasks import Tasks

GUIDANCE = (1.0, 2.0, 3.0, 5.0, LinearRamp(1.0, 3.0), LinearRamp(1.0, 6.0))
TEMPERATURE = (1.0, 0.7, LinearRamp(1.0, 0.4), LinearRamp(1.0, 0.1))


def setting(value: float | LinearRamp) -> float | dict[str, float]:
    """As a checkpoint's configuration holds it; a ramp is one at either level."""
    return asdict(value) if isinstance(value, LinearRamp) else value


def choose(exam: Exam, guidance=GUIDANCE, temperature=TEMPERATURE) -> dict:
    """A row for every pair of settings, and the one of the highest R@1, the first among equals."""
    items = exam.items("text-to-image", "", (PAIR,))
    rows = []
    for pair in tqdm([(scale, heat) for scale in guidance for heat in temperature], desc="settings"):
        sampling = dict(zip(("guidance_scale", "temperature"), map(setting, pair)))
        artist = Artist(exam.artist.model, exam.artist.processor, exam.world, **sampling)
        right = judged(exam, artist.draw(items), [item.targets[0] for item in items], DRAWING)
        rows.append(sampling | {measure: proportion(values) for measure, values in right.items()})
    best = max(rows, key=lambda row: row["picture"]["score"])
    return {"rows": rows, "best": {name: best[name] for name in ("guidance_scale", "temperature")}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser)
    parser.add_argument("--prompts", type=int, default=1_000, help="or all that dev has")
    arguments = parser.parse_args()
    started = time.perf_counter()
    artist = load_artist(arguments.model, arguments.data, arguments.device)
    result = choose(Exam(artist, Tasks.of(artist.world), "dev", arguments.prompts))
    result |= {"seconds": round(time.perf_counter() - started, 1), "machine": machine(arguments.device)}
    report(result, arguments.json)
    if arguments.output:
        save(result, arguments.output)


if __name__ == "__main__":
    main()
