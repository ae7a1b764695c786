"""Attention that computes only pairs that see each other, on any device: one SDPA call per scale block and text run.

A scale block sees its document's beginning up to its own end, so it needs no mask; a text run is causal. `register`
once, choose the language model's attention implementation "blocks", and call `use_segments` before each forward.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv


@dataclass(frozen=True)
class Segment:
    """Queries `start:stop` of a row see keys `first:stop`, causally or all."""

    row: int
    first: int
    start: int
    stop: int
    is_causal: bool


_current: list[Segment] = []


def register() -> None:
    AttentionInterface.register("blocks", _attend)
    AttentionMaskInterface.register("blocks", lambda *args, **kwargs: None)


def use_segments(layout, document_ids: torch.Tensor) -> None:
    """Name the calls of the next forward and backward; padding is a document like any other."""
    global _current
    _current = segments_of(layout.block_ids, document_ids)


def segments_of(block_ids: torch.Tensor, document_ids: torch.Tensor) -> list[Segment]:
    """Runs of equal document and equal block (text: -1), in order."""
    segments = []
    for row, (blocks, documents) in enumerate(zip(block_ids.tolist(), document_ids.tolist())):
        first = start = 0
        for place in range(1, len(blocks) + 1):
            new_document = place == len(blocks) or documents[place] != documents[place - 1]
            if new_document or blocks[place] != blocks[place - 1]:
                segments.append(Segment(row, first, start, place, blocks[start] < 0))
                start = place
            if new_document:
                first = place
    return segments


def _attend(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    key, value = repeat_kv(key, module.num_key_value_groups), repeat_kv(value, module.num_key_value_groups)
    rows: list[list[torch.Tensor]] = [[] for _ in range(query.shape[0])]
    for part in _current:
        queries = query[part.row, :, part.start : part.stop][None]
        keys, values = (states[part.row, :, part.first : part.stop][None] for states in (key, value))
        mask = None
        if part.is_causal and part.start > part.first:
            mask = torch.ones(queries.shape[2], keys.shape[2], dtype=torch.bool, device=query.device)
            mask = mask.tril(part.start - part.first)
        is_causal = part.is_causal and mask is None
        output = F.scaled_dot_product_attention(queries, keys, values, mask, is_causal=is_causal, scale=scaling)
        rows[part.row].append(output[0])
    return torch.stack([torch.cat(row, dim=1) for row in rows]).transpose(1, 2).contiguous(), None
