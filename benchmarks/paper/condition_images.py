"""Whether an image that is only read should carry its last scale as one more input block, which the paper leaves open:
`python -m benchmarks.paper.condition_images RUN --json`.

Next-scale inputs stop before the last scale, so without that block a picture to describe or to edit lacks its finest
codes. Arms `with` and `without` train from new weights on equally many of the same captions and edits; packs of the
first hold fewer documents, so it takes more steps. Beside held-out losses, on dev's held-out pairs: `captions` exact,
and `edits` right among all pictures.
"""

from pathlib import Path

import numpy as np

from examples.emoji.artist import Artist
from examples.emoji.documents import Stage
from examples.emoji.judge import Judge
from examples.emoji.splits import PAIR
from examples.emoji.tasks import Tasks
from examples.emoji.world import World
from transformers_nextflow.data.shards import read_manifest

from .arms import HELD_OUT, Claim, code, conduct, dev, save_start, share_right, train_arm, untrained

ARMS = ("with", "without")
CLAIMS = [Claim(None, None, *ARMS, measure, None) for measure in ("captions", "edits", "text", "vision", "fine")]
READING = Stage("64", {"captioning": 0.3, "editing": 0.7})


def prepare(folder: Path, options) -> None:
    for arm in ARMS:
        parts = untrained(options.run, 1, condition_last_scale=arm == "with")
        start = save_start(folder / f"{arm}-start", *parts)
        code(folder / f"{arm}-training", options, READING, start=start)
        code(folder / f"{arm}-held_out", options, dev(READING), HELD_OUT, start)


def run_arm(folder: Path, arm: str, seed: int, options) -> dict:
    parts = untrained(options.run, seed, condition_last_scale=arm == "with")
    training, held_out = (folder / f"{arm}-{name}" / "packs" for name in ("training", "held_out"))
    counts = {name: read_manifest(folder / f"{name}-training" / "packs")["statistics"]["packs"] for name in ARMS}
    steps = max(1, round(options.steps * counts[arm] / counts["with"]))
    result = train_arm(folder, parts, training, {"": held_out}, steps, seed)
    world = World(options.data)
    tasks = Tasks.of(world)
    captions, edits = (
        [tasks.draw(task, "dev", number, part=PAIR) for number in range(options.held_out)]
        for task in ("captioning", "editing")
    )
    artist = Artist(*parts, world)
    exact = [text == item.assistant[0] for text, item in zip(artist.answer(captions), captions)]
    result["final"]["captions"] = round(float(np.mean(exact)), 4)
    result["final"]["edits"] = share_right(Judge(world), artist.draw(edits), edits)
    return result


if __name__ == "__main__":
    conduct("condition_images", __doc__, CLAIMS, ARMS, run_arm, prepare, steps=750)
