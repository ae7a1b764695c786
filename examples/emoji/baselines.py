"""What could be handed in without drawing or reading: the figures that stand beside a model's.

The fourth, the source handed back for an edit, needs no function.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from .judge import features, squared_distances
from .world import World


def mean_pictures(world: World) -> dict[str, np.ndarray]:
    """Style -> the mean of its pictures seen in training, uint8 (size, size, 3)."""
    rows: dict[str, list[int]] = {}
    for row in world.seen:
        rows.setdefault(world.styles[row], []).append(row)
    return {style: np.round(world.pictures[each].mean(0)).astype(np.uint8) for style, each in rows.items()}


def other_styles(world: World, targets: Sequence[int]) -> list[int | None]:
    """For each picture asked for, the one of its name in another style that is seen in training and nearest to it by
    the judge's metric; None where there is none. It is chosen by the truth, which no model is shown."""
    rows: dict[str, list[int]] = {}
    for row in world.seen:
        rows.setdefault(world.names[row], []).append(row)
    return [_nearest(world, row, rows.get(world.names[row], [])) for row in targets]


def _nearest(world: World, target: int, rows: list[int]) -> int | None:
    others = [row for row in rows if world.styles[row] != world.styles[target]]
    if not others:
        return None
    distances = squared_distances(features(world.pictures[[target]]), features(world.pictures[others]))
    return others[int(distances.argmin())]


def most_frequent(answers: Sequence[str]) -> str:
    """The answer that is given most often in training, the first in the alphabet among equals."""
    if not answers:
        raise ValueError("no answers to choose from")
    counts = Counter(answers)
    return min(counts, key=lambda answer: (-counts[answer], answer))
