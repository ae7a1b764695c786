"""What a call that draws is asked with: prompts, null prompts, and their images."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers.utils import logging

from .configuration_nextflow import NextFlowConfig
from .layout import (
    IMAGE,
    MARKS,
    ImageSpan,
    check_integers,
    check_range,
    check_text,
    final_grids,
    find_images,
    joined,
    marks_of,
)
from .scales import Grid

if TYPE_CHECKING:
    from .modeling_nextflow import NextFlowForConditionalGeneration

logger = logging.get_logger(__name__)

Picture = tuple[Grid, torch.Tensor]
"""A final grid and its (codes,) codes."""


@dataclass(frozen=True)
class Prompts:
    """A batch of prompts. Padding may stand anywhere.

    Attributes:
        input_ids, attention_mask: (B, L) prompts; without a mask, the padding around a prompt is left out.
        negative_input_ids, negative_attention_mask: (B, L') their null prompts.
        pixel_values, image_codes, image_grid_hw: the prompts' images, as in the model's forward.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None = None
    negative_input_ids: torch.Tensor | None = None
    negative_attention_mask: torch.Tensor | None = None
    pixel_values: torch.Tensor | None = None
    image_codes: torch.Tensor | None = None
    image_grid_hw: torch.Tensor | None = None

    def checked(self, config: NextFlowConfig, pad_token_id: int | None) -> "Prompts":
        """With masks; raises a `ValueError` for anything but (B, L) ids of text rows that leave each row a token."""
        found = {}
        for prefix in ("", "negative_"):
            ids, mask = (getattr(self, prefix + name) for name in ("input_ids", "attention_mask"))
            if ids is not None:
                check_prompt(ids, mask, config.text_vocab_size, prefix + "input_ids")
                found[prefix + "attention_mask"] = without_padding(ids, pad_token_id, config) if mask is None else mask
        return replace(self, **found)

    def guided(self, config: NextFlowConfig) -> "Prompts":
        """With null prompts that hold the images of their prompts; see [`null_prompt`] where none came."""
        prompts = self
        if self.negative_input_ids is None:
            logger.warning_once(
                "guidance without negative_input_ids: the null prompts are made of the prompts' ids; those of the "
                "processor's `apply_chat_template(..., generation_mode=...)` are exact"
            )
            nulls = [null_prompt(ids, config) for ids in self.rows()]
            ids, mask = padded(nulls, config.eoi_token_id, self.input_ids.device)
            prompts = replace(self, negative_input_ids=ids, negative_attention_mask=mask)
        if len(prompts.negative_input_ids) != len(self.input_ids):
            rows = len(self.input_ids), len(prompts.negative_input_ids)
            raise ValueError("negative_input_ids must have {} rows, got {}".format(*rows))
        images, of_nulls = (
            [len(images_of(ids, config)) for ids in prompts.rows(prefix)] for prefix in ("", "negative_")
        )
        if images != of_nulls:
            raise ValueError(
                f"null prompts must hold the images of their prompts, got {of_nulls} images for {images}; {MARKS}"
            )
        return prompts

    def rows(self, prefix: str = "") -> list[list[int]]:
        """The ids without padding, of the prompts or (`"negative_"`) of the null prompts."""
        ids, masks = getattr(self, prefix + "input_ids"), getattr(self, prefix + "attention_mask")
        return [row[mask].tolist() for row, mask in zip(ids, masks.bool())]

    def contexts(self, config: NextFlowConfig, num_roles: int) -> tuple[list[list[int]], "Prompts"]:
        """The ids of all rows: of the prompts, of the null prompts, and of those without images; and the prompts with
        the null prompts that were needed."""
        if num_roles == 1:
            return self.rows(), self
        prompts = self.guided(config)
        nulls = prompts.rows("negative_")
        bare = [[t for span in texts_of(ids, config) for t in ids[span]] for ids in nulls] if num_roles == 3 else []
        return [*self.rows(), *nulls, *bare], prompts

    def pictures(self, model: "NextFlowForConditionalGeneration") -> list[list[Picture]]:
        """Each prompt's finished images."""
        config = model.config
        rows = [ids[:-1] if ids[-1] == config.boi_token_id else ids for ids in self.rows()]
        rows = [[*ids, config.eoi_token_id] for ids in rows]  # so that none is empty
        grids = [] if self.image_grid_hw is None else final_grids(self.image_grid_hw)
        held = sum(len(images_of(ids, config)) for ids in rows)
        if held != len(grids):
            if self.image_grid_hw is None:
                check_text(self.pixel_values, self.image_codes)
            raise ValueError(f"the prompts hold {held} finished images, image_grid_hw has {len(grids)}; {MARKS}")
        ids, _ = padded(rows, config.eoi_token_id, self.input_ids.device)
        images = find_images(config, ids, grids)
        check_last_scale(images, config)
        flat_codes = model.model.image_codes_of(images, self.pixel_values, self.image_codes, ids.device)
        pictures: list[list[Picture]] = [[] for _ in rows]
        for image, codes in zip(images, flat_codes.split([image.num_codes for image in images])):
            pictures[image.row].append((image.schedule.final_grid, codes))
        return pictures


def check_last_scale(images: Sequence[ImageSpan], config: NextFlowConfig) -> None:
    """Raise a `ValueError` for a prompt's images that were made for a model of the other `condition_last_scale`."""
    expected = config.condition_last_scale
    if any(image.has_last_scale != expected for image in images if not image.is_open):
        raise ValueError(
            f"condition_last_scale must be the model's, {expected}: the prompts' images are of a processor with "
            f"{not expected}, which the model was not trained to read"
        )


def flat_images(rows: Sequence[Sequence[Picture]], device: torch.device) -> dict[str, torch.Tensor]:
    """Each row's images as the flat tensors of the model's inputs."""
    images = [image for row in rows for image in row]
    grids = torch.tensor([grid for grid, _ in images], dtype=torch.long, device=device).reshape(-1, 2)
    return {"image_grid_hw": grids, "image_codes": joined([codes for _, codes in images], device)}


def check_prompt(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, limit: int, name: str = "input_ids"
) -> None:
    """Raise a `ValueError` for anything but (B, L) ids in [0, limit), and a mask that leaves each row a token."""
    check_integers(name, input_ids, 2)
    if input_ids.numel() == 0:
        raise ValueError(f"{name} must hold at least one prompt of one token, got {tuple(input_ids.shape)}")
    check_range(name, input_ids, limit, "; codes go into image_codes")
    if attention_mask is None:
        return
    if not isinstance(attention_mask, torch.Tensor):
        raise ValueError(f"the attention mask of {name} must be a tensor, got {type(attention_mask).__name__}")
    if attention_mask.shape != input_ids.shape:
        shape, expected = tuple(attention_mask.shape), tuple(input_ids.shape)
        raise ValueError(f"the attention mask of {name} must have their shape {expected}, got {shape}")
    if not attention_mask.bool().any(dim=1).all():
        raise ValueError(f"the attention mask must leave every row of {name} a token")


def without_padding(input_ids: torch.Tensor, pad_token_id: int | None, config: NextFlowConfig) -> torch.Tensor:
    """(B, L) int64, 0 at the padding before each row and after it; what ends a text may end a prompt."""
    if pad_token_id is None:
        return torch.ones_like(input_ids)
    is_text = (input_ids != pad_token_id).long()
    mask = is_text.cummax(dim=1).values
    if pad_token_id not in end_ids(config):
        mask = mask * is_text.flip(1).cummax(dim=1).values.flip(1)
    return mask.masked_fill(mask.sum(dim=1, keepdim=True) == 0, 1)  # nothing but padding is text


def end_ids(config: NextFlowConfig) -> list[int]:
    """Ids that end a text."""
    ends = config.text_config.eos_token_id
    return ends if isinstance(ends, list) else [ends]


def padded(rows: Sequence[list[int]], value: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(R, L) ids, padded on the left, and their mask."""
    tensors = [torch.tensor(row, dtype=torch.long, device=device) for row in rows]
    left = {"batch_first": True, "padding_side": "left"}
    ids = pad_sequence(tensors, padding_value=value, **left)
    return ids, pad_sequence([torch.ones_like(row) for row in tensors], **left)


def images_of(ids: list[int], config: NextFlowConfig) -> list[slice]:
    """Where finished images stand, from `<boi>` to `<eoi>`; a last `<boi>` is still open."""
    marks = marks_of(config)
    row = bytes(marks.get(token, 0) for token in ids)
    return [slice(*match.span()) for match in IMAGE.finditer(row) if match.start() + 1 < len(ids)]


def texts_of(ids: list[int], config: NextFlowConfig) -> list[slice]:
    """What is not an image."""
    edges = [0, *(edge for span in images_of(ids, config) for edge in (span.start, span.stop)), len(ids)]
    return [slice(*pair) for pair in zip(edges[::2], edges[1::2])]


def null_prompt(ids: list[int], config: NextFlowConfig) -> list[int]:
    """A null prompt made of a prompt's ids alone: its images, between what opens the first message and what ends it
    and opens the answer. For a chat of one message in ChatML this is the template without the user's text, as the
    processor makes it; of other prompts hardly more than the images is left."""
    ends, spans = end_ids(config), images_of(ids, config)
    last = max((place for place, token in enumerate(ids) if token in ends), default=len(ids))
    tail = ids[last:]
    # the answer's header begins as the first message's does, and is as long
    answer = [token for token in tail if token not in marks_of(config)]
    length = len(answer) - answer.index(ids[0]) if ids[0] in answer and len(ids) > 1 else 0
    head = ids[: min([length, last, *(span.start for span in spans)])]
    images = [token for span in spans if span.start < last for token in ids[span]]
    return [*head, *images, *tail]
