"""Figures of benchmarks: curves of rewards and scores, and pictures in rows with their prompts."""

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

COLOURS = {"prefix": "#4477aa", "vanilla": "#ee6677", "shuffled": "#999999", "supervised": "#228833"}
INK, PAPER, GRID = "#222222", "white", "#dddddd"
WIDTH, HEIGHT, MARGIN = 560, 340, 50
CELL, LABEL, TEXT = 96, 84, 64  # of pictures, of the names beside them, of the prompts above

Curve = list[tuple[float, float]]


def draw_curves(runs: dict[str, dict[int, dict]], test: float, dev: float) -> Image.Image:
    """Two panels, a line for each seed: training reward over steps, and dev score over seconds with the test score at
    the end as a dot.

    Args:
        runs: by arm and seed.
        test, dev: scores of the checkpoint.
    """
    rewards: dict[str, list[Curve]] = {}
    scores: dict[str, list[Curve]] = {}
    dots: dict[str, Curve] = {}
    for arm, by_seed in runs.items():
        rewards[arm] = [smooth([(row["step"], row["reward"]) for row in run["rewards"]]) for run in by_seed.values()]
        scores[arm] = [
            [(0, dev), *((row["seconds"], row["dev"]["both"]) for row in run["dev"])] for run in by_seed.values()
        ]
        dots[arm] = [(run["seconds"], run["test"]["both"]) for run in by_seed.values()]
    image = Image.new("RGB", (2 * WIDTH, HEIGHT), PAPER)
    panel(image, 0, "reward of training (mean of 5 logs), by step", rewards, {}, None)
    panel(image, WIDTH, "R@1: dev prompts by CPU seconds, dots: test prompts", scores, dots, test)
    return image


def smooth(curve: Curve, window: int = 5) -> Curve:
    """Each point the mean of itself and those before it in the window."""
    parts = [curve[max(place - window + 1, 0) : place + 1] for place in range(len(curve))]
    return [(part[-1][0], sum(value for _, value in part) / len(part)) for part in parts]


def panel(
    image: Image.Image,
    left: int,
    title: str,
    curves: dict[str, list[Curve]],
    dots: dict[str, Curve],
    level: float | None,
) -> None:
    """Lines of one colour for each arm; `level` is dashed."""
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(12)
    points = [point for lines in curves.values() for line in lines for point in line]
    points += [point for row in dots.values() for point in row]
    reach = max([x for x, _ in points] + [1e-9])
    heights = [y for _, y in points] + ([] if level is None else [level])
    low, top = math.floor(10 * min(heights, default=0)) / 10, math.ceil(10 * max(heights, default=1) + 1e-9) / 10
    wide, high = WIDTH - MARGIN - 20, HEIGHT - 2 * MARGIN
    place = lambda x, y: (left + MARGIN + wide * x / reach, MARGIN + high * (top - y) / (top - low))  # noqa: E731
    for mark in range(round(10 * low), round(10 * top) + 1):
        pen.line([place(0, mark / 10), place(reach, mark / 10)], GRID)
        pen.text((left + 20, place(0, mark / 10)[1] - 7), f"{mark / 10:.1f}", INK, font)
    for quarter in range(5):
        x = reach * quarter / 4
        pen.text((place(x, low)[0] - 8, HEIGHT - MARGIN + 6), f"{x:.0f}", INK, font)
    if level is not None:
        for dash in range(0, 40, 2):
            pen.line([place(reach * dash / 40, level), place(reach * (dash + 1) / 40, level)], INK)
    for number, (arm, lines) in enumerate(curves.items()):
        for line in lines:
            if len(line) > 1:
                pen.line([place(*point) for point in line], COLOURS[arm], 2)
        for x, y in (place(*point) for point in dots.get(arm, [])):
            pen.ellipse([x - 4, y - 4, x + 4, y + 4], COLOURS[arm])
        pen.text((left + MARGIN + 110 * number, HEIGHT - 20), arm, COLOURS[arm], font)
    pen.text((left + MARGIN, 14), title, INK, font)


def draw_strips(strips: dict[str, Image.Image], prompts: Sequence[str], cell: int = CELL) -> Image.Image:
    """A row of pictures for each name, a column for each prompt, which stands above it.

    Args:
        cell: pixels of a picture with its margin.
    """
    sheet = Image.new("RGB", (LABEL + cell * len(prompts), TEXT + cell * len(strips)), PAPER)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
    for column, prompt in enumerate(prompts):
        lines = [""]
        for word in prompt.split():
            lines[-1:] = [f"{lines[-1]} {word}".strip()] if len(lines[-1] + word) < 18 else [lines[-1], word]
        pen.multiline_text((LABEL + cell * column + 2, 2), "\n".join(lines), INK, font, spacing=1)
    for row, (name, strip) in enumerate(strips.items()):
        top, edge = TEXT + cell * row, strip.width // len(prompts)
        pen.text((4, top + cell // 2 - 6), name, INK, font)
        for column in range(len(prompts)):
            picture = strip.crop((edge * column, 0, edge * (column + 1), strip.height))
            picture = picture.resize((cell - 4, cell - 4), Image.Resampling.NEAREST)
            sheet.paste(picture, (LABEL + cell * column + 2, top + 2))
    return sheet
