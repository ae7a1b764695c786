"""Liger's Triton kernels for the decoder's RMSNorm and SwiGLU layers.

The library patches known model types only, and leaves others alone without a word. Not taken from it: the loss
(`losses.py` is exact over both heads) and the rotary embedding, which could be replaced only for every model of the
process, since Qwen2.5-VL's attention looks it up as a function of its module.

`model.set_use_kernels(True)` of transformers replaces the RMSNorm layers alone, by a download from the Hub.
"""

import torch
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRMSNorm, Qwen2MLP

from .configuration_nextflow import NextFlowConfig
from .utils.lazy import needing_extra


def apply_liger_kernel(
    model, rms_norm: bool = True, swiglu: bool = True, fused_linear_cross_entropy: bool = False
) -> None:
    """Replace the decoder's RMSNorm and SwiGLU layers by Liger's, in place; their parameters stay the same objects.

    Args:
        model: [`NextFlowForConditionalGeneration`] or [`NextFlowModel`], on a GPU by the time it is called.
        rms_norm, swiglu: which of them.
        fused_linear_cross_entropy: TRL's trainers say that this stays off.

    Raises:
        ImportError: if liger-kernel is not installed.
        ValueError: for Liger's loss.
    """
    if fused_linear_cross_entropy:
        raise ValueError("fused_linear_cross_entropy knows one head: leave it off, the loss is of text and codes")
    with needing_extra("cuda", "use_liger_kernel"):
        from liger_kernel.transformers import LigerRMSNorm, LigerSwiGLUMLP

    decoder = model.base_model.language_model
    for name, module in list(decoder.named_modules()):
        with torch.device("meta"):
            if rms_norm and isinstance(module, Qwen2_5_VLRMSNorm):
                replacement = LigerRMSNorm(len(module.weight), eps=module.variance_epsilon)
            elif swiglu and isinstance(module, Qwen2MLP):
                replacement = LigerSwiGLUMLP(module.config)
            else:
                continue
        for part, _ in [*replacement.named_parameters(recurse=False), *replacement.named_children()]:
            setattr(replacement, part, getattr(module, part))
        decoder.set_submodule(name, replacement.train(module.training))


def register_liger_kernel() -> None:
    """Let `use_liger_kernel=True` of transformers' Trainer call [`apply_liger_kernel`].

    Raises:
        ImportError: if liger-kernel is not installed.
    """
    with needing_extra("cuda", "use_liger_kernel"):
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    MODEL_TYPE_TO_APPLY_LIGER_FN[NextFlowConfig.model_type] = apply_liger_kernel
