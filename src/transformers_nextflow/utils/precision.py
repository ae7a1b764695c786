"""What stays float32 in a model of another precision."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn


class AtLeastFloat32(nn.Module):
    """A base of modules whose numbers are never coarser than float32, whatever their model is cast to, or given by
    `load_state_dict(..., assign=True)`.

    Attributes:
        follows_casts: true where it is to be as coarse as its model after all.
    """

    follows_casts = False

    @staticmethod
    def _is_kept(dtype: torch.dtype) -> bool:
        """Whether its numbers may be of this floating-point type."""
        return dtype.itemsize >= torch.float32.itemsize

    def _fine(self, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        """A changed tensor, or the one before in float32, where that has been."""
        is_changed = self.follows_casts or not after.is_floating_point() or self._is_kept(after.dtype)
        return after if is_changed else before.to(after.device, torch.float32)

    def _apply(self, fn, recurse=True):
        return super()._apply(lambda tensor: self._fine(tensor, fn(tensor)), recurse)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for name, tensor in state_dict.items():
            if name.startswith(prefix):
                state_dict[name] = self._fine(tensor, tensor)
        super()._load_from_state_dict(state_dict, prefix, *args)


class Float32(AtLeastFloat32):
    """A base of modules that are float32 and no finer either."""

    @staticmethod
    def _is_kept(dtype: torch.dtype) -> bool:
        return dtype == torch.float32


def without_autocast(device: torch.device) -> AbstractContextManager:
    """While this runs, operations keep the precision of their inputs. Devices without autocast, as meta, do anyway."""
    has_autocast = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if has_autocast else nullcontext()
