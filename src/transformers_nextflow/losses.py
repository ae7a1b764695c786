"""Targets, weights, weighted cross-entropy over the joint softmax of text and code rows (NextFlow sec. 2.2, eq. 2).

Shape suffixes: B batch, L sequence, N supervised positions, n those of one chunk, D hidden, V all rows (text, then
codes).
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .layout import SequenceLayout

IGNORE = -100
LOGITS_AT_ONCE = 2**26  # of one chunk: 256 MiB in float32


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
    text_rows: torch.Tensor,
    code_rows: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor,
    z_loss: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of weight x cross-entropy under one softmax over text and code rows; exact, without the logits of all
    positions at once.

    Args:
        hidden: (..., D).
        text_rows, code_rows: (text rows, D) and (codes, D), the weights of the heads.
        targets: (...) int64 over all rows, `IGNORE` where nothing is supervised.
        weights: (...) of the targets, constants.
        z_loss: coefficient of the squared log-sum-exp of the logits, added to each target's cross-entropy before it is
            weighed; it holds the softmax's normaliser near 1. No part of the paper.

    Returns:
        The sum, a scalar to divide and to differentiate once, and the (...) unweighted cross-entropies, detached, 0
        where nothing is supervised. Both float32, or float64 for inputs in it.
    """
    supervised = targets != IGNORE
    inputs = [hidden[supervised], text_rows, code_rows]
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        inputs = [tensor.to(torch.get_autocast_dtype(device)) for tensor in inputs]
    if not torch.is_grad_enabled():  # a function's forward cannot ask
        inputs = [tensor.detach() for tensor in inputs]
    with torch.autocast(device, enabled=False):
        total, losses_N = _WeightedCrossEntropy.apply(*inputs, targets[supervised], weights[supervised], z_loss)
    return total, losses_N.new_zeros(targets.shape).masked_scatter(supervised, losses_N)


class _WeightedCrossEntropy(torch.autograd.Function):
    """A weighted sum of losses is a scalar, so its gradient is known in the forward up to one factor: the logits of
    each chunk become their own gradient in place, and what is kept is the size of the hidden states and the rows."""

    @staticmethod
    def forward(ctx, hidden_ND, text_rows, code_rows, targets_N, weights_N, z_loss):
        heads = (text_rows, code_rows)
        sizes = [len(rows) for rows in heads]
        dtype = torch.promote_types(hidden_ND.dtype, torch.float32)  # of all but the products with the rows
        weights_N = weights_N.to(dtype)
        losses_N, log_sums_N = torch.empty_like(weights_N), torch.empty_like(weights_N)
        hidden_gradient, *row_gradients = (
            torch.zeros_like(tensor, dtype=dtype) if needed else None
            for tensor, needed in zip((hidden_ND, *heads), ctx.needs_input_grad)
        )
        length = max(1, min(len(hidden_ND), LOGITS_AT_ONCE // sum(sizes)))
        products_nV = hidden_ND.new_empty(length, sum(sizes))
        for start in range(0, len(hidden_ND), length):
            chunk = slice(start, start + length)
            hidden_nD, targets_n1, weights_n1 = hidden_ND[chunk], targets_N[chunk, None], weights_N[chunk, None]
            products_nV = products_nV[: len(hidden_nD)]
            parts = products_nV.split(sizes, dim=1)
            for part, rows in zip(parts, heads):
                torch.mm(hidden_nD, rows.T, out=part)
            logits_nV = products_nV.to(dtype)
            peaks_n1 = logits_nV.amax(dim=1, keepdim=True)
            targets_logits_n1 = logits_nV.gather(1, targets_n1)
            sums_n1 = logits_nV.sub_(peaks_n1).exp_().sum(dim=1, keepdim=True)
            log_sums_n1 = sums_n1.log() + peaks_n1
            losses_N[chunk] = (log_sums_n1 - targets_logits_n1)[:, 0]
            log_sums_N[chunk] = log_sums_n1[:, 0]
            if not any(ctx.needs_input_grad):
                continue
            # weight x (probabilities - one at the target), and the log-sum-exp's gradient, probabilities too
            scales_n1 = weights_n1 * (1 + 2 * z_loss * log_sums_n1)
            logits_nV.mul_(scales_n1 / sums_n1).scatter_add_(1, targets_n1, -weights_n1)
            products_nV.copy_(logits_nV)
            for part, rows, row_gradient in zip(parts, heads, row_gradients):
                if hidden_gradient is not None:
                    _add_product(hidden_gradient[chunk], part, rows)
                if row_gradient is not None:
                    _add_product(row_gradient, part.T, hidden_nD)
        ctx.save_for_backward(hidden_gradient, *row_gradients)
        ctx.mark_non_differentiable(losses_N)
        return ((losses_N + z_loss * log_sums_N**2) * weights_N).sum(), losses_N

    @staticmethod
    @once_differentiable
    def backward(ctx, scale, _):
        return *(None if gradient is None else gradient * scale for gradient in ctx.saved_tensors), None, None, None


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a @ b, summed in total's precision."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b
