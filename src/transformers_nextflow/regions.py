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
        region: (H, W) of the final grid's aspect ratio, as the picture has it, and at least as large.

    Raises:
        ValueError: if it is not bool, or of another size.
    """
    h, w = schedule.final_grid
    height, width = region.shape if region.ndim == 2 else (0, 0)
    if region.dtype != torch.bool or height < h or height * w != width * h:
        raise ValueError(
            f"a region must be bool, (height, width) of the aspect ratio of the grid {(h, w)}, got {region.dtype} of "
            f"the shape {tuple(region.shape)}"
        )
    # adaptive pooling takes every pixel that a cell's area touches, whole or in part
    pooled = [F.adaptive_max_pool2d(region.float()[None, None], grid).flatten() > 0 for grid in schedule]
    return torch.cat(pooled)
