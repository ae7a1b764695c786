"""Pictures to examine a model with: the user's, or drawn shapes."""

import random
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from ..image_processing_nextflow import open_picture
from ..scales import ScheduleTable
from ..utils.files import read_text

COLOURS = ("red", "green", "blue", "gold", "purple", "orange")
SIDES = {"circle": 64, "square": 4, "triangle": 3}
FILES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class Picture:
    """A picture of a schedule's size, and a text that describes it, where there is one."""

    image: Image.Image
    caption: str | None = None


def default_pictures(table: ScheduleTable, seed: int, each: int = 12) -> list[Picture]:
    """`each` drawn pictures of a square, a wide and a tall schedule of the lowest level, as far as these differ."""
    rng, level = random.Random(f"doctor {seed}"), next(iter(table.levels))
    nearest = [table.nearest_to_image(*size, level) for size in ((600, 600), (1200, 1800), (1800, 1200))]
    return [draw(rng, *table.image_size(schedule)) for schedule in dict.fromkeys(nearest) for _ in range(each)]


def draw(rng: random.Random, height: int, width: int) -> Picture:
    """One shape in a colour, on a plain ground."""
    kind, colour, scale = rng.choice(list(SIDES)), rng.choice(COLOURS), 4
    radius = scale * min(height, width) * rng.uniform(0.25, 0.42)
    centre = [rng.uniform(radius, scale * length - radius) for length in (width, height)]
    canvas = Image.new("RGB", (scale * width, scale * height), rng.choice(("white", "black", "gray", "wheat")))
    ImageDraw.Draw(canvas).regular_polygon((*centre, radius), SIDES[kind], fill=colour)
    return Picture(canvas.resize((width, height), Image.Resampling.BOX), f"a {colour} {kind}")


def read_pictures(folder: str | Path, limit: int = 48) -> list[Picture]:
    """The pictures of a folder; `name.txt` beside `name.png` describes it.

    Raises:
        ValueError: if there is none, or a file is no picture, or no text in UTF-8.
    """
    files = filter(Path.is_file, Path(folder).iterdir())
    paths = sorted(path for path in files if path.suffix.lower() in FILES)[:limit]
    if not paths:
        raise ValueError(f"{folder} holds no pictures ({', '.join(FILES)})")
    texts = [path.with_suffix(".txt") for path in paths]
    captions = [read_text(text).strip() if text.is_file() else None for text in texts]
    return [Picture(open_picture(path), caption) for path, caption in zip(paths, captions)]
