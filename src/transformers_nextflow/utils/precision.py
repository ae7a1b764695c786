"""What stays float32 in a model of lower precision."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn


class AtLeastFloat32(nn.Module):
    """A base of modules whose numbers no cast makes coarser than float32: `.to(torch.bfloat16)` leaves them alone.

    Attributes:
        follows_casts: true where it is to be as coarse as its model after all.
    """

    follows_casts = False

    def _apply(self, fn, recurse=True):
        if self.follows_casts:
            return super()._apply(fn, recurse)

        def fine(tensor: torch.Tensor) -> torch.Tensor:
            applied = fn(tensor)
            coarse = tensor.is_floating_point() and applied.dtype.itemsize < torch.float32.itemsize
            return tensor.to(applied.device, torch.float32) if coarse else applied

        return super()._apply(fine, recurse)


def without_autocast(device: torch.device) -> AbstractContextManager:
    """While this runs, operations keep the precision of their inputs. Devices without autocast, as meta, do anyway."""
    has_autocast = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if has_autocast else nullcontext()
