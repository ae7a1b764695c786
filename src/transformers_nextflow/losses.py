"""Targets, weights, weighted cross-entropy over the joint softmax of text and code rows (NextFlow sec. 2.2, eq. 2).

Shape suffixes: B batch, L sequence, N supervised positions, n those of one chunk, D hidden, V all rows (text, then
codes).
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from .layout import SequenceLayout

IGNORE = -100
LOGITS_AT_ONCE = 2**25  # of one chunk: 128 MiB in float32


def shift_labels_of(
    labels: torch.Tensor,
    layout: SequenceLayout,
    boi_token_id: int,
    valid: torch.Tensor | None = None,
    document_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """(B, L) labels the Hugging Face way -> (B, L) targets aligned with the outputs.

    Text targets move one to the left. At `<boi>` and `<image>` slots the value stays a marker (anything but -100:
    supervise), because scales do not shift; the token before a supervised `<boi>` predicts `<boi>`; `<eoi>` is never a
    target. Nothing is predicted across documents, nor from padding (where `valid` is 0).
    """
    shifted_BL = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
    if valid is not None:
        shifted_BL = shifted_BL.masked_fill(valid == 0, IGNORE)
    if document_ids is not None:
        crosses = document_ids != F.pad(document_ids[:, 1:], (0, 1), value=-1)
        shifted_BL = shifted_BL.masked_fill(crosses, IGNORE)
    for image in layout.closed_images:
        shifted_BL[image.row, image.slots] = labels[image.row, image.slots]
        if image.start > 0 and shifted_BL[image.row, image.start - 1] != IGNORE:
            shifted_BL[image.row, image.start - 1] = boi_token_id
    return shifted_BL


def fill_code_targets(
    shift_labels: torch.Tensor,
    layout: SequenceLayout,
    image_codes: list[torch.Tensor],
    text_vocab_size: int,
    alpha: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Replace the markers of supervised images by their codes' ids, and weigh every target.

    Args:
        shift_labels: (B, L), from [`shift_labels_of`] or carried by packed data.
        image_codes: the (L_i,) target codes of each of `layout.closed_images`.
        alpha: exponent of the scale weights `1 / (h * w) ** alpha`, normalised per image; text weighs 1.

    Returns:
        targets (B, L) over all rows and weights (B, L) float32, 0 where nothing is supervised.

    Raises:
        ValueError: if an image is supervised in part.
    """
    targets_BL = shift_labels.clone()
    weights_BL = torch.ones_like(targets_BL, dtype=torch.float32)
    for image, codes in zip(layout.closed_images, image_codes):
        supervised = shift_labels[image.row, image.slots] != IGNORE
        if not bool(supervised.any()):
            continue
        if not bool(supervised.all()):
            raise ValueError(
                f"an image is supervised whole or not at all: row {image.row}, <boi> at {image.start}, has "
                f"{int(supervised.sum())} of {len(supervised)} labels"
            )
        if image.has_last_scale:
            raise ValueError(
                f"an image that carries its last scale as input cannot be supervised: row {image.row}, "
                f"<boi> at {image.start}"
            )
        targets_BL[image.row, image.slots] = codes + text_vocab_size
        predicted = image.schedule.prefix(image.num_scales)
        scale_weights = torch.tensor(predicted.weights(alpha), device=weights_BL.device)
        lengths = torch.tensor(predicted.lengths, device=weights_BL.device)
        weights_BL[image.row, image.slots] = scale_weights.repeat_interleave(lengths)
    return targets_BL, weights_BL.masked_fill(targets_BL == IGNORE, 0.0)


def joint_cross_entropy(
    hidden: torch.Tensor,
    heads: Sequence[Callable[[torch.Tensor], torch.Tensor]],
    num_rows: int,
    targets: torch.Tensor,
    weights: torch.Tensor,
    z_loss: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of weight x cross-entropy under one softmax over the rows of all heads; exact, without the logits of all
    positions at once.

    Heads are called, chunk by chunk of positions, so that adapters on them, offload and tensor parallelism take part.
    What a chunk's logits were is computed again in the backward.

    Args:
        hidden: (..., D).
        heads: modules from (n, D) hidden states to (n, rows) logits, in the order of the targets' ids.
        num_rows: of all heads.
        targets: (...) int64 over all rows, `IGNORE` where nothing is supervised.
        weights: (...) of the targets, constants.
        z_loss: coefficient of the squared log-sum-exp of the logits, added to each target's cross-entropy before it is
            weighed; it holds the softmax's normaliser near 1. No part of the paper.

    Returns:
        The sum, a scalar, and the (...) unweighted cross-entropies, detached, 0 where nothing is supervised. Both
        float32, or float64 for logits in it.
    """
    supervised = targets != IGNORE

    def of_chunk(hidden_nD, targets_n, weights_n):
        logits_nV = torch.cat([head(hidden_nD).to(hidden_nD.device) for head in heads], dim=-1)
        logits_nV = logits_nV.to(torch.promote_types(logits_nV.dtype, torch.float32))
        losses_n = F.cross_entropy(logits_nV, targets_n, reduction="none")
        penalties_n = z_loss * logits_nV.logsumexp(dim=-1) ** 2 if z_loss else 0.0
        return ((losses_n + penalties_n) * weights_n).sum(), losses_n.detach()

    length = max(1, LOGITS_AT_ONCE // num_rows)
    chunks = [tensor[supervised].split(length) for tensor in (hidden.to(targets.device), targets, weights)]
    totals, losses = zip(*(checkpoint(of_chunk, *chunk, use_reentrant=False) for chunk in zip(*chunks)))
    losses_N = torch.cat(losses)
    return sum(totals), losses_N.new_zeros(targets.shape).masked_scatter(supervised, losses_N)
