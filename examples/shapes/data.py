"""Pictures for training: scenes drawn on the fly and crops of photographs that scikit-image and scikit-learn ship."""

import random
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from .sizes import CANVAS_WEIGHTS, CANVASES
from .world import render, sample_scene

TRAINING_PHOTOS = (
    "astronaut.png",
    "rocket.jpg",
    "motorcycle_left.png",
    "hubble_deep_field.jpg",
    "china.jpg",
    "flower.jpg",
)
HELD_OUT_PHOTOS = ("chelsea.png", "coffee.png")


@cache
def photo(name: str) -> Image.Image:
    """A photograph out of an installed package, RGB."""
    import skimage
    import sklearn

    for folder in (Path(skimage.__file__).parent / "data", Path(sklearn.__file__).parent / "datasets" / "images"):
        if (folder / name).exists():
            return Image.open(folder / name).convert("RGB")
    raise FileNotFoundError(f"neither scikit-image nor scikit-learn ships a photograph {name}")


def photo_crop(rng: random.Random, names: tuple[str, ...], height: int, width: int) -> np.ndarray:
    """A random crop of one photograph, mirrored half of the time, as uint8 (height, width, 3)."""
    image = photo(rng.choice(names))
    largest = min(image.height / height, image.width / width)
    scale = min(largest, 1) * (largest / min(largest, 1)) ** rng.random()
    crop_h, crop_w = int(height * scale), int(width * scale)
    top, left = rng.randint(0, image.height - crop_h), rng.randint(0, image.width - crop_w)
    crop = image.resize((width, height), Image.Resampling.BICUBIC, box=(left, top, left + crop_w, top + crop_h))
    pixels = np.asarray(crop)
    return pixels[:, ::-1] if rng.random() < 0.5 else pixels


def to_pixel_values(pictures: list[np.ndarray]) -> torch.Tensor:
    """uint8 (H, W, 3) pictures of one size -> float32 (B, 3, H, W) in [-1, 1]."""
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    return pixels.float() / 127.5 - 1


def sample_canvas(rng: random.Random) -> tuple[int, int]:
    """(height, width) of the next batch."""
    return rng.choices(CANVASES, CANVAS_WEIGHTS)[0]


def picture_batch(rng: random.Random, size: int, photo_share: float) -> torch.Tensor:
    """A batch of one canvas: training scenes, and crops of photographs in the given share."""
    height, width = sample_canvas(rng)
    pictures = [
        photo_crop(rng, TRAINING_PHOTOS, height, width)
        if rng.random() < photo_share
        else render(sample_scene(rng, height, width))
        for _ in range(size)
    ]
    return to_pixel_values(pictures)
