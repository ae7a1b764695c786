"""A quarter of text-only positions against none, at equal text-to-image data (table 1):
`python -m benchmarks.paper.text_share RUN --json`.

Text is names with their tags. Both arms pack the same text-to-image documents and take as many steps; a step of
`text-0.25` holds four packs where one of `text-0` holds three, so that both see as many positions of text-to-image.
"""

from pathlib import Path

import datasets

from examples.emoji.documents import EXTRACTION, draw_rows
from examples.emoji.world import World
from transformers_nextflow import NextFlowConfig
from transformers_nextflow.data import CostModel, Document, FixedLength, Message, Source, extract, pack
from transformers_nextflow.utils.files import write_atomically

from .arms import HALVES, HELD_OUT, RECIPE, T2I, Claim, code, conduct, dev, train_arm, untrained

SHARES = {"text-0.25": 0.25, "text-0": 0.0}
PACKS_OF_A_HALF = {"text-0.25": 4, "text-0": 3}
TEXTS = 4  # of one document
CLAIMS = [Claim("25% of text-only data does not hurt text-to-image", "table 1", *SHARES, "vision", "0 or -")]


def rows(data: str, count: int):
    """`count` text-to-image documents, and twice as many of text alone."""
    world = World(data)
    yield from draw_rows(world, T2I, range(count), seed=0)
    for number in range(2 * count):
        seen = [world.seen[(number * TEXTS + place) % len(world.seen)] for place in range(TEXTS)]
        text = ". ".join(f"{world.names[row]}: {', '.join(world.tags[row])}" for row in seen)
        yield Document(f"text-{number}", "text", (Message(None, (text,)),)).to_row()


def prepare(folder: Path, options) -> None:
    code(folder / "held_out", options, dev(T2I), HELD_OUT)
    parquet, documents = folder / "documents.parquet", folder / "documents"
    if not parquet.exists():
        arguments = {"data": str(options.data), "count": options.documents}
        source = datasets.Dataset.from_generator(rows, gen_kwargs=arguments)
        write_atomically(parquet, lambda partial: source.to_parquet(str(partial)))
    extract(Source(str(parquet)), str(options.run / "start"), documents, EXTRACTION)
    costs = CostModel.from_config(NextFlowConfig.from_pretrained(options.run / "start"))
    for arm, share in SHARES.items():
        multiple = HALVES * PACKS_OF_A_HALF[arm]
        pack([documents], folder / arm, FixedLength(RECIPE.pack_length), costs, multiple, text_share=share)


def run_arm(folder: Path, arm: str, seed: int, options) -> dict:
    held_out = {"": folder / "held_out" / "packs"}
    return train_arm(
        folder, untrained(options.run, seed), folder / arm, held_out, options.steps, seed, PACKS_OF_A_HALF[arm]
    )


if __name__ == "__main__":
    conduct("text_share", __doc__, CLAIMS, list(SHARES), run_arm, prepare)
