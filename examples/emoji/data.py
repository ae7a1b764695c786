"""Make the emoji data set: `python -m examples.emoji.data --output runs/emoji/data`.

Fetches the packages, renders every picture on white and writes a `datasets` folder (open it with
`datasets.load_from_disk`) with a card that names the licences. A killed run goes on where it stopped. Other sizes show
the same pictures: `--size 128` is the truth at twice the size.
"""

import argparse
import io
import json
import re
import shutil
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tqdm.auto import tqdm

from .names import names_of
from .packages import STYLES, WORDS, fetch, read_icons, read_json
from .splits import SEEN, held_out, is_dev

SIZE = 64
WHITE = 255
CHUNK = 200  # pictures that a worker renders at a time

FEATURES = datasets.Features(
    {
        "name": datasets.Value("string"),
        "style": datasets.Value("string"),
        "label": datasets.Value("string"),  # CLDR's short name where emojibase knows one, else the name
        "tags": datasets.List(datasets.Value("string")),
        "part": datasets.Value("string"),  # see splits.py
        "split": datasets.Value("string"),  # "train", "dev" or "test"
        "twin": datasets.Value("int32"),  # the first row whose picture is equal to the pixel
        "image": datasets.Image(),
    }
)

CARD = """---
license: other
license_name: mit-apache-2.0-cc-by-4.0
tags: [emoji]
size_categories: [10K<n<100K]
---
# Emoji, {size} x {size}

{count} emoji in five styles, rendered on white by resvg, with their names. Made by `python -m examples.emoji.data` of
transformers-nextflow, which says how names and splits come about.

| style | pictures | package | licence | by |
|---|---|---|---|---|
{rows}

Labels and tags are emojibase's ({words}, {words_licence}, by {words_by}).
Twemoji's pictures are licensed under [CC BY 4.0](https://creativecommons.org/licenses/by/4.0/): name their makers
where you show them. They were rendered to pixels and not changed otherwise.
"""


def render(svg: str, size: int) -> bytes:
    """The PNG of a square SVG on white, `size` pixels along the edge."""
    from resvg_py import svg_to_bytes  # an example's dependency

    return bytes(svg_to_bytes(svg_string=svg, width=size, height=size, background="#ffffff", skip_system_fonts=True))


def _render_all(svgs: list[str], size: int) -> list[bytes]:
    return [render(svg, size) for svg in svgs]


def pixels_of(png: bytes) -> np.ndarray:
    """uint8 (height, width, 3)."""
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def render_style(icons: dict[str, str], path: Path, size: int, workers: int) -> None:
    """Render one style's icons into a Parquet file of keys and PNGs."""
    keys = sorted(icons)
    chunks = [keys[start : start + CHUNK] for start in range(0, len(keys), CHUNK)]
    with ProcessPoolExecutor(workers) as pool:
        jobs = [pool.submit(_render_all, [icons[key] for key in chunk], size) for chunk in chunks]
        pngs = [png for job in tqdm(jobs, desc=path.stem, unit="chunk") for png in job.result()]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    pq.write_table(pa.table({"key": keys, "png": pngs}), partial)
    partial.replace(path)


def words_of(archive: Path) -> dict[str, dict]:
    """Icon name, as the packages derive it from CLDR's -> emojibase's entry."""
    words = {}
    for entry in read_json(archive, "en/data.json"):
        for each in (entry, *entry.get("skins", ())):
            slug = re.sub(r"[^a-z0-9]+", "-", each["label"].lower().replace("’", "")).strip("-")
            words[slug] = {"label": each["label"], "tags": entry.get("tags", [])}
    return words


def twin_groups(pictures: list[np.ndarray]) -> list[list[int]]:
    """Indices of pictures that are equal to the pixel, in groups of two and more."""
    groups = defaultdict(list)
    for index, picture in enumerate(pictures):
        groups[picture.tobytes()].append(index)
    return [group for group in groups.values() if len(group) > 1]


def build(output: Path, cache: Path, size: int = SIZE, workers: int = 2) -> datasets.Dataset:
    """Fetch, render, split and save; rows are sorted by style and name."""
    archives = {style: fetch(package, cache / "packages") for style, package in STYLES.items()}
    words = words_of(fetch(WORDS, cache / "packages"))
    rows = []
    for style, archive in archives.items():
        path = cache / f"rendered-{size}" / f"{style.replace(' ', '-')}-{STYLES[style].version}.parquet"
        if not path.exists():
            render_style(read_icons(archive), path, size, workers)
        rows += [{"style": style, **row} for row in pq.read_table(path).to_pylist()]
    names = names_of(row["key"] for row in rows)
    for row in rows:
        row["name"], row["pixels"] = names[row["key"]], pixels_of(row["png"])
        slug = row["name"].replace(":", "").replace(",", "").replace(" ", "-")
        row |= words.get(slug, {"label": row["name"], "tags": []})
    rows = [row for row in rows if (row["pixels"] != WHITE).any()]  # white on white shows nothing
    rows.sort(key=lambda row: (row["style"], row["name"]))
    twins = twin_groups([row.pop("pixels") for row in rows])
    parts = held_out([row["name"] for row in rows], [row["style"] for row in rows], twins)
    first = {index: group[0] for group in twins for index in group}
    for index, (row, part) in enumerate(zip(rows, parts)):
        split = "train" if part == SEEN else "dev" if is_dev(row["name"], row["style"]) else "test"
        row |= {"part": part, "split": split, "twin": first.get(index, index)}
        row["image"] = {"bytes": row.pop("png"), "path": None}
        del row["key"]
    data = datasets.Dataset.from_list(rows, features=FEATURES)
    _save(data, output, size)
    return data


def _save(data: datasets.Dataset, output: Path, size: int) -> None:
    """Write beside the output, then put it in place."""
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    data.save_to_disk(partial)
    counts = {style: data["style"].count(style) for style in STYLES}
    table = "\n".join(
        f"| {style} | {counts[style]} | {package.name} {package.version} | {package.licence} | {package.attribution} |"
        for style, package in STYLES.items()
    )
    card = CARD.format(
        size=size,
        count=len(data),
        rows=table,
        words=f"{WORDS.name} {WORDS.version}",
        words_licence=WORDS.licence,
        words_by=WORDS.attribution,
    )
    (partial / "README.md").write_text(card)
    shutil.rmtree(output, ignore_errors=True)
    partial.replace(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/emoji/data"), help="folder of the data set")
    parser.add_argument("--cache", type=Path, help="folder of archives and renderings (default: beside the output)")
    parser.add_argument("--size", type=int, default=SIZE, help="edge of a picture in pixels")
    parser.add_argument("--workers", type=int, default=2, help="processes that render")
    parser.add_argument("--json", action="store_true", help="print the counts as JSON")
    arguments = parser.parse_args()
    if arguments.size < 1 or arguments.workers < 1:
        parser.error("--size and --workers must be at least 1")
    cache = arguments.cache or arguments.output.parent / "cache"
    data = build(arguments.output, cache, arguments.size, arguments.workers)
    counts = {part: data["part"].count(part) for part in sorted(set(data["part"]))}
    figures = {"pictures": len(data), "names": len(set(data["name"])), "parts": counts}
    print(json.dumps(figures) if arguments.json else f"{arguments.output}: {figures}")


if __name__ == "__main__":
    main()
