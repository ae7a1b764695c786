"""Documents of the grammar in the schema of the data pipeline, and the path from them to packs."""

import io
import random
from pathlib import Path

import datasets
from PIL import Image

from transformers_nextflow.configuration_nextflow import NextFlowConfig
from transformers_nextflow.data import CostModel, Document, ExtractionSettings, Message, Source, extract, pack
from transformers_nextflow.data.packing import Strategy
from transformers_nextflow.files import write_atomically

from . import grammar
from .sizes import CANVAS_WEIGHTS, CANVASES
from .world import render

KINDS = {"t2i": "text-to-image", "caption": "captioning", "edit": "editing", "story": "interleaved"}


def to_document(key: str, drawn: grammar.Document) -> Document:
    """A document of the grammar in the schema."""
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
    return Document(key, KINDS.get(drawn.task, drawn.task), chat, images)


def _png(scene) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(render(scene)).save(buffer, format="PNG")
    return buffer.getvalue()


def draw_rows(count: int, mixture: dict[str, float], seed: int):
    """Rows of `count` documents of the tasks in these shares; each depends on the seed and its number alone."""
    for number in range(count):
        rng = random.Random(f"document {seed} {number}")
        task = rng.choices(list(mixture), list(mixture.values()))[0]
        canvas = rng.choices(CANVASES, CANVAS_WEIGHTS)[0]
        yield to_document(f"shapes-{number}", grammar.sample_document(rng, task, canvas)).to_row()


def build_packs(
    output: Path,
    model: str | Path,
    count: int,
    mixture: dict[str, float],
    settings: ExtractionSettings,
    strategy: Strategy,
    multiple_of: int = 1,
    num_proc: int = 1,
) -> Path:
    """Draw documents into `output`/source, code them with a model's tokenizers into `output`/documents and pack them
    into `output`/packs, whose folder is returned; the same call continues a stopped run."""
    parquet = output / "source" / "documents.parquet"
    if not parquet.exists():
        rows = datasets.Dataset.from_generator(
            draw_rows, gen_kwargs=dict(count=count, mixture=mixture, seed=settings.seed)
        )
        write_atomically(parquet, lambda partial: rows.to_parquet(str(partial)))
    extract(Source(str(parquet)), model, output / "documents", settings, num_proc=num_proc)
    cost_model = CostModel.from_config(NextFlowConfig.from_pretrained(model))
    pack([output / "documents"], output / "packs", strategy, cost_model, multiple_of, seed=settings.seed)
    return output / "packs"
