"""What FSDP2 has to be told of NextFlow, and tensors of which each process holds a part."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainerCallback

from ..lora import below_adapters

if TYPE_CHECKING:
    from accelerate import Accelerator


def keep_losses_float32(accelerator: "Accelerator") -> None:
    """To be called before the model is sharded: accelerate's mixed precision would round what the forward returns, and
    with it the losses, to bfloat16."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and isinstance(plugin.mixed_precision_policy, MixedPrecisionPolicy):
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this process holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor; of one that is sharded all processes ask for it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded_like(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """A whole tensor, on the device and in the shards of the other."""
    tensor = tensor.to(other.device)
    return distribute_tensor(tensor, other.device_mesh, other.placements) if isinstance(other, DTensor) else tensor


def units_of(model: nn.Module) -> list[FSDPModule]:
    """The modules of a model that FSDP2 shards."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def let_go(model: nn.Module) -> None:
    """Drop gathered weights, before the shards are changed by anything but an optimizer: FSDP2 keeps those of the
    outermost unit after a forward, and would go on to use them."""
    for unit in units_of(model):
        unit.reshard()


@contextmanager
def whole_weights(model: nn.Module) -> Iterator[None]:
    """While it lasts, every process holds all weights of a model that FSDP2 shards, whatever runs of it; other models
    are left as they are. All processes enter it together."""
    let_go(model)
    units = units_of(model)
    if isinstance(model, FSDPModule):
        model._get_fsdp_state()._lazy_init()  # or a part that runs first would take itself for the whole
    states = [unit._get_fsdp_state() for unit in units]  # its setters have no getters
    before = [(state._auto_reshard_after_forward, _after_forward(state)) for state in states]
    for unit in units:
        unit.set_reshard_after_forward(False)
        unit.unshard()
    try:
        yield
    finally:
        for unit, state, (auto, after_forward) in zip(units, states, before):
            unit.reshard()
            state._auto_reshard_after_forward = auto
            for group, mesh in zip(state._fsdp_param_groups, after_forward):
                group.post_forward_mesh_info = mesh


def _after_forward(state) -> list:
    """Over which mesh each group of a unit's weights is sharded after a forward."""
    return [group.post_forward_mesh_info for group in state._fsdp_param_groups]


class WholeHeadsCallback(TrainerCallback):
    """Gathers the heads of a model that accelerate shards by FSDP2 together with the model; does nothing to others.

    accelerate makes the text head a unit of its own, which every call gathers anew; but the loss calls the heads
    once for each chunk of its targets.
    """

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if not isinstance(model, FSDPModule):
            return
        base = below_adapters(model)
        heads = [head for head in (base.lm_head, base.code_head) if isinstance(head, FSDPModule)]
        for head in heads:
            head._forward_pre_hooks.clear()
            head._forward_hooks.clear()

        def gather(module: nn.Module, args: tuple) -> None:
            for head in heads:
                head.unshard()

        base.register_forward_pre_hook(gather)
