"""Documents of every kind, and what tests of data share."""

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from transformers_nextflow import SelfCorrection
from transformers_nextflow.data import Document, ExtractionSettings, Message

SETTINGS = ExtractionSettings(
    self_correction=SelfCorrection(top_k=8), variants=2, batch_size=2, documents_per_shard=5, seed=3
)


def picture(seed: int, height: int = 40, width: int = 40) -> bytes:
    """A smooth random picture, as a PNG."""
    noise = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize((width, height)).save(buffer, format="PNG")
    return buffer.getvalue()


def documents() -> list[Document]:
    """Every kind twice, of three shapes of pictures, in a mixed order."""
    made = []
    for n in range(2):
        square, wide, tall = picture(3 * n), picture(3 * n + 1, 30, 60), picture(3 * n + 2, 60, 30)
        chats = {
            "text": (Message(None, ("here is a red circle. " * (n + 2),)),),
            "text-to-image": (Message("user", ("a blue square",)), Message("assistant", (None,))),
            "captioning": (Message("user", (None, "describe the picture")), Message("assistant", ("a star",))),
            "editing": (Message("user", (None, None, "make it green")), Message("assistant", (None,))),
            "interleaved": (Message(None, ("here is one.", None, "it moves.", None, "the end.")),),
            "video": (Message(None, (None, None, None)),),
            "reasoning": (
                Message("system", ("be exact",)),
                Message("user", ("draw what you like",)),
                Message("assistant", ("the user wants a circle. the final prompt is: a red circle", None)),
                Message("user", ("and what is it?",)),
                Message("assistant", ("a red circle",)),
            ),
        }
        images = {
            "text-to-image": (wide,),
            "captioning": (tall,),
            "editing": (square, wide, wide),
            "interleaved": (tall, square),
            "video": (square, square, tall),
            "reasoning": (tall,),
        }
        made += [Document(f"{kind}-{n}", kind, chat, images.get(kind, ())) for kind, chat in chats.items()]
    return made


def files_of(folder: Path) -> dict[str, bytes]:
    """Everything in a folder, by relative name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def edit_manifest(folder: Path, change) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
