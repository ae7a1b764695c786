"""What a drawing shows: the picture of the world that is nearest to it, among all of them.

The metric: both pictures are resized to 16 x 16 pixels by Pillow's bilinear filter (on the way down a triangle over
twice the pixel's width) and their uint8 RGB values compared by squared difference. No parameter of it was fitted to
anything, and it was chosen on true pictures before any model was scored (`validate_judge.py`,
`benchmarks/results/emoji_judge.json`): of nine candidates it is the finest that finds at least .95 of the true
pictures again under every change that it has to forgive, and that one step defines. RGB at 32 x 32 and 64 x 64 pixels,
at three resolutions added up, and at 16 x 16 without the filter's overlap finds fewer under a blur of two pixels, and
searching shifts does not help against blur. CIELAB at 16 x 16 passes too, with a second step and no gain; 8 x 8 pixels
pass too, and would forgive more than they have to.

All of it is exact, in integers. Pictures that are equal to the pixel are one picture under several names, and where
several are nearest at one distance, a drawing is right if the one asked for is among them.
"""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence

import numpy as np
from PIL import Image

from .data import WHITE
from .world import World

EDGE = 16
CHUNK = 256  # drawings that are compared at a time


def features(pictures: np.ndarray | Sequence[np.ndarray]) -> np.ndarray:
    """uint8 (H, W, 3) square pictures, of any edge -> float32 (B, 768), integers in -128..127."""
    rows = [np.asarray(Image.fromarray(_checked(each)).resize((EDGE, EDGE), Image.BILINEAR)) for each in pictures]
    return np.array(rows, np.float32).reshape(len(rows), EDGE * EDGE * 3) - 128


def _checked(picture: np.ndarray) -> np.ndarray:
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or len(picture) != picture.shape[1]:
        raise ValueError(
            f"a picture must be square RGB, uint8 (edge, edge, 3), got {picture.dtype} {picture.shape}; "
            "cut rows of pictures by `squares`"
        )
    return picture


def squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """float32 features (A, D) and (B, D) -> float64 (A, B).

    Exact for [`features`]: every partial sum of a product is an integer of at most 768 x 128 x 128 < 2**24, which
    float32 holds whatever the order of summation.
    """
    norms_a, norms_b = (np.einsum("ij,ij->i", each, each).astype(np.float64) for each in (a, b))
    distances = (a @ b.T).astype(np.float64)
    distances *= -2
    distances += norms_a[:, None]
    distances += norms_b
    return distances


class Judge:
    """Says of drawings which pictures of the world they are nearest to, and whether those are what was asked for.

    Args:
        world: all pictures that a drawing may be taken for, seen in training or not.
        labels: attributes to be judged beside picture, name and style: for each the label of every picture of the
            world, None where a picture has none (`{"skin tone": ["dark", None, ...]}`).
    """

    def __init__(self, world: World, labels: Mapping[str, Sequence[Hashable]] | None = None):
        self.world = world
        labels = {"name": world.names, "style": world.styles, **(labels or {})}
        for attribute, each in labels.items():
            if len(each) != len(world):
                raise ValueError(f"labels of {attribute} must be {len(world)}, one a picture, got {len(each)}")
        self.labels = {attribute: np.fromiter(each, object, len(world)) for attribute, each in labels.items()}
        distinct, self._group = np.unique(world.twins, return_inverse=True)
        self._features = features(world.pictures[distinct])

    def nearest(self, drawings: Sequence[np.ndarray]) -> np.ndarray:
        """uint8 (H, W, 3) square drawings -> bool (B, N): the nearest pictures of each, several where they tie."""
        near = np.empty((len(drawings), len(self.world)), bool)
        for start in range(0, len(drawings), CHUNK):
            distances = self.distances(drawings[start : start + CHUNK])
            near[start : start + CHUNK] = distances == distances.min(1, keepdims=True)
        return near

    def distances(self, drawings: Sequence[np.ndarray]) -> np.ndarray:
        """uint8 (H, W, 3) square drawings -> float64 (B, N): the squared distance of each to every picture."""
        return squared_distances(features(drawings), self._features)[:, self._group]

    def right(self, drawings: Sequence[np.ndarray], targets: Sequence[int]) -> dict[str, np.ndarray]:
        """Whether each drawing is the picture asked for, and has its name, its style and its other labels.

        Args:
            drawings: uint8 (H, W, 3), square.
            targets: the rows of the pictures asked for.

        Returns:
            bool (B,) under "picture" (its mean is R@1), "name", "style" and each attribute; a picture asked for that
            has no label of an attribute wants one that has none either.
        """
        if len(drawings) != len(targets):
            raise ValueError(f"{len(drawings)} drawings need as many targets, got {len(targets)}")
        return self._right(self.nearest(drawings), np.asarray(targets, int))

    def _right(self, near: np.ndarray, targets: np.ndarray) -> dict[str, np.ndarray]:
        result = {"picture": near[np.arange(len(targets)), targets]}
        for attribute, labels in self.labels.items():
            pairs = zip(targets, near)
            result[attribute] = np.array([labels[row] in set(labels[each]) for row, each in pairs], bool)
        return result

    def right_rows(self, canvases: Sequence[np.ndarray], targets: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
        """Whether rows of pictures are what was asked for, square by square.

        Args:
            canvases: uint8 (H, W, 3), one edge a multiple of the other.
            targets: the rows of the pictures asked for, from left to right or from top to bottom.

        Returns:
            bool (B,) under "picture", "name", "style" and each attribute: right in every square; and in GenEval's
            terms, for which a name counts in any style: under "two objects" that each name stands somewhere, under
            "counting" that each stands as often as asked for; position is "name". Under "squares" the bool
            (all squares,) of "picture", canvas after canvas.
        """
        if len(canvases) != len(targets) or not len(canvases):
            raise ValueError(f"needs canvases and as many lists of targets, got {len(canvases)} and {len(targets)}")
        cells = [squares(canvas) for canvas in canvases]
        for each, asked in zip(cells, targets):
            if len(each) != len(asked):
                raise ValueError(f"a canvas of {len(each)} squares needs as many targets, got {len(asked)}")
        near = self.nearest([square for each in cells for square in each])
        by_square = self._right(near, np.concatenate([np.asarray(asked, int) for asked in targets]))
        ends = np.cumsum([len(each) for each in cells])[:-1]
        result = {key: np.array([all(row) for row in np.split(each, ends)]) for key, each in by_square.items()}
        names = self.labels["name"]
        asked = [Counter(names[list(rows)]) for rows in targets]
        seen = [[set(names[each]) for each in row] for row in np.split(near, ends)]
        shown = [{name: sum(name in each for each in row) for name in count} for row, count in zip(seen, asked)]
        result["two objects"] = np.array([all(each.values()) for each in shown])
        result["counting"] = np.array([each == count for each, count in zip(shown, asked)])
        return result | {"squares": by_square["picture"]}


def squares(canvas: np.ndarray) -> list[np.ndarray]:
    """(H, W, 3) with one edge a multiple of the other -> its squares from left to right or from top to bottom."""
    height, width = canvas.shape[:2]
    edge, length = min(height, width), max(height, width)
    if not edge or length % edge:
        raise ValueError(f"a row of squares must be a whole number of them long, got {height} x {width} pixels")
    return np.split(canvas, length // edge, axis=0 if height > width else 1)


def untouched(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """uint8 (..., 3) before and after an edit -> bool (...): the pixels that are equal in both and not white."""
    return (source == target).all(-1) & (source != WHITE).any(-1)


def untouched_errors(drawing: np.ndarray, source: np.ndarray, target: np.ndarray) -> tuple[float, float]:
    """Mean squared and mean absolute error of uint8 (H, W, 3) against the source, in levels of 0..255, over
    [`untouched`] pixels. Raises `ValueError` where an edit has none."""
    if not drawing.shape == source.shape == target.shape:
        raise ValueError(f"sizes must be equal, got {drawing.shape}, {source.shape} and {target.shape}")
    kept = untouched(source, target)
    if not kept.any():
        raise ValueError("this edit leaves no pixel untouched that is not white")
    errors = drawing[kept].astype(float) - source[kept]
    return float(np.square(errors).mean()), float(np.abs(errors).mean())
