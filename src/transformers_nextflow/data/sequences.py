"""A document's compact ids, and their expansion to what the model's forward takes.

Compact: text ids, and one `<image>` id where a whole image stands (`<boi>`, its slots, `<eoi>`), beside one flag for
each id, whether it is supervised. Codes and final grids are kept apart. An image takes `2 + slots` positions; one that
is only read carries its last scale where the model is configured so.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ..layout import num_image_slots
from ..losses import IGNORE
from ..scales import Grid, ScheduleTable
from .documents import Document, is_supervised

# private-use characters where a text of the chat goes, between spaces that a template takes away where it trims it
PLACEHOLDER = re.compile("(\u2003?)\ue000([0-9]+)\ue001(\u2003?)")
TRIMS: dict[tuple[bool, bool], Callable[[str], str]] = {
    (True, True): str,
    (False, True): str.lstrip,
    (True, False): str.rstrip,
    (False, False): str.strip,
}


@dataclass(frozen=True)
class SpecialIds:
    """Ids of the text tokenizer that the layout of sequences rests on."""

    boi: int
    eoi: int
    image: int
    eos: int
    pad: int


class DocumentTokenizer:
    """Documents to compact ids, through the processor's own chat template.

    Texts hold no control tokens, whatever they spell. What is not supervised is tokenized together with the template
    around it, as a prompt is; what is supervised begins with a token of its own, as an answer to a prompt does, and
    lasts up to its end of turn.
    """

    def __init__(self, processor, eos_token_id: int):
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.image_id, self.eos_id = processor.image_token_id, eos_token_id
        self.image_triple = [processor.boi_token_id, processor.image_token_id, processor.eoi_token_id]
        self._skeleton = lru_cache(maxsize=4096)(self._render)
        self._template_parts = lru_cache(maxsize=4096)(self._split_template)
        # also control tokens that the text tokenizer does not count among the special ones
        tokens = sorted((str(token) for token in self.tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
        self._control_tokens = re.compile(f"((?:{'|'.join(map(re.escape, tokens))})+)")

    def __reduce__(self):
        return type(self), (self.processor, self.eos_id)  # workers that are spawned render for themselves

    def __call__(self, document: Document) -> tuple[np.ndarray, np.ndarray]:
        """(C,) int32 compact ids and (C,) bool supervision."""
        if document.messages[0].role is None:
            return self._running(document)
        texts = [part for message in document.messages for part in _joined(message.content) if part is not None]
        shape = tuple(
            (message.role, tuple(part is None for part in _joined(message.content))) for message in document.messages
        )
        ids: list[int] = []
        supervised: list[bool] = []
        images = iter(document.supervised_images)
        answering, unread = False, ""  # text that is not tokenized yet

        def read(words: Sequence[int]) -> None:
            nonlocal answering
            for token in words:
                if token == self.image_id:
                    answering = next(images)
                ids.append(token)
                supervised.append(answering)
                answering = answering and token != self.eos_id

        for template, text_index, role, trim in self._skeleton(shape):
            for part in self._template_parts(template):
                if isinstance(part, str):
                    unread += part
                else:
                    read(self._tokenize_text(unread))
                    unread = ""
                    read(part)
            if is_supervised(role) or answering:  # the end has no role
                read(self._tokenize_text(unread))
                unread = ""
            if text_index is not None:
                answering = is_supervised(role)
                unread += trim(texts[text_index])
            if answering:
                read(self._tokenize_text(unread))
                unread = ""
        if next(images, None) is not None:
            raise ValueError(f"the chat template shows fewer images than document {document.key} has")
        return np.array(ids, dtype=np.int32), np.array(supervised, dtype=bool)

    def _running(self, document: Document) -> tuple[np.ndarray, np.ndarray]:
        ids: list[int] = []
        for part in document.messages[0].content:
            ids += [self.image_id] if part is None else self._tokenize_text(part)
        ids.append(self.eos_id)
        return np.array(ids, dtype=np.int32), np.ones(len(ids), dtype=bool)

    def _tokenize_text(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids if text else []

    def _render(self, shape: tuple) -> list[tuple[str, int | None, str | None, Callable[[str], str]]]:
        """Pieces of the template, each with the text that follows it, that text's role and what the template makes of
        the whitespace at its ends."""
        roles, chat = [], []
        for role, parts in shape:
            content = []
            for is_image in parts:
                if is_image:
                    content.append({"type": "image"})
                else:
                    content.append({"type": "text", "text": f"\u2003\ue000{len(roles)}\ue001\u2003"})
                    roles.append(role)
            chat.append({"role": role, "content": content})
        rendered = self.tokenizer.apply_chat_template(
            chat, chat_template=self.processor.chat_template, tokenize=False, add_generation_prompt=False
        )
        *pieces, end = PLACEHOLDER.split(rendered)  # template, space, text index, space, template, ..., template
        indices = [int(index) for index in pieces[2::4]]
        if indices != list(range(len(roles))):
            raise ValueError("the chat template must show every text of a chat once and in order")
        trims = [TRIMS[bool(before), bool(after)] for before, after in zip(pieces[1::4], pieces[3::4])]
        return [*zip(pieces[::4], indices, roles, trims), (end, None, None, str)]

    def _split_template(self, piece: str) -> list[str | list[int]]:
        """A piece of the template: its texts, and the ids of the control tokens between them, each image one id."""
        parts: list[str | list[int]] = []
        for index, part in enumerate(self._control_tokens.split(piece)):
            if index % 2 == 0:
                parts += [part] if part else []
                continue
            ids = self.tokenizer(part, add_special_tokens=False).input_ids
            compact, place = [], 0
            while place < len(ids):
                is_image = ids[place : place + 3] == self.image_triple
                compact.append(self.image_id if is_image else ids[place])
                place += 3 if is_image else 1
            parts.append(compact)
        return parts


def _joined(content: Sequence[str | None]) -> list[str | None]:
    """Neighbouring texts as one, because they are tokenized as one."""
    joined: list[str | None] = []
    for part in content:
        if part is not None and joined and joined[-1] is not None:
            joined[-1] += part
        else:
            joined.append(part)
    return joined


@dataclass(frozen=True)
class Extent:
    """What a document costs to train on.

    Attributes:
        num_tokens: positions.
        attended_pairs: (query, key) pairs of scale-block attention inside the document.
        num_targets: supervised positions.
    """

    num_tokens: int
    attended_pairs: int
    num_targets: int


class SequenceSpec:
    """How compact sequences of one model unfold.

    Args:
        schedules, special: of the model.
        condition_last_scale: whether images that are only read carry their last scale.
    """

    def __init__(self, schedules: ScheduleTable, special: SpecialIds, condition_last_scale: bool):
        self.schedules, self.special, self.condition_last_scale = schedules, special, condition_last_scale

    @classmethod
    def of(cls, processor) -> "SequenceSpec":
        """Of what a [`NextFlowProcessor`] makes."""
        ids = processor.boi_token_id, processor.eoi_token_id, processor.image_token_id
        special = SpecialIds(*ids, processor.tokenizer.eos_token_id, processor.tokenizer.pad_token_id)
        return cls(processor.image_processor.schedule_table(), special, processor.condition_last_scale)

    def num_slots(self, grid: Grid, supervised: bool) -> int:
        return num_image_slots(self.schedules.by_grid(grid), self.condition_last_scale and not supervised)

    def _blocks(self, grid: Grid, supervised: bool) -> tuple[int, ...]:
        """Lengths of an image's scale blocks."""
        lengths = self.schedules.by_grid(grid).lengths
        return lengths[1:] + (lengths[-1:] if self.condition_last_scale and not supervised else ())

    def measure(self, ids: np.ndarray, supervised: np.ndarray, grids: np.ndarray) -> Extent:
        """The extent of one compact document; `grids` is (images, 2)."""
        position = pairs = done = 0
        for place, grid in zip(np.flatnonzero(ids == self.special.image), grids):
            before = int(place) - done + 1  # texts and <boi>, causal
            pairs += before * position + before * (before + 1) // 2
            position += before
            for length in self._blocks((int(grid[0]), int(grid[1])), bool(supervised[place])):
                position += length
                pairs += length * position
            position += 1  # <eoi>
            pairs += position
            done = int(place) + 1
        rest = len(ids) - done
        pairs += rest * position + rest * (rest + 1) // 2
        targets = self.expand(ids, supervised, grids, np.array([len(ids)]))["shift_labels"]
        return Extent(position + rest, pairs, int((targets != IGNORE).sum()))

    def expand(
        self, ids: np.ndarray, supervised: np.ndarray, grids: np.ndarray, lengths: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Compact documents, one after the other, to (L,) int64 `input_ids`, `document_ids` and `shift_labels`.

        Text targets stand one to the left. At `<boi>` and the slots of a supervised image the label is a marker; the
        token before a supervised `<boi>` predicts it; `<eoi>` and another document's first token are no targets.

        Args:
            ids, supervised: (C,) of all documents.
            grids: (images, 2).
            lengths: (documents,) compact ids of each.
        """
        special = self.special
        places = np.flatnonzero(ids == special.image)
        slots = np.array(
            [
                self.num_slots((int(grid[0]), int(grid[1])), bool(flag))
                for grid, flag in zip(grids, supervised[places])
            ],
            dtype=np.int64,
        )
        repeats = np.ones(len(ids), dtype=np.int64)
        repeats[places] = slots + 2
        ends = repeats.cumsum()
        boi, eoi = ends[places] - slots - 2, ends[places] - 1
        document_ids = np.repeat(np.repeat(np.arange(len(lengths)), lengths), repeats)
        input_ids = np.repeat(ids.astype(np.int64), repeats)
        input_ids[boi], input_ids[eoi] = special.boi, special.eoi
        known = np.repeat(supervised, repeats)

        labels = np.full(len(input_ids), IGNORE, dtype=np.int64)
        predicts_next = known[1:] & (document_ids[1:] == document_ids[:-1])
        labels[:-1][predicts_next] = input_ids[1:][predicts_next]
        in_image = np.zeros(len(input_ids) + 1, dtype=np.int8)
        in_image[boi], in_image[eoi] = 1, -1
        in_image = in_image[:-1].cumsum(dtype=np.int8).astype(bool)
        labels[in_image] = np.where(known[in_image], input_ids[in_image], IGNORE)
        return {"input_ids": input_ids, "document_ids": document_ids, "shift_labels": labels}
