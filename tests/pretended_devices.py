"""Devices that are only pretended, for tests of a model whose parts lie on several.

A tensor of one holds its numbers on the CPU. What torch refuses of real devices, tensors of two of them in one
operation, is refused here.
"""

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

CPU = torch.device("cpu")
# of a type that torch knows and this build has no kernels of
DEVICES = [torch.device("lazy", index) for index in range(2)]

COPYING = {torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default}
INDEXING = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default}


class Elsewhere(torch.Tensor):
    """A tensor on a pretended device."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor, device: torch.device | None = None, requires_grad: bool = False):
        if device is None:  # as of a parameter's class
            return torch.nn.Parameter(held, requires_grad)
        like = {name: getattr(held, name) for name in ("dtype", "layout")}
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), held.stride(), held.storage_offset(), device=device, **like
        )
        tensor.held = held
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})

    def tolist(self):
        return self.held.tolist()

    def data_ptr(self):
        return self.held.data_ptr()


class PretendedDevices(TorchDispatchMode):
    """While it is on, tensors can be made on pretended devices and brought there."""

    def __enter__(self):
        torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor(..., device=)` comes here as well
        torch.lazy = SimpleNamespace()  # where checkpoints look for the device's random numbers
        return super().__enter__()

    def __exit__(self, *error):
        torch._C._set_only_lift_cpu_tensors(False)
        del torch.lazy
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def run(func: Callable, args: tuple, kwargs: dict):
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    # a number of the CPU goes with all devices
    devices = {tensor.device for tensor in tensors if tensor.ndim or isinstance(tensor, Elsewhere)}
    if func in INDEXING:
        devices = {args[0].device, *(devices - {CPU})}
    if len(devices) > 1 and func not in COPYING:
        raise RuntimeError(f"{func} got tensors on {' and '.join(sorted(map(str, devices)))}")
    device = next(iter(devices), CPU)
    there = kwargs
    if kwargs.get("device") is not None:
        device = torch.device(kwargs["device"])
        there = kwargs | {"device": device if device not in DEVICES else CPU}
    here = tree_map_only(Elsewhere, lambda tensor: tensor.held, (args, there))
    result = func(*here[0], **here[1])
    if func is torch.ops.aten.copy_.default:
        device = args[0].device
    if device not in DEVICES:
        return result
    result = tree_map_only(torch.Tensor, lambda tensor: Elsewhere(tensor, device), result)
    return return_and_correct_aliasing(func, args, kwargs, result)
