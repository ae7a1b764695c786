"""Where text, `<boi>`, scale blocks and `<eoi>` stand in a sequence, and what follows from it.

An image in `input_ids` is `<boi>`, one `<image>` per visual input position, `<eoi>`. Its final grid, in
`image_grid_hw`, names its scale schedule of K scales. `<boi>` predicts scale 1; the block of scale k = 2..K has
h_k * w_k positions and predicts scale k's codes position by position. An image that is only read may carry one
further block, K + 1, with its last scale's codes. At the end of a row an image may be cut after any block.

- The counter s (NextFlow fig. 5): text +1; `<boi>` p, the block of scale k p + k - 1, `<eoi>` after the last block.
- Position rows are (s, i, j): text (t, t, t); a block's cell C / sqrt(h w) * (row + 0.5, column + 0.5) (eq. 1).
- Blocks are bidirectional inside; text, `<boi>` and `<eoi>` are causal.

Shape suffixes: B batch, L sequence, N images.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from .scales import Grid, ScaleSchedule, ScheduleTable


@dataclass(frozen=True)
class ImageSpan:
    """One image of a sequence.

    Attributes:
        row, start: batch row and index of `<boi>`.
        schedule: the image's scales.
        num_inputs: `<image>` slots after `<boi>`.
        num_scales: scales that the outputs predict: all, or the first ones of an image that is cut.
        is_open: whether the row ends in `<boi>` and the image is still to be generated.
    """

    row: int
    start: int
    schedule: ScaleSchedule
    num_inputs: int
    num_scales: int
    is_open: bool = False

    @property
    def slots(self) -> slice:
        """`<boi>` and the `<image>` slots. Without the last-scale block, their outputs predict the codes in order."""
        return slice(self.start, self.start + 1 + self.num_inputs)

    @property
    def num_codes(self) -> int:
        """Codes of its `num_scales` scales."""
        return self.schedule.prefix(self.num_scales).num_codes

    @property
    def has_last_scale(self) -> bool:
        """Whether the image carries the further block with its last scale's codes."""
        return self.num_inputs == num_image_slots(self.schedule, last_scale=True)


@dataclass(frozen=True)
class SequenceLayout:
    """Everything about a batch of sequences that follows from ids and grids.

    Attributes:
        position_ids: (3, B, L) float32, rows (s, i, j).
        scale_ids: (B, L) int64; 0 for text and `<eoi>`, 1 for `<boi>`, k for the block of scale k.
        num_scales: (B, L) int64; the image's K where `scale_ids` > 0, else 0.
        block_ids: (B, L) int64; -1 where attention is causal, else one id per block, unique in the batch.
        images: in row-major order of `<boi>`.
    """

    position_ids: torch.Tensor
    scale_ids: torch.Tensor
    num_scales: torch.Tensor
    block_ids: torch.Tensor
    images: list[ImageSpan]

    @property
    def closed_images(self) -> list[ImageSpan]:
        """The images whose codes are known."""
        return [image for image in self.images if not image.is_open]


@lru_cache(maxsize=512)
def _block_template(grids: tuple, last_scale: bool, finest_edge: float) -> tuple[torch.Tensor, ...]:
    """Of the positions after `<boi>`: scale ids and (i, j)."""
    scales = list(enumerate(grids, start=1))[1:]
    if last_scale:
        scales.append((len(grids) + 1, grids[-1]))
    scale_ids, coordinates = [torch.empty(0, dtype=torch.long)], [torch.empty(2, 0)]
    for scale, (h, w) in scales:
        scale_ids.append(torch.full((h * w,), scale))
        coordinates.append(scale_coordinates((h, w), finest_edge))
    return torch.cat(scale_ids), torch.cat(coordinates, dim=1)


def scale_coordinates(grid: tuple[int, int], finest_edge: float) -> torch.Tensor:
    """(2, h*w) float32 coordinates (i, j) of a grid's cells, row-major (NextFlow eq. 1)."""
    h, w = grid
    step = finest_edge / (h * w) ** 0.5
    rows = (torch.arange(h, dtype=torch.float64) + 0.5) * step
    columns = (torch.arange(w, dtype=torch.float64) + 0.5) * step
    return torch.stack([rows.repeat_interleave(w), columns.repeat(h)]).float()


def num_image_slots(schedule: ScaleSchedule, last_scale: bool = False) -> int:
    """`<image>` placeholders of one image: sum of h_k * w_k for k = 2..K, plus the last grid again if `last_scale`."""
    return schedule.num_codes - 1 + (schedule.lengths[-1] if last_scale else 0)


def check_integers(name: str, tensor: torch.Tensor, *ndims: int) -> None:
    """Raise a `ValueError` for anything but a tensor of integers of one of these numbers of dimensions."""
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.ndim not in ndims or tensor.dtype not in (torch.int64, torch.int32):
        expected = " or ".join(map(str, ndims))
        raise ValueError(
            f"{name} must hold int64 in {expected} dimensions, got {tensor.dtype} of the shape {tuple(tensor.shape)}"
        )


def final_grids(image_grid_hw: torch.Tensor | Sequence) -> list[Grid]:
    """The pairs of an (N, 2) `image_grid_hw`; raises `ValueError` for anything else."""
    rows = image_grid_hw.tolist() if isinstance(image_grid_hw, torch.Tensor) else image_grid_hw
    try:
        return [(operator.index(height), operator.index(width)) for height, width in rows]
    except (TypeError, ValueError):
        raise ValueError(
            f"image_grid_hw must hold two integers, the final grid's height and width, for each image, got {rows}"
        ) from None


def build_layout(
    input_ids: torch.Tensor,
    image_grid_hw: torch.Tensor | Sequence | None,
    schedules: ScheduleTable,
    boi_token_id: int,
    eoi_token_id: int,
    image_token_id: int,
    finest_edge: float,
    valid: torch.Tensor | None = None,
    document_ids: torch.Tensor | None = None,
) -> SequenceLayout:
    """Lay out a batch.

    Args:
        input_ids: (B, L).
        image_grid_hw: (N, 2), the final grid of every image in row-major order of `<boi>`; `None` means that every
            token is text. A row may end in `<boi>`: that image is still to be generated.
        valid: (B, L) bool, False at padding.
        document_ids: (B, L), documents packed in one row, -1 at padding; the counter restarts with each.

    Raises:
        ValueError: if images and grids do not match in number, or an image's placeholders do not fit its schedule.
    """
    if input_ids.ndim != 2 or (valid is not None and valid.shape != input_ids.shape):
        shapes = " and ".join(str(tuple(x.shape)) for x in (input_ids, valid) if x is not None)
        raise ValueError(f"input_ids, and attention_mask beside them, must have the shape (B, L), got {shapes}")
    batch, length = input_ids.shape
    step_BL = torch.ones(batch, length, dtype=torch.long)  # how far the counter moves on arriving here
    scale_BL = torch.zeros(batch, length, dtype=torch.long)
    scales_BL = torch.zeros(batch, length, dtype=torch.long)
    block_BL = torch.full((batch, length), -1)
    cells_2BL = torch.zeros(2, batch, length)
    images, ids = [], input_ids.detach().cpu()

    if image_grid_hw is not None:
        starts = (ids == boi_token_id).nonzero().tolist()
        grids = final_grids(image_grid_hw)
        if len(starts) != len(grids):
            raise ValueError(f"input_ids hold {len(starts)} images (<boi> tokens), image_grid_hw has {len(grids)}")
        placeholders = ids == image_token_id
        for (row, start), grid in zip(starts, grids):
            image = _read_span(ids, placeholders, row, start, schedules.by_grid(grid), eoi_token_id)
            images.append(image)
            slots = slice(start + 1, start + 1 + image.num_inputs)
            scale_BL[row, start] = 1
            scales_BL[row, start : slots.stop] = len(image.schedule)
            if image.num_inputs:
                scale_ids, cells = _block_template(image.schedule.grids, image.has_last_scale, finest_edge)
                scale_ids, cells = scale_ids[: image.num_inputs], cells[:, : image.num_inputs]
                scale_BL[row, slots] = scale_ids
                step_BL[row, slots] = torch.diff(scale_ids, prepend=scale_ids.new_ones(1))
                block_BL[row, slots] = scale_ids + len(images) * (schedules.max_scales + 2)
                cells_2BL[:, row, slots] = cells
        if int(placeholders.sum()) != sum(image.num_inputs for image in images):
            raise ValueError("input_ids hold <image> tokens that do not follow a <boi>")

    starts_BL = torch.zeros(batch, length, dtype=torch.bool)  # where the counter is at 0
    starts_BL[:, :1] = True
    if document_ids is not None:
        document_ids = document_ids.cpu()
        valid = document_ids >= 0
        starts_BL[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    elif valid is not None:
        valid = valid.cpu().bool()
        step_BL = step_BL * valid
        starts_BL[:, 1:] = (valid.cumsum(1) == 1)[:, 1:] & valid[:, 1:]
    total_BL = step_BL.cumsum(1)
    base_BL = torch.where(starts_BL, total_BL, 0).cummax(1).values
    counter_BL = (total_BL - base_BL).float()
    if valid is not None:
        counter_BL = counter_BL.masked_fill(~valid, 0.0)
    in_block_BL = block_BL >= 0
    rows = [counter_BL, *(torch.where(in_block_BL, cells, counter_BL) for cells in cells_2BL)]
    to = input_ids.device
    return SequenceLayout(torch.stack(rows).to(to), scale_BL.to(to), scales_BL.to(to), block_BL.to(to), images)


def _read_span(ids, placeholders, row: int, start: int, schedule: ScaleSchedule, eoi_token_id: int) -> ImageSpan:
    after = placeholders[row, start + 1 :]
    num_inputs = int(after.long().cumprod(0).sum())
    end = start + 1 + num_inputs
    at_end = end == ids.shape[1]
    if at_end and num_inputs == 0:
        return ImageSpan(row, start, schedule, num_inputs, num_scales=1, is_open=True)
    if at_end and num_inputs + 1 in schedule.offsets:
        return ImageSpan(row, start, schedule, num_inputs, num_scales=schedule.offsets.index(num_inputs + 1))
    allowed = (num_image_slots(schedule), num_image_slots(schedule, last_scale=True))
    if num_inputs not in allowed:
        raise ValueError(
            f"an image of the final grid {schedule.final_grid} takes {allowed[0]} <image> tokens "
            f"({allowed[1]} with its last scale), got {num_inputs} in row {row}"
        )
    if not at_end and int(ids[row, end]) != eoi_token_id:
        raise ValueError(f"the <image> tokens of row {row} must be followed by <eoi>, got id {int(ids[row, end])}")
    return ImageSpan(row, start, schedule, num_inputs, len(schedule))


def text_positions(inputs: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """(B, L) ids or (B, L, D) embeddings of text alone -> (3, B, L) float32 positions, as [`build_layout`] gives them.

    Args:
        valid: (B, L), 0 at padding.
    """
    shape = inputs.shape[:2]
    if inputs.ndim < 2 or (valid is not None and valid.shape != shape):
        shapes = " and ".join(str(tuple(x.shape)) for x in (inputs, valid) if x is not None)
        raise ValueError(f"input_ids, and attention_mask beside them, must have the shape (B, L), got {shapes}")
    valid = torch.ones(shape, dtype=torch.bool, device=inputs.device) if valid is None else valid.bool()
    return (valid.cumsum(1) - 1).masked_fill(~valid, 0).float().expand(3, -1, -1)
