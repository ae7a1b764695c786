"""Pictures beside each other over their texts, for sheets to look at."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

EDGE, LINE, GAP = 96, 12, 4  # pixels: the height of a picture, of a line of text, and between pictures
LETTER = 6  # the width of a letter of Pillow's font


def panel(pictures: Sequence[np.ndarray | Image.Image], text: str, lines: int = 3, height: int = EDGE) -> Image.Image:
    """Pictures side by side, enlarged without smoothing to one height, over their text in at most so many lines."""
    enlarged = [_enlarged(picture, height) for picture in pictures]
    width = max(sum(picture.width + GAP for picture in enlarged), height)
    result = Image.new("RGB", (width, height + GAP + lines * LINE), "white")
    left = 0
    for picture in enlarged:
        result.paste(picture, (left, 0))
        left += picture.width + GAP
    wrapped = wrap(text, max(width // LETTER - 1, 1))[:lines]
    ImageDraw.Draw(result).multiline_text((2, height + 1), "\n".join(wrapped), fill="black", spacing=1)
    return result


def _enlarged(picture: np.ndarray | Image.Image, height: int) -> Image.Image:
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    return image.resize((round(height * image.width / image.height), height), Image.Resampling.NEAREST)


def wrap(text: str, letters: int) -> list[str]:
    """Lines of at most so many letters, broken between words."""
    lines, line = [], ""
    for word in text.split():
        if line and len(line) + 1 + len(word) > letters:
            lines, line = [*lines, line], ""
        line = f"{line} {word}".strip()
    return [*lines, line]


def stacked(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Rows of panels on one white sheet."""
    widths = [sum(cell.width + GAP for cell in row) for row in rows]
    heights = [max(cell.height for cell in row) + GAP for row in rows]
    sheet = Image.new("RGB", (max(widths), sum(heights)), "white")
    top = 0
    for row, height in zip(rows, heights):
        left = 0
        for cell in row:
            sheet.paste(cell, (left, top))
            left += cell.width + GAP
        top += height
    return sheet


def in_rows(strips: dict[str, Image.Image], texts: Sequence[str], edge: int = EDGE) -> Image.Image:
    """A row of pictures for each name, strips of as many square pictures as there are texts, which stand above."""

    def words(text: str, width: int, lines: int, height: int = 1) -> Image.Image:
        return panel([Image.new("RGB", (width, height), "white")], text, lines, height)

    rows = [[words("", EDGE, 4), *(words(text, edge, 4) for text in texts)]]
    for name, strip in strips.items():
        size = strip.width // len(texts)
        cells = [strip.crop((size * place, 0, size * (place + 1), strip.height)) for place in range(len(texts))]
        rows.append([words(name, EDGE, 1, 40), *(panel([cell], "", 0, edge) for cell in cells)])
    return stacked(rows)
