"""What is in a folder of shards: statistics, a plot of the packs' costs, and decoded pictures with their texts."""

import html
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ..sampling import integer
from ..utils.files import png_base64, save_png, write_atomically
from .shards import (
    Shard,
    check_identity,
    decodable_codes,
    documents_of,
    identity_of,
    open_shards,
    sequence_spec,
)

INK, BAR, PAPER = "#222222", "#4477aa", "white"


def summarize(name: str | Path) -> dict:
    """Statistics of a folder of shards: the manifest's, and counts of kinds, grids and supervised tokens."""
    return _summarize(*open_shards(name))


def _summarize(folder: Path, manifest: Mapping) -> dict:
    spec = sequence_spec(manifest["identity"])
    kinds, grids, lengths, costs = Counter(), Counter(), [], []
    images = supervised_images = text_tokens = 0
    for entry in manifest["shards"]:
        shard = Shard(folder / "data" / entry["file"])
        for index in range(len(shard)):
            row = shard.row(index)
            kinds.update(row.get("kinds", [row.get("kind")]))
            grids.update("x".join(map(str, grid)) for grid in row["image_grid_hw"].reshape(-1, 2).tolist())
            is_image = row["input_ids"] == spec.special.image
            images += int(is_image.sum())
            supervised_images += int(row["supervised"][is_image].sum())
            text_tokens += int((~is_image).sum())
            lengths.append(row["num_tokens"])
            costs.append(row.get("cost", row["num_tokens"]))
    quantiles = {str(q): int(np.quantile(lengths, q / 100)) for q in (0, 10, 50, 90, 100)} if lengths else {}
    return {
        "content": manifest["content"],
        "shards": len(manifest["shards"]),
        "rows": len(lengths),
        "statistics": manifest["statistics"],
        "kinds": dict(kinds.most_common()),
        "final grids": dict(grids.most_common()),
        "images": images,
        "supervised images": supervised_images,
        "text tokens": text_tokens,
        "length of a row, quantiles": quantiles,
        "costs": costs,
    }


def contact_sheet(name: str | Path, model: str, output: str | Path, count: int = 12, seed: int = 0) -> dict:
    """Decode pictures of random rows, and write them with their texts as `sheet.png` and `index.html`, beside
    `costs.png`, in the folder `output`. Returns the statistics of [`summarize`].

    Raises:
        ValueError: if the shards were made with another model's tokenizers, schedules or code offset.
    """
    from ..utils.loading import load_tokenizers

    integer("seed", seed, 0)
    folder, manifest = open_shards(name)
    config, processor, vq_model = load_tokenizers(model)
    check_identity(manifest, identity_of(config, processor, vq_model))
    spec = sequence_spec(manifest["identity"])
    rows = [(entry["file"], index) for entry in manifest["shards"] for index in range(entry["rows"])]
    entries: list[tuple[str, list[Image.Image]]] = []
    for place in np.random.default_rng(seed).permutation(len(rows)):
        if len(entries) >= count:
            break
        file, index = rows[place]
        row = Shard(folder / "data" / file).row(index)
        for caption, images in _documents(row, spec, manifest["variants"], processor.tokenizer):
            if len(entries) < count:
                entries.append((caption, [_decode(vq_model, processor, grid, codes) for grid, codes in images]))
    output = Path(output)
    summary = _summarize(folder, manifest)
    save_png(draw_sheet(entries), output / "sheet.png")
    save_png(draw_costs(summary["costs"]), output / "costs.png")
    page = _page(str(name), {what: value for what, value in summary.items() if what != "costs"}, entries)
    write_atomically(output / "index.html", lambda partial: partial.write_text(page, encoding="utf-8"))
    return summary


def _documents(row: Mapping, spec, variants: int, tokenizer):
    """Of each document of a row: its text, and grid and codes of its pictures."""
    for key, kind, ids, _, images in documents_of(row, spec, variants):
        pictures = [(grid, decodable_codes(targets, inputs)) for grid, targets, inputs in images]
        yield f"{key} ({kind})\n{tokenizer.decode(ids.tolist())}", pictures


def _decode(vq_model, processor, grid, codes: np.ndarray) -> Image.Image:
    pixels = vq_model.decode(torch.from_numpy(codes[None]).to(vq_model.device), grid)
    return processor.post_process_image(pixels)[0]


def draw_sheet(entries: Sequence[tuple[str, Sequence[Image.Image]]], edge: int = 128, columns: int = 3) -> Image.Image:
    """Pictures of documents above their texts."""
    font = ImageFont.load_default(12)
    wide = max([len(pictures) for _, pictures in entries] + [1])
    cell_w, cell_h = max(wide * (edge + 4), 2 * edge) + 12, edge + 84
    rows = -(-len(entries) // columns) or 1
    sheet = Image.new("RGB", (columns * cell_w, rows * cell_h), PAPER)
    pen = ImageDraw.Draw(sheet)
    for place, (text, pictures) in enumerate(entries):
        left, top = place % columns * cell_w + 6, place // columns * cell_h + 6
        for number, picture in enumerate(pictures):
            scale = edge / max(picture.size)
            shown = picture.resize([max(round(length * scale), 1) for length in picture.size])
            sheet.paste(shown, (left + number * (edge + 4), top))
        pen.multiline_text((left, top + edge + 4), _wrap(text, (cell_w - 12) // 7, 5), INK, font)
    return sheet


def _wrap(text: str, width: int, lines: int) -> str:
    wrapped = [line[i : i + width] for line in text.splitlines() for i in range(0, max(len(line), 1), width)]
    return "\n".join(wrapped[:lines])


def draw_costs(costs: Sequence[float], size: tuple[int, int] = (640, 320), bins: int = 40) -> Image.Image:
    """Histogram of the rows' costs relative to their mean: a narrow one keeps ranks from waiting for each other."""
    image = Image.new("RGB", size, PAPER)
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(12)
    relative = np.asarray(costs, dtype=np.float64) / max(float(np.mean(costs)), 1e-30) if len(costs) else np.ones(1)
    top = max(2.0, float(relative.max()))
    counts, _ = np.histogram(relative, bins=bins, range=(0, top))
    left, bottom, width, height = 40, size[1] - 40, size[0] - 60, size[1] - 70
    for place, count in enumerate(counts):
        x = left + place * width / bins
        pen.rectangle([x, bottom - height * count / max(counts.max(), 1), x + width / bins - 1, bottom], BAR)
    for mark in np.linspace(0, top, 5):
        pen.text((left + width * mark / top, bottom + 4), f"{mark:.2g}", INK, font)
    pen.text((left, 8), f"cost of {len(costs)} rows over their mean, at most {relative.max():.2f}", INK, font)
    return image


def _page(title: str, summary: Mapping, entries) -> str:
    figures = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(str(value))}</td></tr>" for name, value in summary.items()
    )
    documents = []
    for text, pictures in entries:
        shown = "".join(f'<img src="data:image/png;base64,{png_base64(picture)}">' for picture in pictures)
        documents.append(f"<section>{shown}<pre>{html.escape(text)}</pre></section>")
    style = "body{font-family:sans-serif}pre{white-space:pre-wrap}img{margin-right:4px}td{padding-right:1em}"
    return (
        f'<!doctype html><meta charset="utf-8"><title>{html.escape(title)}</title><style>{style}</style>'
        f"<h1>{html.escape(title)}</h1><table>{figures}</table>"
        f'<p><img src="costs.png" alt="costs of rows"></p>{"".join(documents)}\n'
    )
