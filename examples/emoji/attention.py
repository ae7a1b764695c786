"""Attention of packs document by document, as none sees another: `attn_implementation="documents"`.

At the lengths of this world, on a CPU, no backward of transformers' own attentions is as fast: they compute all pairs
of a pack, of which two in five are within a document.
"""

from dataclasses import dataclass

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import repeat_kv

DOCUMENTS = "documents"


@dataclass(frozen=True, eq=False)
class Documents:
    """Takes the place of a mask.

    Attributes:
        places: row and positions of each document; the padding of a row is one too.
        masks: of each, (1, n, n), 0 where a position sees another, else -inf.
    """

    places: list[tuple[int, slice]]
    masks: list[torch.Tensor]


def documents_mask(*args, dtype: torch.dtype = torch.float32, **kwargs) -> Documents:
    """As the library's functions for masks; every position sees the first of its document."""
    seen_BLL = sdpa_mask(*args, **kwargs | {"allow_is_causal_skip": False})[:, 0]
    places, masks = [], []
    for row, seen_LL in enumerate(seen_BLL):
        begins = seen_LL.int().argmax(dim=-1).unique().tolist()
        for begin, end in zip(begins, [*begins[1:], len(seen_LL)]):
            own = slice(begin, end)
            places.append((row, own))
            mask = torch.zeros(1, end - begin, end - begin, dtype=dtype)
            masks.append(mask.masked_fill_(~seen_LL[own, own], -torch.inf))
    return Documents(places, masks)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, scaling: float, documents: Documents):
        """(B, heads, L, head size) each -> (B, L, heads, head size)."""
        output = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
        weights = []
        for (row, own), mask in zip(documents.places, documents.masks):
            scores = torch.baddbmm(mask, query[row, :, own], key[row, :, own].mT, alpha=scaling)
            weights.append(scores.softmax(dim=-1))
            output[row, own] = (weights[-1] @ value[row, :, own]).transpose(0, 1)
        ctx.save_for_backward(query, key, value, output, *weights)
        ctx.scaling, ctx.places = scaling, documents.places
        return output

    @staticmethod
    def backward(ctx, gradient):
        query, key, value, output, *weights = ctx.saved_tensors
        gradients = [torch.empty_like(states) for states in (query, key, value)]
        products = (gradient * output).sum(dim=-1, keepdim=True)
        for (row, own), weight in zip(ctx.places, weights):
            of_query, of_key, of_value = (states[row, :, own] for states in gradients)
            of_output = gradient[row, own].transpose(0, 1)
            of_value.copy_(weight.mT @ of_output)
            of_scores = of_output @ value[row, :, own].mT
            of_scores.sub_(products[row, own].transpose(0, 1)).mul_(weight).mul_(ctx.scaling)
            of_query.copy_(of_scores @ key[row, :, own])
            of_key.copy_(of_scores.mT @ query[row, :, own])
        return *gradients, None, None


@torch.compiler.disable  # every pack would be a graph of its own
def documents_attention(module, query, key, value, attention_mask: Documents, scaling: float, **kwargs):
    """As the library's functions for attention, without dropout."""
    key, value = (repeat_kv(states, module.num_key_value_groups) for states in (key, value))
    return _Attention.apply(query, key, value, scaling, attention_mask), None


AttentionInterface.register(DOCUMENTS, documents_attention)
AttentionMaskInterface.register(DOCUMENTS, documents_mask)
