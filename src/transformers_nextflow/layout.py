"""Where text, `<boi>`, scale blocks and `<eoi>` stand in a sequence, and all that follows from it, as tensors.

An image in `input_ids` is `<boi>`, one `<image>` per visual input position, `<eoi>`. Its final grid, in
`image_grid_hw`, names its scale schedule of K scales. `<boi>` predicts scale 1; the block of scale k = 2..K has
h_k * w_k positions and predicts scale k's codes position by position. An image that is only read may carry one
further block, K + 1, with its last scale's codes. At the end of a row an image may be cut after any block.

- The counter s (NextFlow fig. 5): text +1; `<boi>` p, the block of scale k p + k - 1, `<eoi>` after the last block.
- Position rows are (s, i, j): text (t, t, t); a block's cell C / sqrt(h w) * (row + 0.5, column + 0.5) (eq. 1).
- Blocks are bidirectional inside; text, `<boi>` and `<eoi>` are causal.
- A block's inputs are weighted sums of the codes before it (`features.py`).

Shape suffixes: B batch, L sequence, N supervised positions.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from itertools import accumulate

import torch
import torch.nn.functional as F
from transformers.cache_utils import Cache

from .configuration_nextflow import NextFlowConfig
from .features import Taps, join, scale_taps
from .losses import IGNORE
from .sampling import plain
from .scales import Grid, ScaleSchedule, pair_of

MARKS = (
    "if a user's text holds the marks of images, `apply_chat_template(..., sanitize_control_tokens=True)` makes them "
    "plain text"
)


IMAGE = re.compile(b"b(i*)(e?)")
"""A picture in a row of tokens, each one byte, see [`marks_of`]."""


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
    def outputs(self) -> slice:
        """`<boi>` and the `<image>` slots. Without the last-scale block, their outputs predict the codes in order."""
        return slice(self.start, self.start + 1 + self.num_inputs)

    @property
    def num_codes(self) -> int:
        """Codes that are known: of its `num_scales` scales, none of an open image."""
        return 0 if self.is_open else self.schedule.ends[self.num_scales - 1]

    @property
    def num_coarse_codes(self) -> int:
        """Codes of all but the last of its scales, which the blocks read."""
        return self.schedule.offsets[self.num_scales - 1]

    @property
    def has_last_scale(self) -> bool:
        """Whether the image carries the further block with its last scale's codes."""
        return self.num_inputs == num_image_slots(self.schedule, last_scale=True)


@dataclass(frozen=True, eq=False)
class SequenceLayout:
    """Everything about a batch of sequences that follows from ids, grids and labels; see [`build_layout`].

    Places of tokens count through the rows of (B, L), those of codes through the batch's flat `image_codes`.

    Attributes:
        position_ids: (3, B, L) float32, rows (s, i, j).
        scale_ids: (B, L) int64; 0 for text and `<eoi>`, 1 for `<boi>`, k for the block of scale k.
        num_scales: (B, L) int64; the image's K where `scale_ids` > 0, else 0.
        block_ids: (B, L) int64; -1 where attention is causal, else one id per block, unique in the batch.
        image_places: (I,) int64, tokens with `scale_ids` > 0.
        slot_places: (M,) int64, `<image>` tokens.
        taps: of every slot, from the codes.
        coarse_places: (C,) int64, which codes `image_input_codes` replace: each image's, without its last scale.
        supervised: (N,) int64, tokens whose outputs have a target; absent where there are no labels, as are the next.
        targets: (N,) int64 ids; at outputs that predict codes any value.
        target_codes: (N,) int64, the code that the output predicts, -1 for text.
        weights: (N,) float32 of the targets: 1 for text, and as eq. 2 says.
    """

    position_ids: torch.Tensor
    scale_ids: torch.Tensor
    num_scales: torch.Tensor
    block_ids: torch.Tensor
    image_places: torch.Tensor
    slot_places: torch.Tensor
    taps: Taps
    coarse_places: torch.Tensor
    supervised: torch.Tensor | None = None
    targets: torch.Tensor | None = None
    target_codes: torch.Tensor | None = None
    weights: torch.Tensor | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "SequenceLayout":
        """Its tensors on a device; their dtypes stay, whatever the model's."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "SequenceLayout":
        """As `DataLoader` asks for it."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, change) -> "SequenceLayout":
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        changed = {name: change(value) for name, value in values.items() if isinstance(value, torch.Tensor)}
        return replace(self, taps=Taps(*map(change, self.taps)), **changed)


def scale_coordinates(grid: tuple[int, int], finest_edge: float) -> torch.Tensor:
    """(2, h*w) float32 coordinates (i, j) of a grid's cells, row-major (NextFlow eq. 1)."""
    h, w = grid
    cells = (torch.arange(n, dtype=torch.float64, device="cpu") + 0.5 for n in grid)
    rows, columns = (each * (finest_edge / (h * w) ** 0.5) for each in cells)
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


def check_range(name: str, numbers: torch.Tensor, limit: int, hint: str = "") -> None:
    """Raise a `ValueError` for codes, or ids, outside of [0, limit)."""
    if numbers.numel() and not (0 <= numbers.min() and numbers.max() < limit):
        low, high = int(numbers.min()), int(numbers.max())
        raise ValueError(f"{name} must lie in [0, {limit}), got {low} to {high}{hint}")


def check_shape(inputs: torch.Tensor, **beside: torch.Tensor | None) -> None:
    """Raise a `ValueError` for anything but (B, L) ids or (B, L, D) embeddings, and (B, L) of all beside them."""
    for name, each in beside.items():
        if inputs.ndim < 2 or (each is not None and each.shape != inputs.shape[:2]):
            shapes = " and ".join(str(tuple(x.shape)) for x in (inputs, each) if x is not None)
            raise ValueError(f"input_ids, and {name} beside them, must have the shape (B, L), got {shapes}")


def check_rows(name: str, got: int, expected: int) -> None:
    """Raise a `ValueError` where a flat tensor does not fit the images."""
    if got != expected:
        raise ValueError(f"{name} must hold {expected} rows for the images in input_ids, got {got}")


def check_codes(config: NextFlowConfig, name: str, codes: torch.Tensor, length: int) -> None:
    """Raise a `ValueError` for anything but so many flat codes."""
    check_integers(name, codes, 1)
    check_rows(name, len(codes), length)
    check_range(name, codes, config.vq_config.codebook_size)


def check_text(pixel_values: torch.Tensor | None, image_codes: torch.Tensor | None) -> None:
    """Raise a `ValueError` for pictures that came without their grids."""
    if pixel_values is not None or image_codes is not None:
        name = "image_codes" if pixel_values is None else "pixel_values"
        raise ValueError(f"{name} came without image_grid_hw, the final grid of each image")


def check_cache_of_text(cache: Cache | None) -> None:
    """Raise a `ValueError` where a cache has read images, behind which positions are not its length."""
    if not getattr(cache, "holds_images", False):
        return
    cache.holds_images = cache.get_seq_length() > 0  # or it was reset
    if cache.holds_images:
        raise ValueError(
            "past_key_values hold images, behind which positions do not follow from their length: give position_ids, "
            "the last ones of the whole sequence's layout, see `build_layout`; to `generate`, the whole chat with its "
            "images"
        )


def final_grids(image_grid_hw: torch.Tensor | Sequence) -> list[Grid]:
    """The pairs of an (N, 2) `image_grid_hw`; raises `ValueError` for anything else."""
    rows = plain(image_grid_hw)
    try:
        return [pair_of(row) for row in rows]
    except (TypeError, ValueError):
        raise ValueError(
            f"image_grid_hw must hold two integers, the final grid's height and width, for each image, got {rows}"
        ) from None


def each_by_grid(
    grids: Sequence[Grid], run: Callable[[Grid, list[int]], Iterable[torch.Tensor]]
) -> list[torch.Tensor]:
    """Of each image, what `run` gives of the images of one grid, by the grid and their indices."""
    found: dict[int, torch.Tensor] = {}
    for grid in dict.fromkeys(grids):
        members = [index for index, other in enumerate(grids) if other == grid]
        found |= dict(zip(members, run(grid, members)))
    return [found[index] for index in range(len(grids))]


def joined(codes: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """The flat codes of images, of none too."""
    return torch.cat([torch.empty(0, dtype=torch.long, device=device), *codes])


def find_images(
    config: NextFlowConfig, input_ids: torch.Tensor, image_grid_hw: torch.Tensor | Sequence | None
) -> list[ImageSpan]:
    """The images of (B, L) ids, in row-major order of `<boi>`; without grids every token is text.

    Raises:
        ValueError: if images and grids do not match in number, or an image's placeholders do not fit its schedule.
    """
    if image_grid_hw is None:
        return []
    check_integers("input_ids", input_ids, 2)
    marks_BL = torch.zeros_like(input_ids, dtype=torch.uint8)
    for token_id, mark in marks_of(config).items():
        marks_BL.masked_fill_(input_ids == token_id, mark)
    rows, grids = list(map(bytes, marks_BL.tolist())), final_grids(image_grid_hw)
    found = [(row, match) for row, marks in enumerate(rows) for match in IMAGE.finditer(marks)]
    if len(found) != len(grids):
        counts = f"input_ids hold {len(found)} images (<boi> tokens), image_grid_hw has {len(grids)}"
        raise ValueError(f"{counts}; {MARKS}")
    schedules = map(config.vq_config.schedule_table().by_grid, grids)
    images = [_span(row, match, schedule, input_ids) for (row, match), schedule in zip(found, schedules)]
    if sum(marks.count(b"i") for marks in rows) != sum(image.num_inputs for image in images):
        raise ValueError("input_ids hold <image> tokens that do not follow a <boi>")
    return images


def marks_of(config: NextFlowConfig) -> dict[int, int]:
    """The bytes that stand for `<boi>`, `<image>` and `<eoi>` in [`IMAGE`], by their ids; for text it is 0."""
    return dict(zip((config.boi_token_id, config.image_token_id, config.eoi_token_id), b"bie"))


def _span(row: int, match: re.Match[bytes], schedule: ScaleSchedule, input_ids: torch.Tensor) -> ImageSpan:
    start, end, num_inputs = match.start(), match.end(1), len(match[1])
    at_end = end == input_ids.shape[1]
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
    if not at_end and not match[2]:
        found = int(input_ids[row, end])
        raise ValueError(f"the <image> tokens of row {row} must be followed by <eoi>, got id {found}")
    return ImageSpan(row, start, schedule, num_inputs, len(schedule))


@lru_cache(maxsize=512)
def _blocks(
    schedule: ScaleSchedule, num_scales: int, last_scale: bool, finest_edge: float, accumulate: bool
) -> tuple[torch.Tensor, torch.Tensor, Taps]:
    """Of the positions after `<boi>`: scale ids, (i, j), and taps from the picture's codes."""
    # (scale, the scales its codes come from and whose grid it has, whether features accumulate), 0-based
    blocks = [(scale, scale - 1, scale, accumulate) for scale in range(1, num_scales)]
    if last_scale:
        blocks.append((num_scales, num_scales - 1, num_scales - 1, False))
    scale_ids, cells, taps = [torch.empty(0, dtype=torch.long, device="cpu")], [torch.empty(2, 0, device="cpu")], []
    for scale, source, target, accumulates in blocks:
        scale_ids.append(torch.full((schedule.lengths[target],), scale + 1, device="cpu"))
        cells.append(scale_coordinates(schedule[target], finest_edge))
        taps.append(scale_taps(schedule, source, target, accumulates))
    return torch.cat(scale_ids), torch.cat(cells, dim=1), join(taps, [0] * len(taps))


def build_layout(
    config: NextFlowConfig,
    input_ids: torch.Tensor,
    image_grid_hw: torch.Tensor | Sequence | None = None,
    attention_mask: torch.Tensor | None = None,
    document_ids: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    shift_labels: torch.Tensor | None = None,
    image_codes: torch.Tensor | None = None,
    image_input_codes: torch.Tensor | None = None,
) -> SequenceLayout:
    """Lay out a batch: what the model's forward reads beside ids and codes.

    A loader's workers may do it, with `forward(..., layout=)` then free of it; where the caller does not, forward
    calls this first.

    Args:
        input_ids: (B, L).
        image_grid_hw: (N, 2), the final grid of every image in row-major order of `<boi>`; `None` means that every
            token is text. A row may end in `<boi>`: that image is still to be generated.
        attention_mask: (B, L), 0 at padding.
        document_ids: (B, L), documents packed in one row, -1 at padding; the counter restarts with each.
        labels, shift_labels: (B, L), see [`NextFlowForConditionalGeneration`].
        image_codes, image_input_codes: flat codes, to be checked.

    Raises:
        ValueError: if ids, grids and codes do not fit each other, or an image is supervised in part.
    """
    check_integers("input_ids", input_ids, 2)
    beside = {"document_ids": document_ids, "labels": labels, "shift_labels": shift_labels}
    check_shape(input_ids, attention_mask=attention_mask, **beside)
    images = find_images(config, input_ids, image_grid_hw)
    if image_codes is not None:
        check_codes(config, "image_codes", image_codes, sum(image.num_codes for image in images))
    if image_input_codes is not None:
        length = sum(image.num_coarse_codes for image in images)
        check_codes(config, "image_input_codes", image_input_codes, length)

    shape = input_ids.shape
    scale_BL, scales_BL = torch.zeros(2, *shape, dtype=torch.long, device="cpu")
    block_BL = torch.full(shape, -1, device="cpu")
    cells_2BL = torch.zeros(2, *shape, dtype=torch.float32, device="cpu")
    table, accumulates = config.vq_config.schedule_table(), config.feature_mode == "accumulated"
    code_starts = [0, *accumulate(image.num_codes for image in images)]
    taps, coarse = [], [torch.empty(0, dtype=torch.long, device="cpu")]
    for number, (image, first) in enumerate(zip(images, code_starts)):
        row, slots = image.row, slice(image.start + 1, image.outputs.stop)
        scale_ids, cells, own_taps = _blocks(
            image.schedule, image.num_scales, image.has_last_scale, config.finest_edge, accumulates
        )
        scale_BL[row, image.start] = 1
        scale_BL[row, slots] = scale_ids
        scales_BL[row, image.outputs] = len(image.schedule)
        block_BL[row, slots] = scale_ids + number * (table.max_scales + 2)
        cells_2BL[:, row, slots] = cells
        taps.append(own_taps)
        coarse.append(torch.arange(first, first + image.num_coarse_codes, device="cpu"))

    valid_BL = block_BL.new_ones(shape) if attention_mask is None else attention_mask.cpu()
    valid_BL = valid_BL.bool()
    if document_ids is not None:
        document_ids = document_ids.cpu()
        valid_BL = valid_BL & (document_ids >= 0)
    in_block_BL = block_BL >= 0
    # how far the counter moves on arriving here, and where it is then at 0
    step_BL = torch.where(in_block_BL, F.pad(scale_BL.diff(dim=1), (1, 0)), 1) * valid_BL
    total_BL, base_BL = step_BL.cumsum(1), torch.ones_like(step_BL)
    if document_ids is not None:
        starts_BL = F.pad(document_ids.diff(dim=1) != 0, (1, 0), value=True)
        base_BL = torch.where(starts_BL, total_BL - step_BL + 1, 0).cummax(1).values  # padding may come first
    counter_BL = (total_BL - base_BL).masked_fill(~valid_BL, 0).float()
    targets = {}
    if labels is not None and shift_labels is None:
        shift_labels = shift_labels_of(labels.cpu(), images, config.boi_token_id, valid_BL, document_ids)
    if shift_labels is not None:
        targets = _targets(shift_labels.cpu().long(), images, code_starts, config)
    layout = SequenceLayout(
        torch.stack([counter_BL, *torch.where(in_block_BL, cells_2BL, counter_BL)]),
        scale_BL,
        scales_BL,
        block_BL,
        image_places=scale_BL.flatten().nonzero().flatten(),
        slot_places=in_block_BL.flatten().nonzero().flatten(),
        taps=join(taps, code_starts),
        coarse_places=torch.cat(coarse),
        **targets,
    )
    return layout.to(input_ids.device)


def shift_labels_of(
    labels: torch.Tensor,
    images: Sequence[ImageSpan],
    boi_token_id: int,
    attention_mask: torch.Tensor | None = None,
    document_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """(B, L) labels the Hugging Face way -> (B, L) targets aligned with the outputs.

    Text targets move one to the left. At `<boi>` and `<image>` slots the value stays a marker (anything but -100:
    supervise), because scales do not shift; the token before a supervised `<boi>` predicts `<boi>`; `<eoi>` is never a
    target. Nothing is predicted across documents, nor from padding (where `attention_mask` is 0).
    """
    shifted_BL = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
    if document_ids is not None:
        crosses = document_ids != F.pad(document_ids[:, 1:], (0, 1), value=-1)
        shifted_BL = shifted_BL.masked_fill(crosses, IGNORE)
    for image in [image for image in images if not image.is_open]:
        shifted_BL[image.row, image.outputs] = labels[image.row, image.outputs]
        if image.start > 0 and shifted_BL[image.row, image.start - 1] != IGNORE:
            shifted_BL[image.row, image.start - 1] = boi_token_id
    return shifted_BL if attention_mask is None else shifted_BL.masked_fill(attention_mask == 0, IGNORE)


def _targets(
    shift_BL: torch.Tensor, images: Sequence[ImageSpan], code_starts: Sequence[int], config: NextFlowConfig
) -> dict[str, torch.Tensor]:
    """What a [`SequenceLayout`] says of targets.

    Args:
        code_starts: each image's first code among all.
    """
    codes_BL = torch.full_like(shift_BL, -1)
    weights_BL = torch.ones_like(shift_BL, dtype=torch.float32)
    for image, first in zip(images, code_starts):
        supervised = shift_BL[image.row, image.outputs] != IGNORE
        if image.is_open or not supervised.any():
            continue
        if not supervised.all():
            raise ValueError(
                f"an image is supervised whole or not at all: row {image.row}, <boi> at {image.start}, has "
                f"{int(supervised.sum())} of {len(supervised)} labels"
            )
        if image.has_last_scale:
            raise ValueError(
                f"an image that carries its last scale as input cannot be supervised: row {image.row}, "
                f"<boi> at {image.start}"
            )
        codes_BL[image.row, image.outputs] = torch.arange(first, first + image.num_codes, device="cpu")
        predicted = image.schedule.prefix(image.num_scales)
        weights, lengths = map(weights_BL.new_tensor, (predicted.weights(config.scale_loss_alpha), predicted.lengths))
        weights_BL[image.row, image.outputs] = weights.repeat_interleave(lengths.long())
    text = shift_BL[(shift_BL != IGNORE) & (codes_BL < 0)]
    if text.numel() and not 0 <= text.min() <= text.max() < config.text_vocab_size:
        raise ValueError(
            f"labels of text must be {IGNORE} or lie in [0, {config.text_vocab_size}), got {int(text.min())} to "
            f"{int(text.max())}"
        )
    supervised_N = (shift_BL != IGNORE).flatten().nonzero().flatten()
    tensors = {"targets": shift_BL, "target_codes": codes_BL, "weights": weights_BL}
    return {"supervised": supervised_N} | {name: each.flatten()[supervised_N] for name, each in tensors.items()}


def text_positions(inputs: torch.Tensor, valid: torch.Tensor, past: int = 0) -> torch.Tensor:
    """(B, L) ids or (B, L, D) embeddings of text alone -> (3, B, L) float32 positions, as [`build_layout`] gives them.

    Args:
        valid: (B, past + L), 0 at padding.
        past: positions that a cache holds already.
    """
    check_shape(inputs, attention_mask=valid[..., past:])
    valid = valid.bool()
    return (valid.cumsum(1) - 1).masked_fill(~valid, 0).float()[:, past:].expand(3, -1, -1)
