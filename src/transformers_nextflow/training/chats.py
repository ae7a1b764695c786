"""Chats with their pictures, in the columns of TRL's datasets, to batches: [`ChatCollator`]."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ..data.documents import Document, Message
from ..data.loading import collate
from ..data.sequences import DocumentTokenizer, SequenceSpec
from ..losses import IGNORE
from ..processing_nextflow import NextFlowProcessor


class ChatCollator:
    """Rows of a dataset to what any Trainer gives the model, pictures as pixels that the model's forward codes.

    What the assistant says and draws is supervised, everything else is only read, and tokens are those of shards
    ([`~transformers_nextflow.data.extract`]). Shards are faster to train on, since pictures are coded once, and hold
    self-corrected inputs (NextFlow sec. 3.1), which the forward does not make.

    A row has `messages`, or a `prompt` and its `completion`, each a text or messages; pictures stand in the messages'
    image items, or in `images` (or `image`), which fill these items in order.

    Args:
        processor: of the model.
        level: level of the scale schedules every picture is brought to (default: the highest).
        max_length: the longest row allowed, in positions.
        pad_to_multiple_of: what the rows' common length divides by.

    Raises:
        ValueError: for a level that there is none of; at a row without chat or assistant, whose places for pictures
            and pictures differ in number, or that is longer than `max_length`.
    """

    def __init__(
        self,
        processor: NextFlowProcessor,
        level: str | int | None = None,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
    ):
        self.image_processor, self.spec = processor.image_processor, SequenceSpec.of(processor)
        self.level = self.spec.schedules.level_name(level)
        self.max_length, self.pad_to_multiple_of = max_length, pad_to_multiple_of
        self.tokenize = DocumentTokenizer(processor, self.spec.special.eos)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """
        Returns:
            (B, L) int64 `input_ids`, `attention_mask`, `document_ids`, `labels` and the same aligned with the outputs,
            `shift_labels`, padded on the right; with pictures `pixel_values` and `image_grid_hw`.
        """
        batch = self.collate([as_chat(row, f"row {place}") for place, row in enumerate(rows)])
        blank = torch.tensor([row.get("counts") is False for row in rows])  # fills a share of an evaluation
        return batch | {name: batch[name].masked_fill(blank[:, None], IGNORE) for name in ("labels", "shift_labels")}

    def collate(self, chats: Sequence[list[dict]]) -> dict[str, torch.Tensor]:
        """Messages with their pictures in them, a row for each chat."""
        rows, pixel_values, grids = [], [], []
        for place, chat in enumerate(chats):
            row, pictures = self._row(chat, f"row {place}")
            rows.append(row)
            pixel_values += [each["pixel_values"] for each in pictures]
            grids += [each["image_grid_hw"] for each in pictures]
        multiple = self.pad_to_multiple_of or 1
        length = -(-max(len(row["input_ids"]) for row in rows) // multiple) * multiple
        batch = collate(rows, self.spec.special.pad, padded=False, pad_to=length)
        batch["attention_mask"] = (batch["document_ids"] >= 0).long()
        # the Hugging Face way, where text is not moved; what stands at <boi> and <image> is a marker in both
        batch["labels"] = F.pad(batch["shift_labels"][:, :-1], (1, 0), value=IGNORE)
        if grids:
            batch |= {"pixel_values": torch.cat(pixel_values), "image_grid_hw": torch.cat(grids)}
        return batch

    def _row(self, chat: list[dict], where: str) -> tuple[dict[str, np.ndarray], list[dict[str, torch.Tensor]]]:
        messages = tuple(
            Message(each["role"], tuple(item["text"] if item["type"] == "text" else None for item in each["content"]))
            for each in chat
        )
        images = tuple(item.get("image") for each in chat for item in each["content"] if item["type"] == "image")
        if not all(isinstance(image, Image.Image) for image in images):
            raise ValueError(f"{where} must hold PIL pictures, got {[type(image).__name__ for image in images]}")
        document = Document(where, "chat", messages, images)
        if not any(message.role == "assistant" for message in messages):
            raise ValueError(f"{where} has no message of the assistant, got roles {[each.role for each in messages]}")
        pictures = [self.image_processor(image, level=self.level, return_tensors="pt") for image in images]
        grids = np.array([each["image_grid_hw"][0].tolist() for each in pictures], dtype=np.int64).reshape(-1, 2)
        ids, supervised = self.tokenize(document)
        row = self.spec.expand(ids, supervised, grids, np.array([len(ids)]))
        length = len(row["input_ids"])
        if self.max_length is not None and length > self.max_length:
            raise ValueError(f"{where} has {length} positions, more than max_length={self.max_length}")
        return row | {"image_grid_hw": grids[:0]}, pictures  # which come as pixels, not as codes


def has_pictures(dataset) -> bool:
    """Whether TRL takes a dataset for one with pictures: by the columns of its first row."""
    return bool({"image", "images"} & set(next(iter(dataset))))


def as_chat(row: Mapping[str, Any], where: str) -> list[dict]:
    """A dataset's row as messages with their pictures in them.

    Raises:
        ValueError: naming the columns of a row without chat, or as [`with_images`] does.
    """
    if "messages" in row:
        messages = row["messages"]
    elif "prompt" in row and "completion" in row:
        messages = as_messages(row["prompt"], "user") + as_messages(row["completion"], "assistant")
    else:
        raise ValueError(f"{where} must have messages, or a prompt and its completion, got {', '.join(row)}")
    return with_images(messages, row.get("images", row.get("image")), where)


def as_messages(content: str | list[dict], role: str) -> list[dict]:
    """A text, or messages already."""
    return [{"role": role, "content": content}] if isinstance(content, str) else list(content)


def with_images(prompt, images: Image.Image | Sequence[Image.Image] | None, where: str) -> list[dict]:
    """A prompt as messages with their pictures in them, TRL's way: pictures fill the image items in order, or go
    before the first user message where there are none.

    Raises:
        ValueError: if pictures and image items differ in number, or a picture is missing.
    """
    messages = [dict(each) for each in as_messages(prompt, "user")]
    images = [images] if isinstance(images, Image.Image) else list(images or [])
    for message in messages:
        if isinstance(message["content"], str):
            message["content"] = [{"type": "text", "text": message["content"]}]
        message["content"] = [dict(item) for item in message["content"]]
    items = [item for message in messages for item in message["content"] if item["type"] == "image"]
    empty = [item for item in items if not any(item.get(key) is not None for key in ("image", "path", "url"))]
    if not items and images:
        first = next((message for message in messages if message["role"] == "user"), messages[0])
        empty = [{"type": "image"} for _ in images]
        first["content"] = empty + first["content"]
    if len(empty) != len(images) or any(image is None for image in images):
        raise ValueError(
            f"{where} has {len(empty)} places for images, and {sum(i is not None for i in images)} images"
        )
    for item, image in zip(empty, images):
        item["image"] = image
    return messages
