"""Liger's Triton kernels for the decoder's RMSNorm and SwiGLU layers.

The library patches known model types only, and leaves others alone without a word. Not taken from it: the loss
(`losses.py` is exact over both heads) and the rotary embedding, which could be replaced only for every model of the
process, since Qwen2.5-VL's attention looks it up as a function of its module.

`model.set_use_kernels(True)` of transformers replaces the RMSNorm layers alone, by a download from the Hub.
"""

from importlib import import_module

import torch
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRMSNorm, Qwen2MLP

from .configuration_nextflow import NextFlowConfig


def apply_liger_kernel(model, rms_norm: bool = True, swiglu: bool = True) -> None:
    """Replace the decoder's RMSNorm and SwiGLU layers by Liger's, in place; their parameters stay the same objects.

    Args:
        model: [`NextFlowForConditionalGeneration`] or [`NextFlowModel`], on a GPU by the time it is called.
        rms_norm, swiglu: which of them.

    Raises:
        ImportError: if liger-kernel is not installed.
    """
    kernels = _liger("liger_kernel.transformers")
    decoder = model.base_model.language_model
    for name, module in list(decoder.named_modules()):
        with torch.device("meta"):
            if rms_norm and isinstance(module, Qwen2_5_VLRMSNorm):
                replacement = kernels.LigerRMSNorm(len(module.weight), eps=module.variance_epsilon)
            elif swiglu and isinstance(module, Qwen2MLP):
                replacement = kernels.LigerSwiGLUMLP(module.config)
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
    table = _liger("liger_kernel.transformers.monkey_patch").MODEL_TYPE_TO_APPLY_LIGER_FN
    table[NextFlowConfig.model_type] = apply_liger_kernel


def _liger(module: str):
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name != "liger_kernel":
            raise
        raise ImportError("Liger's kernels need the package liger-kernel: pip install liger-kernel") from error
