"""Which codes of a picture touch a region of its pixels."""

import torch
import torch.nn.functional as F

from .scales import ScaleSchedule


def codes_of_region(region: torch.Tensor, schedule: ScaleSchedule) -> torch.Tensor:
    """The codes whose cell overlaps a region, scale by scale: (H, W) bool -> (codes,) bool.

    Forced to a picture's own codes, they keep all its codes in the region as they are; the first scales' few cells
    mostly overlap any region, so that a picture keeps its coarse look. Their negation, of the region's complement, is
    what lies inside entirely. (Upsampling is bicubic, so the pixels within about two cells of the border still move.)

    Args:
        region: (H, W) a multiple of the final grid.

    Raises:
        ValueError: if it is not bool, or of another size.
    """
    h, w = schedule.final_grid
    if region.dtype != torch.bool or region.ndim != 2 or region.shape[0] % h or region.shape[1] % w:
        raise ValueError(
            f"a region must be bool of (height, width) in multiples of {(h, w)}, got {region.dtype} of the shape "
            f"{tuple(region.shape)}"
        )
    # adaptive pooling takes every pixel that a cell's area touches, whole or in part
    pooled = [F.adaptive_max_pool2d(region.float()[None, None], grid).flatten() > 0 for grid in schedule]
    return torch.cat(pooled)
