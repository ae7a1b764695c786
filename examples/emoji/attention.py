"""Attention of packs document by document, as none sees another: `attn_implementation="documents"`.

At the lengths of this world, on a CPU, no backward of transformers' own attentions is as fast: they compute all pairs
of a pack, of which two in five are within a document, and half of those are seen. So queries attend some rows at a
time, to no more keys than these see, which also keeps their weights in the cache of the CPU.
"""

from dataclasses import dataclass

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import repeat_kv

DOCUMENTS = "documents"
QUERIES = 128  # at a time


@dataclass(frozen=True, eq=False)
class Documents:
    """Takes the place of a mask.

    Attributes:
        places: row, some queries of a document, and the keys of it that they see; the padding of a row is one too.
        masks: of each, (1, queries, keys), 0 where a query sees a key, else -inf.
    """

    places: list[tuple[int, slice, slice]]
    masks: list[torch.Tensor]


def documents_mask(*args, dtype: torch.dtype = torch.float32, **kwargs) -> Documents:
    """As the library's functions for masks; every position sees the first of its document."""
    seen_BLL = sdpa_mask(*args, **kwargs | {"allow_is_causal_skip": False})[:, 0]
    places, masks = [], []
    for row, seen_LL in enumerate(seen_BLL):
        begins = seen_LL.int().argmax(dim=-1).unique().tolist()
        for begin, end in zip(begins, [*begins[1:], len(seen_LL)]):
            for first in range(begin, end, QUERIES):
                queries = slice(first, min(first + QUERIES, end))
                keys = slice(begin, 1 + int(seen_LL[queries].any(dim=0).nonzero().max()))
                seen = seen_LL[queries, keys][None]
                places.append((row, queries, keys))
                masks.append(torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -torch.inf))
    return Documents(places, masks)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, scaling: float, documents: Documents):
        """(B, heads, L, head size) each -> (B, L, heads, head size)."""
        output = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
        weights, key = [], key * scaling
        for (row, queries, keys), mask in zip(documents.places, documents.masks):
            scores = torch.baddbmm(mask, query[row, :, queries], key[row, :, keys].mT)
            weights.append(scores.softmax(dim=-1))
            output[row, queries] = (weights[-1] @ value[row, :, keys]).transpose(0, 1)
        ctx.save_for_backward(query, key, value, output, *weights)
        ctx.scaling, ctx.places = scaling, documents.places
        return output

    @staticmethod
    def backward(ctx, gradient):
        query, key, value, output, *weights = ctx.saved_tensors
        of_query, of_key, of_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        products = (gradient * output).sum(dim=-1, keepdim=True)
        for (row, queries, keys), weight in zip(ctx.places, weights):
            of_output = gradient[row, queries].transpose(0, 1)
            of_value[row, :, keys].baddbmm_(weight.mT, of_output)
            of_scores = of_output @ value[row, :, keys].mT
            of_scores.sub_(products[row, queries].transpose(0, 1)).mul_(weight)
            of_query[row, :, queries] = of_scores @ key[row, :, keys]
            of_key[row, :, keys].baddbmm_(of_scores.mT, query[row, :, queries], alpha=ctx.scaling)
        return of_query, of_key, of_value, None, None


@torch.compiler.disable  # every pack would be a graph of its own
def documents_attention(module, query, key, value, attention_mask: Documents, scaling: float, **kwargs):
    """As the library's functions for attention, without dropout."""
    key, value = (repeat_kv(states, module.num_key_value_groups) for states in (key, value))
    return _Attention.apply(query, key, value, scaling, attention_mask), None


AttentionInterface.register(DOCUMENTS, documents_attention)
AttentionMaskInterface.register(DOCUMENTS, documents_mask)
