"""What a scale block reads of the codes before it (NextFlow sec. 2.2), as taps.

A position of the block is a weighted sum of a few codebook entries: its taps. They follow from the grids alone, so
that all pictures, grids and scales of a batch are one `embedding_bag`.

- Residual features: the entries of the scale before, bicubic from its grid to the block's.
- Accumulated features (VAR): the entries of all scales before, each bicubic to the final grid, summed, and
  area-resized to the block's.

Shape suffixes: N codes, l positions, T taps, C code channels.
"""

from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .quantizer import resize_features
from .scales import ScaleSchedule


class Taps(NamedTuple):
    """Weighted sums of rows.

    Attributes:
        places: (T,) int64, rows.
        weights: (T,) float32, of each.
        starts: (l,) int64, each sum's first tap.
    """

    places: torch.Tensor
    weights: torch.Tensor
    starts: torch.Tensor

    def __call__(self, rows_NC: torch.Tensor) -> torch.Tensor:
        """(N, C) -> (l, C), in the rows' dtype."""
        weights = self.weights.to(rows_NC.dtype)
        return F.embedding_bag(self.places, rows_NC, self.starts, mode="sum", per_sample_weights=weights)


def join(parts: list[Taps], row_offsets: list[int]) -> Taps:
    """Taps one after the other, the rows of each part beginning at its offset."""
    taps_before = accumulate((len(part.places) for part in parts), initial=0)
    moved = [
        Taps(part.places + offset, part.weights, part.starts + before)
        for part, offset, before in zip(parts, row_offsets, taps_before)
    ]
    nothing = Taps(*(torch.empty(0, dtype=dtype, device="cpu") for dtype in (torch.long, torch.float32, torch.long)))
    return Taps(*map(torch.cat, zip(nothing, *moved)))


@lru_cache(maxsize=4096)
@torch.inference_mode(False)  # what is kept may be trained with later
def scale_taps(
    schedule: ScaleSchedule,
    source: int,
    target: int,
    accumulate: bool = False,
    device: torch.device | str = "cpu",
) -> Taps:
    """What the codes of the scales up to `source` say on the grid of `target`, both 0-based; rows are all codes of the
    picture. Residual: those of `source` alone."""
    parts = []
    for scale in range(source + 1) if accumulate else [source]:
        axes = zip(schedule[scale], schedule.final_grid if accumulate else (None, None), schedule[target])
        (rows, row_weights), (columns, column_weights) = (_axis(*sizes) for sizes in axes)
        places = rows[:, None, :, None] * schedule[scale][1] + columns[:, None]
        weights = row_weights[:, None, :, None] * column_weights[:, None]
        parts.append((schedule.offsets[scale] + places.flatten(2).flatten(0, 1), weights.flatten(2).flatten(0, 1)))
    places_lt, weights_lt = (torch.cat(each, dim=1) for each in zip(*parts))
    starts_l = torch.arange(len(places_lt), device="cpu") * places_lt.shape[1]
    return Taps(*(each.flatten().to(device) for each in (places_lt, weights_lt, starts_l)))


def _axis(source: int, via: int | None, target: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Both resizes work on rows and columns apart. Of each of `target` cells in a line: (target, t) which of `source`
    cells count, and how much, bicubic, or bicubic to `via` cells and then by area."""
    unit_maps = torch.eye(source, dtype=torch.float32, device="cpu")[None, :, :, None]
    maps = resize_features(unit_maps, (target if via is None else via, 1))
    matrix = F.interpolate(maps, size=(target, 1), mode="area")[0, :, :, 0].T
    counts = matrix != 0
    cells = counts.int().sort(dim=1, descending=True, stable=True).indices[:, : int(counts.sum(dim=1).max())]
    return cells, matrix.gather(1, cells)
