"""The judge's metric as a reward, and prompts of the world as a dataset for GRPO:
`python -m examples.emoji.rewards --data runs/emoji/data --output runs/emoji/prompts`.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from transformers_nextflow.utils.files import write_atomically

from .judge import Judge
from .tasks import Tasks
from .world import World


def margins(judge: Judge, drawings: Sequence[np.ndarray], targets: Sequence[int]) -> np.ndarray:
    """How much nearer each drawing is to the picture asked for than to any other.

    With d the distance to the target and e that to the nearest picture that differs from it, (e - d) / (e + d): 1 for
    the picture itself, above 0 where the judge says that it is right, near 0 for noise, at least -1.

    Args:
        drawings: uint8 (H, W, 3), square.
        targets: rows of the world.

    Returns:
        float64 (B,) in [-1, 1].
    """
    distances = np.sqrt(judge.distances(drawings))
    twins = np.asarray(judge.world.twins)
    to_target = distances[np.arange(len(targets)), targets]
    to_other = np.where(twins == twins[list(targets), None], np.inf, distances).min(1)
    return (to_other - to_target) / (to_other + to_target)


def margin(images: Sequence[Image.Image], target: Sequence[int], world: Sequence[str], **columns) -> list[float]:
    """[`margins`] as a reward function of TRL's signature; `target` and `world` are columns of [`prompts`]."""
    pictures = [np.asarray(image.convert("RGB")) for image in images]
    return margins(judge_of(world[0]), pictures, list(target)).tolist()


@cache
def judge_of(folder: str) -> Judge:
    """The judge of the data set in a folder."""
    return Judge(World(folder))


def prompts(tasks: Tasks, world: str, count: int, seed: int = 0) -> Iterator[dict]:
    """Rows of training's text-to-image prompts: none is about a picture that is held out.

    Args:
        world: folder of the data set, for the reward.
    """
    for number in range(count):
        item = tasks.draw("text-to-image", "train", number, seed)
        (text,), (target,) = item.user, item.targets
        yield {"prompt": [{"role": "user", "content": text}], "target": target, "world": world}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("runs/emoji/data"), help="data set (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/emoji/prompts"), help="default: %(default)s")
    parser.add_argument("--count", type=int, default=4_000, metavar="N", help="of prompts (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    arguments = parser.parse_args()
    folder = str(arguments.data.resolve())
    rows = prompts(Tasks.of(World(folder)), folder, arguments.count, arguments.seed)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    arguments.output.mkdir(parents=True, exist_ok=True)
    write_atomically(arguments.output / "train.jsonl", lambda partial: partial.write_text(text))


if __name__ == "__main__":
    main()
