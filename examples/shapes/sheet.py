"""Draw what a checkpoint does on one sheet: `python -m examples.shapes.sheet --output docs/shapes.png`.

Rows: pictures for held-out prompts, one column for each category; edits, source above result; photographs that no
training saw, original above reconstruction. Nothing is picked by hand: the first prompts and edits of a seed.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from transformers_nextflow import NextFlowForConditionalGeneration, NextFlowProcessor

from .evaluate import CHECKPOINT, Evaluator, photo_pixels
from .grammar import CATEGORIES, EDITS, held_out_edits, held_out_prompts
from .world import render

CELL, TEXT = 192, 34  # pixels of a picture and of the lines under it
COLUMNS = len(CATEGORIES)


def cell(picture: np.ndarray, text: str = "") -> Image.Image:
    """A picture enlarged without smoothing, over its text in lines of about 30 letters."""
    result = Image.new("RGB", (CELL, CELL + TEXT), "white")
    result.paste(Image.fromarray(picture).resize((CELL - 6, CELL - 6), Image.Resampling.NEAREST), (3, 3))
    lines, line = [], ""
    for word in text.split():
        if len(line) + len(word) > 30:
            lines, line = [*lines, line], ""
        line = f"{line} {word}".strip()
    ImageDraw.Draw(result).multiline_text((6, CELL), "\n".join([*lines, line]), fill="black", spacing=1)
    return result


def sheet(evaluator: Evaluator) -> Image.Image:
    """All rows on one picture."""
    rows = []
    requests = [held_out_prompts(category, 3, evaluator.seed) for category in CATEGORIES]
    texts = [group[row].text for row in range(3) for group in requests]
    drawn = evaluator.pictures(texts)
    cells = [cell(group[0], text) for group, text in zip(drawn, texts)]
    rows += [cells[i : i + COLUMNS] for i in range(0, len(cells), COLUMNS)]

    edits = [held_out_edits(operation, 2, evaluator.seed)[i] for i in range(2) for operation in EDITS][:COLUMNS]
    sources = [render(edit.source) for edit in edits]
    results = evaluator.pictures([edit.text for edit in edits], [Image.fromarray(source) for source in sources])
    rows.append([cell(source) for source in sources])
    rows.append([cell(group[0], edit.text) for group, edit in zip(results, edits)])

    photos = photo_pixels(COLUMNS)
    rebuilt, _ = evaluator.reconstructions(photos)
    for pixels, text in ((photos, "photograph"), (rebuilt, "reconstruction")):
        rows.append([cell(np.asarray(image), text) for image in evaluator.processor.post_process_image(pixels)])

    result = Image.new("RGB", (CELL * COLUMNS, (CELL + TEXT) * len(rows)), "white")
    for top, row in enumerate(rows):
        for left, image in enumerate(row):
            result.paste(image, (left * CELL, top * (CELL + TEXT)))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=CHECKPOINT, help="folder of the checkpoint")
    parser.add_argument("--output", type=Path, default=Path("docs/shapes.png"), help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    model = NextFlowForConditionalGeneration.from_pretrained(arguments.model).eval()
    processor = NextFlowProcessor.from_pretrained(arguments.model)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    sheet(Evaluator(model, processor, arguments.seed)).save(arguments.output, optimize=True)


if __name__ == "__main__":
    main()
