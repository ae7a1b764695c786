"""Who sees whom: causal text, scale blocks that see themselves, documents that do not see each other.

Masks are built by transformers' own functions, so that every attention backend gets the form it expects. The package's
own backend and FlashAttention get segments (`block_attention.py`), and so does SDPA where nothing is trained or
compiled: for a picture of 1024 x 1024 they spare it a mask of over 9,000 x 9,000 pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask

from .block_attention import BLOCKS, is_flash, segments_of
from .cache_name import CACHE

FLEX = "flex_attention"


@dataclass(frozen=True)
class Part:
    """Neighbours among all positions of a step, which attend apart from the others.

    Attributes:
        cache: of their rows; `None` where nobody reads on.
        shape: how many rows, and positions of each.
        in_block: without a mask they see all that their rows have read, and each other; if not, they are causal.
        mask: what an attention function of transformers takes; it goes into the layers as their `attention_mask`.
        is_kept: whether their keys and values stay in the cache, for who reads on.
    """

    cache: Cache | None
    shape: tuple[int, int]
    in_block: bool = True
    mask: object = None
    is_kept: bool = True

    def read(self, key: torch.Tensor, value: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer, (rows, heads, all positions, head size): of the cache, then the new ones."""
        if self.cache is None:
            return key, value
        if self.is_kept:
            return self.cache.update(key, value, layer)
        held = self.cache.layers[layer]
        return torch.cat([held.keys, key], dim=-2), torch.cat([held.values, value], dim=-2)


@dataclass(frozen=True)
class Apart:
    """Takes the place of a cache in the decoder, whose layers then run over all parts of a step at once."""

    parts: Sequence[Part]


def sequence_mask(
    config: PreTrainedConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    block_ids: torch.Tensor | None,
    document_ids: torch.Tensor | None,
    past_key_values: Cache | None,
) -> dict | torch.Tensor | None:
    """The mask of whole sequences: position q sees k if k is not padding, both belong to one document, and k <= q or
    both lie in one scale block (NextFlow sec. 2.2). `block_ids` is (B, L) as of the layout, `None` for text alone.

    Returns what `Qwen2_5_VLTextModel` takes: pure unpacked text keeps the plain 2D mask, and with it Qwen's own path
    bit for bit.
    """
    if block_ids is None and document_ids is None:
        return attention_mask
    needs_segments = config._attn_implementation == BLOCKS or is_flash(config._attn_implementation)
    is_free = not (torch.is_grad_enabled() or torch.compiler.is_compiling())
    if needs_segments or (config._attn_implementation == "sdpa" and is_free):
        documents = torch.zeros_like(block_ids) if document_ids is None else document_ids
        blocks = torch.full_like(documents, -1) if block_ids is None else block_ids
        if attention_mask is not None:
            documents = documents.masked_fill(attention_mask == 0, -1)
        try:
            return {"full_attention": segments_of(blocks, documents)}
        except ValueError:  # a document in pieces needs a mask
            if needs_segments:
                raise
    same_document = None
    if document_ids is not None:
        if past_key_values is not None:  # a static cache has keys beyond the sequence
            keys, _ = past_key_values.get_mask_sizes(document_ids.shape[1], layer_idx=0)
            document_ids = F.pad(document_ids, (0, keys - document_ids.shape[1]), value=-1)
        same_document = lambda batch, head, q, kv: document_ids[batch, q] == document_ids[batch, kv]  # noqa: E731
    mask = create_causal_mask(
        config=config,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        position_ids=None,  # packed documents come from document_ids; positions repeat inside images
        and_mask_function=same_document,
        block_sequence_ids=block_ids,
        **{CACHE: past_key_values},
    )
    return {"full_attention": mask}


def is_decoders_alone(attn_implementation: str | None) -> bool:
    """Whether the vision tokenizer keeps SDPA beside it."""
    return attn_implementation == FLEX or is_flash(attn_implementation)


def refuse_dense_mask(config: PreTrainedConfig, mask: torch.Tensor | None) -> None:
    """Raise a `ValueError` for a (B, heads, L, keys) mask under flex attention, which would add its numbers to the
    scores, 1 for True; a BlockMask, or a (B, keys) mask to make one of, is right."""
    if config._attn_implementation == FLEX and isinstance(mask, torch.Tensor) and mask.ndim > 2:
        raise ValueError(
            f'attn_implementation="{FLEX}" takes an attention_mask of the shape (B, keys), not a dense one of '
            f'{tuple(mask.shape)}; use "sdpa" for that'
        )


def visible_keys(block_ids: torch.Tensor, document_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which keys [`sequence_mask`] lets each position of (B, L) packed rows see: (B, L) int64 of the first, and of one
    past the last. Padding sees none."""
    places = torch.arange(block_ids.shape[1], device=block_ids.device).expand_as(block_ids)
    continues = F.pad(document_ids[:, 1:] == document_ids[:, :-1], (1, 0), value=False)
    starts = places.masked_fill(continues, 0).cummax(dim=1).values
    # up to itself, or to the end of its block
    goes_on = F.pad((block_ids[:, 1:] == block_ids[:, :-1]) & (block_ids[:, 1:] >= 0), (0, 1), value=False)
    ends = (places + 1).masked_fill(goes_on, block_ids.shape[1]).flip(1).cummin(dim=1).values.flip(1)
    return starts, torch.where(document_ids >= 0, ends, starts)


def attended_pairs(block_ids: torch.Tensor, document_ids: torch.Tensor) -> int:
    """How many (query, key) pairs [`sequence_mask`] lets see each other in (B, L) packed rows, padding left out."""
    starts, ends = visible_keys(block_ids, document_ids)
    return int((ends - starts).sum())
