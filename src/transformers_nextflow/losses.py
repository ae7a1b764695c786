"""Targets, weights, weighted cross-entropy over the joint softmax of text and code rows (NextFlow sec. 2.2, eq. 2).

Shape suffixes: B batch, L sequence, N supervised positions, D hidden, V all rows (text, then codes).
"""

import torch
import torch.nn.functional as F

from .layout import SequenceLayout

IGNORE = -100


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
        scale_weights = torch.tensor(image.schedule.weights(alpha), device=weights_BL.device)
        lengths = torch.tensor(image.schedule.lengths, device=weights_BL.device)
        weights_BL[image.row, image.slots] = scale_weights.repeat_interleave(lengths)
    return targets_BL, weights_BL.masked_fill(targets_BL == IGNORE, 0.0)


def joint_cross_entropy(
    hidden_ND: torch.Tensor, text_rows: torch.Tensor, code_rows: torch.Tensor, targets_N: torch.Tensor
) -> torch.Tensor:
    """(N,) float32 cross-entropy of each target under one softmax over text and code rows."""
    logits_NV = torch.cat([F.linear(hidden_ND, text_rows), F.linear(hidden_ND, code_rows)], dim=-1)
    return F.cross_entropy(logits_NV.float(), targets_N, reduction="none")
