"""Weighted cross-entropy over the joint softmax of text and code rows (NextFlow sec. 2.2, eq. 2).

Shape suffixes: N supervised positions, n those of one chunk, D hidden, V all rows (text, then codes).
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

IGNORE = -100
LOGITS_AT_ONCE = 2**25  # of one chunk: 128 MiB in float32


def joint_cross_entropy(
    hidden_ND: torch.Tensor,
    heads: Sequence[Callable[[torch.Tensor], torch.Tensor]],
    num_rows: int,
    targets_N: torch.Tensor,
    weights_N: torch.Tensor,
    z_loss: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of weight x cross-entropy under one softmax over the rows of all heads; exact, without the logits of all
    positions at once.

    Heads are called, chunk by chunk of positions, so that adapters on them, offload and tensor parallelism take part.
    What a chunk's logits were is computed again in the backward.

    Args:
        hidden_ND: (N, D) of the supervised positions.
        heads: modules from (n, D) hidden states to (n, rows) logits, in the order of the targets' ids.
        num_rows: of all heads.
        targets_N: (N,) int64 over all rows.
        weights_N: (N,) of the targets, constants.
        z_loss: coefficient of the squared log-sum-exp of the logits, added to each target's cross-entropy before it is
            weighed; it holds the softmax's normaliser near 1. No part of the paper.

    Returns:
        The sum, a scalar, and the (N,) unweighted cross-entropies, detached. Both float32, or float64 for logits in
        it.
    """

    def of_chunk(hidden_nD, targets_n, weights_n):
        logits_nV = torch.cat([head(hidden_nD).to(hidden_nD.device) for head in heads], dim=-1)
        logits_nV = logits_nV.to(torch.promote_types(logits_nV.dtype, torch.float32))
        losses_n = F.cross_entropy(logits_nV, targets_n, reduction="none")
        penalties_n = z_loss * logits_nV.logsumexp(dim=-1) ** 2 if z_loss else 0.0
        return ((losses_n + penalties_n) * weights_n).sum(), losses_n.detach()

    length = max(1, LOGITS_AT_ONCE // num_rows)
    chunks = [tensor.split(length) for tensor in (hidden_ND, targets_N, weights_N)]
    totals, losses = zip(*(checkpoint(of_chunk, *chunk, use_reentrant=False) for chunk in zip(*chunks)))
    return sum(totals), torch.cat(losses)
