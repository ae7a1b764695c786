"""What FSDP2 has to be told of NextFlow."""

from dataclasses import replace

from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from transformers import TrainerCallback


def keep_losses_float32(accelerator: Accelerator) -> None:
    """To be called before the model is sharded: accelerate's mixed precision would round what the forward returns, and
    with it the losses, to bfloat16."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and isinstance(plugin.mixed_precision_policy, MixedPrecisionPolicy):
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)


class WholeHeadsCallback(TrainerCallback):
    """Gathers the heads of a model that accelerate shards by FSDP2 together with the model; does nothing to others.

    accelerate makes the text head a unit of its own, which every call gathers anew; but the loss calls the heads
    once for each chunk of its targets.
    """

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if not isinstance(model, FSDPModule):
            return
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        heads = [head for head in (base.lm_head, base.code_head) if isinstance(head, FSDPModule)]
        for head in heads:
            head._forward_pre_hooks.clear()
            head._forward_hooks.clear()

        def gather(module: nn.Module, args: tuple) -> None:
            for head in heads:
                head.unshard()

        base.register_forward_pre_hook(gather)
