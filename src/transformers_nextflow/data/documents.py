"""One schema for every kind of training document, and rows of a source brought to it.

A document is a chat as Hugging Face writes it: messages with a role and a content of texts and images, and the images
beside it in order. What the assistant says and draws is supervised, everything else is only read. A message whose role
is `None` is no chat but running text and pictures, all of it supervised; it stands alone.

| kind | messages |
|---|---|
| text | running text |
| text-to-image | user: text; assistant: image |
| captioning | user: image, question; assistant: text |
| editing | user: one or more condition images, instruction; assistant: image |
| interleaved | running texts and images |
| video | running frames, after a text where there is one |
| chat | anything: SFT (only responses supervised), reasoning before an image |
"""

import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from ..image_processing_nextflow import DAMAGED, upright_size

PictureSource = bytes | str | Path | Image.Image
"""A picture as documents have it: encoded, by its path, or opened by Pillow."""

CAPTION_QUESTION = "describe the picture"
MAX_IMAGES = {"512": 5, "1024": 3}  # of interleaved documents and videos, by level (NextFlow sec. 5)


@dataclass(frozen=True)
class Message:
    """`role` is "system", "user", "assistant" or None; `content` holds texts, and None where an image stands."""

    role: str | None
    content: tuple[str | None, ...]


@dataclass(frozen=True)
class Document:
    """One training example.

    Attributes:
        key: names the document in logs and seeds its draws; unique in its source.
        kind: one of the table above.
        messages: a chat, or one message of role None.
        images: encoded pictures (bytes), paths or PIL pictures, in the order in which the messages show them.
    """

    key: str
    kind: str
    messages: tuple[Message, ...]
    images: tuple[PictureSource, ...] = ()

    def __post_init__(self):
        roles = [message.role for message in self.messages]
        if not roles or (None in roles and len(roles) > 1):
            raise ValueError(f"document {self.key} must be a chat or one message without a role, got roles {roles}")
        if unknown := set(roles) - {None, "system", "user", "assistant"}:
            raise ValueError(f"document {self.key} has messages of unknown roles {sorted(unknown)}")
        if len(self.image_roles) != len(self.images):
            raise ValueError(
                f"document {self.key} shows {len(self.image_roles)} images in its messages and has {len(self.images)}"
            )

    @property
    def image_roles(self) -> tuple[str | None, ...]:
        """The role of the message that shows each image."""
        return tuple(message.role for message in self.messages for part in message.content if part is None)

    @property
    def supervised_images(self) -> tuple[bool, ...]:
        return tuple(is_supervised(role) for role in self.image_roles)

    @property
    def text(self) -> str:
        """All texts, a line each."""
        return "\n".join(part for message in self.messages for part in message.content if part)

    def to_row(self) -> dict[str, Any]:
        """The row that [`DocumentReader`] of the task `"chat"` reads back."""
        messages = [
            {
                "role": message.role,
                "content": [
                    {"type": "image", "text": None} if part is None else {"type": "text", "text": part}
                    for part in message.content
                ],
            }
            for message in self.messages
        ]
        images = [
            {"bytes": image, "path": None} if isinstance(image, bytes) else {"bytes": None, "path": image}
            for image in self.images
        ]
        return {"key": self.key, "kind": self.kind, "messages": messages, "images": images}


def is_supervised(role: str | None) -> bool:
    return role in (None, "assistant")


def open_image(image: PictureSource) -> Image.Image:
    """An encoded picture or a path of a [`Document`], opened but not decoded."""
    return Image.open(io.BytesIO(image) if isinstance(image, bytes) else image)  # type: ignore[arg-type]


class Skipped(Exception):
    """A row that becomes no document, with the reason it is counted under."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


@contextmanager
def skipping_damaged() -> Iterator[None]:
    """Raise what decoders raise of damaged pictures as [`Skipped`]."""
    try:
        yield
    except DAMAGED as error:
        said, _, _ = str(error).partition(" <_io.")  # of a file in memory Pillow says where in memory it is
        raise Skipped("unreadable image", said) from error


def read_size(image: PictureSource) -> tuple[int, int]:
    """(height, width) of a picture of a [`Document`] once it is upright, by its header; raises [`Skipped`] where that
    cannot be read."""
    with skipping_damaged(), open_image(image) as picture:
        return upright_size(picture)


COLUMNS = {
    "text": {"text": True},
    "text-to-image": {"text": True, "image": True},
    "captioning": {"text": True, "image": True, "question": False},
    "editing": {"image": True, "text": True, "target": True},
    "interleaved": {"texts": True, "images": True},
    "video": {"images": True, "text": False},
    "chat": {"messages": True, "images": False, "kind": False},
}
"""The columns each task reads, by default under these names; True = required. Every task may also read "key"."""


@dataclass(frozen=True)
class DocumentReader:
    """Rows of a source as documents of one task.

    Args:
        task: one of `COLUMNS`.
        columns: the source's own name of a column, where it differs: `{"text": "caption"}`.
        max_images: images of an interleaved document (longer ones continue as further documents) or frames of a video
            (evenly spaced ones are taken).
        root: folder that relative image paths of a source start from; `None` for datasets of the Hub.
    """

    task: str
    columns: Mapping[str, str] = field(default_factory=dict)
    max_images: int | None = None
    root: str | None = None

    def __post_init__(self):
        if self.task not in COLUMNS:
            raise ValueError(f"task must be one of {', '.join(COLUMNS)}, got {self.task!r}")
        known = {"key", *COLUMNS[self.task]}
        if unknown := set(self.columns) - known:
            names = (", ".join(sorted(group)) for group in (known, unknown))
            raise ValueError("the task {} reads {}, got {}".format(self.task, *names))
        if self.max_images is not None and self.max_images < 1:
            raise ValueError(f"max_images must be positive, got {self.max_images}")

    def check_columns(self, names: Sequence[str]) -> None:
        """Raise a ValueError that names the columns a source lacks."""
        required = [name for name, needed in COLUMNS[self.task].items() if needed]
        wanted = [self.columns.get(name, name) for name in required]
        wanted += [column for name, column in self.columns.items() if name not in required]
        if missing := [column for column in wanted if column not in names]:
            raise ValueError(
                f"the task {self.task} needs the columns {', '.join(missing)}; the source has {', '.join(names)}. "
                "Name the source's own columns with --columns, e.g. text=caption"
            )

    def key_of(self, row: Mapping[str, Any], index: int) -> str:
        """The row's key: its own, webdataset's, or its index."""
        key = row.get(self.columns.get("key", "key"))
        return str(row.get("__key__", index) if key is None else key)

    def read(self, row: Mapping[str, Any], index: int) -> list[Document]:
        """The documents of a row: one, or several where an interleaved row is longer than `max_images`.

        Raises:
            Skipped: where the row lacks a text or an image.
        """
        get = lambda name: row.get(self.columns.get(name, name))  # noqa: E731
        key = self.key_of(row, index)
        if self.task == "text":
            return [Document(key, "text", (Message(None, (_text(get("text")),)),))]
        if self.task == "text-to-image":
            messages = (Message("user", (_text(get("text")),)), Message("assistant", (None,)))
            return [Document(key, self.task, messages, (self.image(get("image")),))]
        if self.task == "captioning":
            question = _string(get("question") or CAPTION_QUESTION)
            return [_captioning(key, self.image(get("image")), question, _text(get("text")))]
        if self.task == "editing":
            conditions = tuple(map(self.image, _as_list(get("image"))))
            if not conditions:
                raise Skipped("no image")
            user = Message("user", (*[None] * len(conditions), _text(get("text"))))
            target = self.image(get("target"))
            return [Document(key, self.task, (user, Message("assistant", (None,))), (*conditions, target))]
        if self.task == "interleaved":
            return self._interleaved(key, get("texts"), get("images"))
        if self.task == "video":
            return [self._video(key, get("images"), get("text"))]
        return [self._chat(key, get("kind") or "chat", get("messages"), get("images"))]

    def image(self, cell: Any) -> bytes | str:
        """An image cell (encoded bytes, a path, or `datasets`' own of both) as bytes or a path.

        A path that a dataset of the Hub merely spells is refused; those of `datasets`' own lead into its cache.
        """
        spelled = isinstance(cell, str)
        if isinstance(cell, Mapping):
            cell = cell.get("bytes") if cell.get("bytes") is not None else cell.get("path")
        if isinstance(cell, bytes) and cell:
            return cell
        if not isinstance(cell, str) or not cell:
            raise Skipped("no image")
        if spelled and self.root is None:
            raise Skipped("no image", f"a path, {cell}, where images must be embedded")
        return str(Path(self.root or ".") / cell)

    def _interleaved(self, key: str, texts: Any, images: Any) -> list[Document]:
        """Parallel lists as in OBELICS: at each place a text, an image or both, the text first."""
        texts, images = _as_list(texts), _as_list(images)
        if len(texts) != len(images):
            raise Skipped("texts and images of different lengths", f"{len(texts)} and {len(images)}")
        parts: list[tuple[str | None, Any]] = []
        for text, image in zip(texts, images):
            parts += [(_string(text), None)] if text else []
            parts += [(None, self.image(image))] if image is not None else []
        if not parts:
            raise Skipped("no text")
        pieces: list[list] = [[]]
        for part in parts:
            shown = sum(image is not None for _, image in pieces[-1])
            if part[1] is not None and shown == self.max_images:
                pieces.append([])
            pieces[-1].append(part)
        return [
            Document(
                key if number == 0 else f"{key}#{number}",
                self.task,
                (Message(None, tuple(text for text, _ in piece)),),
                tuple(image for _, image in piece if image is not None),
            )
            for number, piece in enumerate(pieces)
        ]

    def _video(self, key: str, frames: Any, text: str | None) -> Document:
        frames = _as_list(frames)
        if not frames:
            raise Skipped("no image")
        if self.max_images and len(frames) > self.max_images:
            last, count = len(frames) - 1, max(self.max_images - 1, 1)
            frames = [frames[place * last // count] for place in range(self.max_images)]
        content = (*((_string(text),) if text else ()), *[None] * len(frames))
        return Document(key, self.task, (Message(None, content),), tuple(map(self.image, frames)))

    def _chat(self, key: str, kind: str, messages: Any, images: Any) -> Document:
        if not messages:
            raise Skipped("no text")
        messages = _as_list(messages)
        read = tuple(map(_message, messages))
        items = [item for message in messages for item in message["content"] if isinstance(item, Mapping)]
        cells = [_picture_of(item) for item in items if item["type"] == "image"]
        apart = iter(_as_list(images))  # of the items that have none in them
        if cells.count(None) == len(_as_list(images)):
            cells = [next(apart) if cell is None else cell for cell in cells]
        else:
            cells = list(apart)
        try:
            return Document(key, _string(kind), read, tuple(map(self.image, cells)))
        except ValueError as error:
            raise Skipped("malformed chat", str(error)) from error


def _message(message: Any) -> Message:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str | None):
        raise Skipped("malformed chat", f"a message has a role and a content, got {message!r}")
    content = message.get("content")
    items = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(items, (list, tuple)):
        raise Skipped("malformed chat", f"a content is a text or a list of items, got {content!r}")
    return Message(message.get("role"), tuple(map(_content_part, items)))


def _content_part(item: Any) -> str | None:
    kind = item.get("type") if isinstance(item, Mapping) else None
    if kind == "image":
        return None
    if kind == "text" and item.get("text") is not None:
        return _string(item["text"])
    raise Skipped("malformed chat", f"content items are of type text or image, got {item!r}")


def _picture_of(item: Mapping) -> Any:
    """The image cell in an item of a chat, where it has one."""
    return next((item[name] for name in ("image", "path", "url") if item.get(name) is not None), None)


def _text(cell: Any) -> str:
    if not cell or not _string(cell).strip():
        raise Skipped("no text")
    return _string(cell)


def _string(cell: Any) -> str:
    """A text, or UTF-8 bytes of one."""
    try:
        text = cell.decode() if isinstance(cell, bytes) else cell
        if isinstance(text, str):
            text.encode()
            return text
    except UnicodeError as error:
        raise Skipped("no Unicode text", str(error)) from error
    raise Skipped("no text", f"a {type(cell).__name__}")


def _as_list(cell: Any) -> list:
    if cell is None:
        return []
    return list(cell) if isinstance(cell, (list, tuple)) else [cell]


def _captioning(key: str, image: PictureSource, question: str, answer: str) -> Document:
    messages = (Message("user", (None, question)), Message("assistant", (answer,)))
    return Document(key, "captioning", messages, (image,))


def draw(seed: int, purpose: str, key: str) -> float:
    """A number in [0, 1) that depends on these three alone."""
    digest = hashlib.sha256(f"{seed}:{purpose}:{key}".encode()).digest()
    return int.from_bytes(digest[:8], "little") / 2**64


@dataclass(frozen=True)
class Transformations:
    """What the paper does to documents before training, by draws of the seed and each document's key.

    Args:
        invert_share: share of text-to-image pairs turned into captioning (NextFlow sec. 5: 10% in late pretraining).
        drop_text: share of documents whose answer has a picture that lose the user's texts: the null prompt of
            guidance, in the form that generation uses.
        drop_condition: share that lose the condition images as well, for a second image guidance.
    """

    invert_share: float = 0.0
    drop_text: float = 0.0
    drop_condition: float = 0.0
    seed: int = 0

    def __post_init__(self):
        for name in ("invert_share", "drop_text", "drop_condition"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        if self.drop_text + self.drop_condition > 1:
            raise ValueError(f"{self.drop_text=} and {self.drop_condition=} must not exceed 1 together")

    def __call__(self, document: Document) -> tuple[Document, str | None]:
        """The document as it is trained on, and what was done to it: "inverted", "text dropped", ..."""
        key = document.key
        if document.kind == "text-to-image" and draw(self.seed, "invert", key) < self.invert_share:
            return _captioning(key, document.images[0], CAPTION_QUESTION, document.text), "inverted"
        if "assistant" not in document.image_roles:
            return document, None
        chance = draw(self.seed, "drop", key)
        if chance < self.drop_condition and "user" in document.image_roles:
            images = tuple(image for image, role in zip(document.images, document.image_roles) if role != "user")
            return replace(document, messages=_without_users(document.messages, images=False), images=images), (
                "text and condition images dropped"
            )
        if self.drop_condition <= chance < self.drop_condition + self.drop_text:
            return replace(document, messages=_without_users(document.messages, images=True)), "text dropped"
        return document, None


def _without_users(messages: Sequence[Message], images: bool) -> tuple[Message, ...]:
    """The messages with the user's texts empty, and without the user's images unless `images`."""
    return tuple(
        message
        if message.role != "user"
        else Message("user", (*[part for part in message.content if part is None and images], ""))
        for message in messages
    )
