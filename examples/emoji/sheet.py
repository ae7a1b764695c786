"""Draw what a checkpoint does on one sheet: `python -m examples.emoji.sheet --output docs/emoji.png`.

The first 32 held-out pairs of name and style of the test split, drawing beside truth; held-out edits: source, result,
truth; and one picture after each of its scales, from coarse to fine. Nothing is picked by hand.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from transformers_nextflow.utils.files import write_atomically
from transformers_nextflow.utils.loading import DEFAULT_MODEL

from .artist import Artist
from .evaluate import load_artist
from .panels import panel, stacked
from .splits import PAIR, SEEN
from .tasks import KINDS, Item, Tasks

PROMPTS, COLUMNS, EDIT_COLUMNS = 32, 8, 5


def rows_of(cells: list[Image.Image], columns: int) -> list[list[Image.Image]]:
    return [cells[start : start + columns] for start in range(0, len(cells), columns)]


def prompts(artist: Artist, tasks: Tasks, split: str = "test", count: int = PROMPTS) -> list[list[Image.Image]]:
    """Drawing and truth of the first held-out prompts."""
    items = [tasks.draw("text-to-image", split, number, part=PAIR, kind="") for number in range(count)]
    pairs = zip(items, artist.draw(items))
    return rows_of([panel([drawing, _truth(artist, item)], item.user[0]) for item, drawing in pairs], COLUMNS)


def edits(artist: Artist, tasks: Tasks, split: str = "test") -> list[list[Image.Image]]:
    """Source, result and truth of the first held-out edit of each kind."""
    kinds = [kind for kind in KINDS["editing"] if tasks.targets("editing", kind, split, PAIR)]
    items = [tasks.draw("editing", split, 0, part=PAIR, kind=kind) for kind in kinds]
    drawn = zip(items, artist.draw(items))
    pictures = artist.world.pictures
    cells = [
        panel([pictures[item.read[0].rows[0]], drawing, _truth(artist, item)], item.user[1], lines=2)
        for item, drawing in drawn
    ]
    return rows_of(cells, EDIT_COLUMNS)


def scales(artist: Artist, item: Item) -> Image.Image:
    """The drawing of an item after each scale."""
    chat = [{"role": "user", "content": item.user[0]}]
    inputs = artist.processor.apply_chat_template(chat, generation_mode="image")
    output = artist.model.generate(
        **inputs.to(artist.model.device), generation_mode="image", seed=0, return_dict_in_generate=True
    )
    codes, grid = output.sequences - artist.model.config.text_vocab_size, output.image_grid_hw[0].tolist()
    vq_model = artist.model.model.vq_model
    count = len(vq_model.schedules.by_grid(grid))
    previews = torch.cat([vq_model.decode_prefix(codes, grid, scale) for scale in range(1, count + 1)])
    text = f"{item.user[0]}: after each scale"
    return panel(artist.processor.post_process_image(previews), text, lines=1)


def _truth(artist: Artist, item: Item) -> np.ndarray:
    return artist.world.pictures[item.targets[0]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL, help="folder of the checkpoint")
    parser.add_argument("--data", type=Path, default=Path("runs/emoji/data"), help="of `examples.emoji.data`")
    parser.add_argument("--output", type=Path, default=Path("docs/emoji.png"), help="default: %(default)s")
    arguments = parser.parse_args()
    artist = load_artist(arguments.model, arguments.data, torch.device("cpu"))
    tasks = Tasks.of(artist.world)
    first = tasks.draw("text-to-image", "test", 0, part=SEEN, kind="")
    sheet = stacked([*prompts(artist, tasks), *edits(artist, tasks), [scales(artist, first)]])
    write_atomically(arguments.output, lambda partial: sheet.save(partial, format="PNG", optimize=True))


if __name__ == "__main__":
    main()
