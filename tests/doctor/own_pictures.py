"""Packs of what a checkpoint draws and edits itself: pictures that it knows, without its training's data."""

import io
from pathlib import Path

import datasets
import torch
from PIL import Image

from transformers_nextflow import SelfCorrection
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
from transformers_nextflow.utils.loading import load_model

NAMES = ("red heart", "pear", "cat", "blue circle", "umbrella", "rocket", "sunflower", "drum", "fish", "key")
STYLES = ("fluent", "fluent flat", "noto", "noto classic", "twemoji")
CORRECTION = SelfCorrection(probability=0.5, token_share=(0.0, 0.6), top_k=4)


def build(output: Path, name: str, count: int, length: int) -> dict:
    """Draw, extract, pack into `output`/packs and verify; returns the report of `verify`.

    Of every ten documents four are drawings, two captions, three edits of the style and one is text.

    Args:
        name: folder or Hub id of the model.
        count: number of documents.
        length: of a pack.
    """
    model, processor = load_model(name)
    prompts = [f"{NAMES[n % len(NAMES)]}, {STYLES[n // len(NAMES) % len(STYLES)]}" for n in range(count)]
    sources = draw(model, processor, [[{"type": "text", "text": prompt}] for prompt in prompts])
    edited = [number for number in range(count) if number % 10 in (6, 7, 8)]
    instructions = {number: f"make it {STYLES[(number // len(NAMES) + 1) % len(STYLES)]}" for number in edited}
    asked = [
        [{"type": "image", "image": sources[number]}, {"type": "text", "text": instructions[number]}]
        for number in edited
    ]
    targets = dict(zip(edited, draw(model, processor, asked)))

    def rows():
        for number, (prompt, source) in enumerate(zip(prompts, sources)):
            if number in targets:
                said, answer, images = (None, instructions[number]), None, (source, targets[number])
            elif number % 10 in (4, 5):
                said, answer, images = (None, "describe the picture"), prompt, (source,)
            else:
                said, answer, images = (prompt,), None, (source,)
            kind = "editing" if len(images) == 2 else "captioning" if answer else "text-to-image"
            messages = (Message("user", said), Message("assistant", (answer,)))
            if number % 10 == 9:
                kind, messages, images = "text", (Message(None, (prompt,)),), ()
            yield Document(str(number), kind, messages, tuple(map(png, images))).to_row()

    output.mkdir(parents=True, exist_ok=True)
    parquet = output / "source.parquet"
    datasets.Dataset.from_list(list(rows())).to_parquet(str(parquet))
    settings = ExtractionSettings("chat", drop_text=0.1, self_correction=CORRECTION, variants=2)
    extract(Source(str(parquet)), name, output / "documents", settings)
    pack([output / "documents"], output / "packs", ComputeBudget(length), CostModel.from_config(model.config))
    return verify(output / "packs", name)


@torch.no_grad()
def draw(model, processor, contents: list[list[dict]], batch: int = 16) -> list[Image.Image]:
    """A square picture for every message, drawn as the model holds pictures likely: without guidance."""
    schedule, pictures = model.model.schedules.by_aspect_ratio("1:1"), []
    for first in range(0, len(contents), batch):
        chats = [[{"role": "user", "content": content}] for content in contents[first : first + batch]]
        inputs = processor.apply_chat_template(chats, generation_mode="image").to(model.device)
        plain = {"temperature": 1.0, "guidance_scale": 1.0, "top_k": 0, "top_p": 1.0}
        codes = model.generate(**inputs, generation_mode="image", aspect_ratio="1:1", seed=first, **plain)
        pixels = model.decode_image_tokens(codes, schedule.final_grid)
        pictures += processor.post_process_image(pixels)
    return pictures


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()
