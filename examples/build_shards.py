"""The shapes world as packed training shards: `python -m examples.build_shards --output runs/shapes-packs`.

Documents of every task are drawn into a Parquet file of the one schema, then extracted, packed and verified as any
other source is.
"""

import argparse
import io
import json
import random
from pathlib import Path

import datasets
from PIL import Image
from transformers.utils import logging

from transformers_nextflow import SelfCorrection
from transformers_nextflow.cli import model_name
from transformers_nextflow.configuration_nextflow import NextFlowConfig
from transformers_nextflow.data import (
    ComputeBudget,
    CostModel,
    Document,
    ExtractionSettings,
    Message,
    Source,
    extract,
    pack,
    verify,
)

from .shapes import grammar
from .shapes.sizes import CANVAS_WEIGHTS, CANVASES
from .shapes.world import render

TASK_WEIGHTS = {"t2i": 0.4, "caption": 0.12, "vqa": 0.08, "edit": 0.2, "story": 0.1, "text": 0.1}
CORRECTION = SelfCorrection(probability=0.5, token_share=(0.0, 0.6), top_k=4)


def to_document(key: str, drawn: grammar.Document) -> Document:
    """A document of the grammar in the schema of the data pipeline."""
    texts, images = drawn.texts, tuple(_png(scene) for scene in drawn.scenes)
    if drawn.task == "t2i":
        chat = (Message("user", texts), Message("assistant", (None,)))
    elif drawn.task in ("caption", "vqa"):
        chat = (Message("user", (None, texts[0])), Message("assistant", (texts[1],)))
    elif drawn.task == "edit":
        chat = (Message("user", (None, *texts)), Message("assistant", (None,)))
    elif drawn.task == "story":
        chat = (Message(None, tuple(part for text in texts for part in (text, None))),)
    else:
        chat = (Message(None, (" ".join(texts),)),)
    kinds = {"t2i": "text-to-image", "caption": "captioning", "edit": "editing", "story": "interleaved"}
    return Document(key, kinds.get(drawn.task, drawn.task), chat, images)


def _png(scene) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(render(scene)).save(buffer, format="PNG")
    return buffer.getvalue()


def draw_rows(count: int, seed: int):
    """Rows of `count` documents; each depends on the seed and its number alone."""
    for number in range(count):
        rng = random.Random(f"document {seed} {number}")
        task = rng.choices(list(TASK_WEIGHTS), list(TASK_WEIGHTS.values()))[0]
        canvas = rng.choices(CANVASES, CANVAS_WEIGHTS)[0]
        yield to_document(f"shapes-{number}", grammar.sample_document(rng, task, canvas)).to_row()


def build(output: Path, model: str, count: int, length: int, multiple_of: int = 1, seed: int = 0) -> dict:
    """Draw, extract, pack and verify; returns the report of `verify`."""
    parquet = output / "source" / "documents.parquet"
    if not parquet.exists():
        parquet.parent.mkdir(parents=True, exist_ok=True)
        rows = datasets.Dataset.from_list(list(draw_rows(count, seed)))
        partial = parquet.with_name(".documents.partial")
        rows.to_parquet(str(partial))
        partial.replace(parquet)
    settings = ExtractionSettings("chat", drop_text=0.1, self_correction=CORRECTION, variants=2, seed=seed)
    extract(Source(str(parquet)), model, output / "documents", settings)
    cost_model = CostModel.from_config(NextFlowConfig.from_pretrained(model))
    pack([output / "documents"], output / "packs", ComputeBudget(length), cost_model, multiple_of, seed=seed)
    return verify(output / "packs", model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/shapes-packs"), help="default: %(default)s")
    parser.add_argument("--model", help="local folder or Hub id (default: the repository's checkpoint)")
    parser.add_argument("--documents", type=int, default=2_000, metavar="N", help="default: %(default)s")
    parser.add_argument("--length", type=int, default=2_048, metavar="N", help="of a pack (default: %(default)s)")
    parser.add_argument("--multiple-of", type=int, default=1, metavar="N", help="ranks x accumulation steps")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    report = build(
        arguments.output,
        model_name(arguments.model),
        arguments.documents,
        arguments.length,
        arguments.multiple_of,
        arguments.seed,
    )
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
