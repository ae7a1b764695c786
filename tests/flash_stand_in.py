"""A stand-in for FlashAttention, which no CPU has: no mask but for padding, and what is causal must be said."""

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import flash_attention_mask

FLASH = "flash_stand_in"


def attend(module, query, key, value, attention_mask, is_causal=None, **kwargs):
    assert attention_mask is None or attention_mask.ndim == 2
    if attention_mask is not None:  # of a static cache it is as long as what was read
        key, value = (each[:, :, : attention_mask.shape[1]] for each in (key, value))
    causal, length, keys = module.is_causal if is_causal is None else is_causal, query.shape[2], key.shape[2]
    mask = torch.ones(1, 1, length, keys, dtype=torch.bool)
    mask = mask.tril(keys - length) if causal else mask
    if attention_mask is not None:
        mask = mask & attention_mask[:, None, None].bool()
    return sdpa_attention_forward(module, query, key, value, mask, is_causal=False, **kwargs)


AttentionInterface.register(FLASH, attend)
AttentionMaskInterface.register(FLASH, flash_attention_mask)


def without_masks(model):
    """The model, whose decoder attends so."""
    model.model.language_model.config._attn_implementation_internal = FLASH
    return model
