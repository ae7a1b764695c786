"""The pictures in memory, and what trainings draw from them."""

import random
from functools import cached_property
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image

from .data import WHITE, pixels_of, twin_groups
from .splits import SEEN


class World:
    """The whole data set, as `python -m examples.emoji.data` wrote it.

    Attributes:
        pictures: uint8 (N, size, size, 3).
        names, styles, tags, parts, splits: of each picture; see `splits.py` for the last two.
        twins: int (N,), the first picture that is equal to the pixel.
    """

    def __init__(self, folder: str | Path):
        data = datasets.load_from_disk(str(folder)).with_format("arrow")
        columns = data[:]
        self.names: list[str] = columns["name"].to_pylist()
        self.styles: list[str] = columns["style"].to_pylist()
        self.tags: list[list[str]] = columns["tags"].to_pylist()
        self.parts: list[str] = columns["part"].to_pylist()
        self.splits: list[str] = columns["split"].to_pylist()
        self.twins = np.asarray(columns["twin"].to_pylist())
        self.pictures = np.stack([pixels_of(image["bytes"]) for image in columns["image"].to_pylist()])

    @classmethod
    def from_arrays(
        cls,
        pictures: np.ndarray,
        names: list[str],
        styles: list[str],
        tags: list[list[str]] | None = None,
        parts: list[str] | None = None,
        splits: list[str] | None = None,
    ) -> "World":
        """A world of other pictures; without `parts` and `splits` all of it is seen in training."""
        world = cls.__new__(cls)
        world.pictures, world.names, world.styles = pictures, names, styles
        world.tags = tags or [[] for _ in names]
        world.parts = parts or [SEEN] * len(names)
        world.splits = splits or ["train"] * len(names)
        world.twins = np.arange(len(names))
        for group in twin_groups(list(pictures)):
            world.twins[group] = group[0]
        return world

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def index(self) -> dict[tuple[str, str], int]:
        """(name, style) -> row."""
        return {key: row for row, key in enumerate(zip(self.names, self.styles))}

    @cached_property
    def seen(self) -> list[int]:
        """Rows that trainings may see."""
        return [row for row, split in enumerate(self.splits) if split == "train"]

    def rows(self, part: str, split: str) -> list[int]:
        """Rows of a held-out part ("pair", "combination", "name") that are for "dev" or for "test"."""
        return [row for row in range(len(self)) if self.parts[row] == part and self.splits[row] == split]


def resized(picture: np.ndarray, edge: int) -> np.ndarray:
    """A uint8 (H, W, 3) square picture at another edge, by area on the way down."""
    if len(picture) == edge:
        return picture
    return np.asarray(Image.fromarray(picture).resize((edge, edge), Image.Resampling.BOX))


def in_a_row(pictures: list[np.ndarray], height: int, width: int) -> np.ndarray:
    """Square pictures of one edge side by side, or one below the other, filling uint8 (height, width, 3)."""
    edge, axis = min(height, width), 0 if height > width else 1
    if len(pictures) * edge != max(height, width):
        raise ValueError(f"{len(pictures)} squares do not fill {height} x {width} pixels")
    return np.concatenate([resized(picture, edge) for picture in pictures], axis)


def to_pixel_values(pictures: list[np.ndarray]) -> torch.Tensor:
    """uint8 (H, W, 3) pictures of one size -> float32 (B, 3, H, W) in [-1, 1]."""
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    return pixels.float() / 127.5 - 1


def moved(picture: np.ndarray, rng: random.Random) -> np.ndarray:
    """The picture a little smaller or larger and shifted, on white: the same thing for a teacher."""
    edge = len(picture)
    size = rng.randint(round(0.8 * edge), round(1.1 * edge))
    left, top = (rng.randint(min(0, edge - size), max(0, edge - size)) for _ in range(2))
    canvas = Image.new("RGB", (edge, edge), (WHITE,) * 3)
    canvas.paste(Image.fromarray(picture).resize((size, size), Image.Resampling.BILINEAR), (left, top))
    return np.asarray(canvas)
