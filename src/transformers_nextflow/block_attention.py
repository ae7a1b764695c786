"""Attention that computes only the pairs that see each other, on any device.

A scale block sees its document from the beginning up to its own end and needs no mask; a run of text is causal. So
each is one call over its document's keys so far: of SDPA under `attn_implementation="blocks"`, which importing the
package registers, and wherever SDPA neither trains nor is compiled; of FlashAttention, which takes no masks, always.
Whatever has an ordinary mask (text alone, steps that follow a cache, the vision tokenizer) goes transformers' own way.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

BLOCKS = "blocks"


@dataclass(frozen=True)
class Segment:
    """Neighbouring positions of a document that attend in one call: a scale block, or a causal run of text."""

    length: int
    is_block: bool


@dataclass(frozen=True)
class Segments:
    """Takes the place of a mask for whole sequences. It holds no tensors, so nothing that moves or recomputes a layer
    needs to know it.

    Attributes:
        documents: each document's segments in order; documents of a row in order, rows one after the other. Padding is
            a document like any other.
    """

    documents: tuple[tuple[Segment, ...], ...]


def segments_of(block_ids: torch.Tensor, document_ids: torch.Tensor) -> Segments:
    """The segments of a batch.

    Args:
        block_ids: (B, L), one number for each scale block, -1 for text.
        document_ids: (B, L), -1 at padding.

    Raises:
        ValueError: if a document is in pieces.
    """
    rows, length = block_ids.shape
    opens, begins = (F.pad(ids.diff(dim=1) != 0, (1, 0), value=True) for ids in (document_ids, block_ids))
    changes = opens | begins
    starts = changes.flatten().nonzero()[:, 0]
    ends = F.pad(starts[1:], (0, 1), value=rows * length)
    columns = [values.flatten()[starts].long() for values in (document_ids, opens, block_ids)]

    documents: list[list[Segment]] = []
    met = set()
    for start, end, document, is_first, block in torch.stack([starts, ends, *columns], dim=1).tolist():
        row, column = divmod(start, length)
        if is_first:
            if document >= 0 and (row, document) in met:
                raise ValueError(
                    f"for attention by blocks a document must be in one piece, but document {document} of row {row} "
                    f"goes on at {column}, after another or after padding"
                )
            met.add((row, document))
            documents.append([])
        documents[-1].append(Segment(end - start, block >= 0))
    return Segments(tuple(map(tuple, documents)))


def is_flash(attn_implementation: str | None) -> bool:
    """Whether attention takes no masks; what is causal then ends with the last key."""
    return "flash" in (attn_implementation or "")


@torch.compiler.disable  # every layout would be a graph of its own
def attend_by_segments(
    attend: Callable,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    **kwargs,
) -> torch.Tensor:
    """Attention of whole sequences, a call for each segment.

    Args:
        attend: SDPA's or FlashAttention's function of transformers.
        query: (B, heads, L, head size).
        key, value: (B, key-value heads, at least L, head size); columns behind the L first are a static cache's
            empty ones.

    Returns:
        (B, L, heads, head size).
    """
    batch, _, length, _ = query.shape
    lengths = [sum(segment.length for segment in document) for document in segments.documents]
    if sum(lengths) != batch * length:
        raise ValueError(f"the segments have {sum(lengths)} positions, the queries {batch} x {length}")
    # splits rather than slices: the backward of a slice fills zeros of the whole length
    rows = (states[:, :, :length].transpose(0, 1).flatten(1, 2)[None] for states in (query, key, value))
    per_document = zip(*(row.split(lengths, dim=2) for row in rows))
    takes_masks = not is_flash(module.config._attn_implementation)
    outputs = []
    for document, (queries, keys, values) in zip(segments.documents, per_document):
        stop = 0
        for segment, part in zip(document, queries.split([segment.length for segment in document], dim=2)):
            start, stop = stop, stop + segment.length
            mask = None  # blocks and a lone position see all keys so far; SDPA's own causal mask begins at the first
            if start and segment.length > 1 and not segment.is_block and takes_masks:
                mask = torch.ones(segment.length, stop, dtype=torch.bool, device=query.device).tril(start)
            seen = keys[:, :, :stop], values[:, :, :stop]
            outputs.append(attend(module, part, *seen, mask, is_causal=not segment.is_block, **kwargs)[0])
    return torch.cat(outputs, dim=1).view(batch, length, *outputs[0].shape[2:])


AttentionInterface.register(BLOCKS, sdpa_attention_forward)
AttentionMaskInterface.register(BLOCKS, sdpa_mask)
