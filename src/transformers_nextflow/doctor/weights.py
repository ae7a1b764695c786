"""Checks of the weights themselves."""

import torch

from .case import Case
from .findings import ENOUGH, SIGNIFICANT, WARNING, Check, Finding, Verdict, alignment

COMPARED = 256  # entries of the table


def check_finite(case: Case) -> Finding:
    """No weight is infinite or not a number."""
    check = Check("finite weights", "transformer", "every weight is a finite number")
    tensors = dict(case.model.named_parameters())
    broken = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if not broken:
        return check.passed(f"all {len(tensors)} tensors are finite")
    verdict = Verdict(
        "damaged weights",
        "training diverged, a narrow dtype overflowed, or a file was damaged",
        "go back to the last checkpoint without; look at the loss and the gradient norm before it",
    )
    return check.failed(f"{len(broken)} of {len(tensors)} tensors are not finite, {broken[0]} among them", verdict)


def check_trained(case: Case) -> Finding:
    """No tensor is one number throughout, as training leaves none."""
    check = Check(
        "trained weights",
        "transformer",
        "no tensor holds one number throughout: biases begin at 0 and norms at 1, and the first step of training "
        "moves every entry by itself",
    )
    tensors = {name: tensor for name, tensor in case.model.named_parameters() if tensor.numel() > 1}
    constant = [name for name, tensor in tensors.items() if bool((tensor == tensor.flatten()[0]).all())]
    if not constant:
        return check.passed(f"none of {len(tensors)} tensors is one number throughout")
    shown = ", ".join(constant[:3]) + (" ..." if len(constant) > 3 else "")
    verdict = Verdict(
        "untrained weights",
        "these tensors were never trained, or were reset or left out when weights were loaded, merged or converted",
        "compare them with the training's own checkpoint",
    )
    return check.failed(
        f"{len(constant)} of {len(tensors)} tensors are one number throughout: {shown}",
        verdict,
        WARNING,
        constant=constant,
    )


def check_code_embeddings(case: Case) -> Finding:
    """Codes that are alike to the vision tokenizer are alike to the transformer, which began with its entries."""
    check = Check(
        "code embeddings",
        "transformer",
        "entries that are near each other in the vision tokenizer's table are so in the transformer's copy, which "
        "training moves a little (alignment of both, against entries in random order)",
    )
    rows, entries = case.model.model.code_embeddings.weight.detach(), case.codebook
    generator = torch.Generator().manual_seed(case.seed)
    chosen = torch.randperm(len(rows), generator=generator)[:COMPARED].to(rows.device)
    if len(chosen) < ENOUGH:
        return check.noted("the table holds too few entries to say")
    step = "compare `code_embeddings` with the vision tokenizer's codebook, and both with the training's"
    aligned = {
        shift: alignment(rows[(chosen + shift) % len(rows)].float().cpu(), entries[chosen].float().cpu(), case.seed)
        for shift in (0, -1, 1)
    }
    value, score = aligned[0]
    for shift in (-1, 1):
        other, _ = aligned[shift]
        if other > max(value, 0.5):
            verdict = Verdict("wrong code offset", f"row c belongs to code c{-shift:+d}", step)
            return check.failed(f"alignment {value:.2f}, {other:.2f} for rows one apart", verdict, WARNING)
    measured = f"alignment {value:.2f}, {score:.1f} standard deviations above chance"
    if score > SIGNIFICANT:
        return check.passed(measured, deviations=score)
    verdict = Verdict(
        "code embeddings lost",
        "the embeddings are not those of the vision tokenizer's entries: reset, in another order, or of another "
        "codebook",
        step,
    )
    return check.failed(measured, verdict, WARNING, deviations=score)
