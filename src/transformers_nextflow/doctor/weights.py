"""Checks of the weights alone: what training does to every tensor, and what chance and copying never do."""

import re
from collections import defaultdict

import torch
from torch import nn

from .case import Case
from .findings import ENOUGH, SIGNIFICANT, Check, Finding, alignment

COMPARED = 256  # entries of the table whose likenesses are compared
SMALLEST, LARGEST = 48, 512  # rows and columns of a matrix from which on it has a spectrum, and that are looked at
FEWEST_VALUES = 16  # of a row: what 4 bits hold
SAME = 0.999  # correlation of two tensors of which one is a copy


def finite(check: Check, case: Case) -> Finding:
    """Every weight is a finite number."""
    tensors = dict(case.model.named_parameters())
    broken = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if not broken:
        return check.passed(f"all {len(tensors)} tensors are finite")
    return check.failed(
        f"{len(broken)} of {len(tensors)} tensors are not finite: {_some(broken)}",
        "weights not finite",
        "training diverged, a narrow dtype overflowed, or a file was damaged",
        "go back to the last checkpoint without; look at the loss and the gradient norm before it",
        tensors=broken,
    )


def constant(check: Check, case: Case) -> Finding:
    """No tensor holds one number throughout: biases begin at 0 and norms at 1, and the first step of training moves
    every entry by itself."""
    tensors = {name: tensor for name, tensor in case.model.named_parameters() if tensor.numel() > 1}
    constant = [name for name, tensor in tensors.items() if bool((tensor == tensor.flatten()[0]).all())]
    if not constant:
        return check.passed(f"none of {len(tensors)} tensors is one number throughout")
    return check.warned(
        f"{len(constant)} of {len(tensors)} tensors are one number throughout: {_some(constant)}",
        "untrained weights",
        "these tensors were never trained, or were reset or left out when weights were loaded, merged or converted",
        "compare them with the training's own checkpoint",
        tensors=constant,
    )


def spectra(check: Check, case: Case) -> Finding:
    """Singular values of a trained matrix are spread wider than those of the same entries in random order."""
    kinds: dict[str, dict[str, float]] = defaultdict(dict)
    generator = torch.Generator().manual_seed(case.seed)
    for name, weight in matrices(case.model).items():
        if ".vq_model." not in name and min(weight.shape) >= SMALLEST:
            kinds[kind_of(name)][name] = _structure(weight[:LARGEST, :LARGEST].cpu(), generator)
    if not kinds:
        return check.unchecked(f"no matrix has {SMALLEST} rows and columns to tell training from chance")
    usual = {kind: float(torch.tensor(list(each.values())).median()) for kind, each in kinds.items()}
    scores = {name: score for each in kinds.values() for name, score in each.items()}
    random = [name for name, score in scores.items() if score < SIGNIFICANT]
    measured = f"they are {min(scores.values()):.0f} to {max(scores.values()):.0f} deviations of chance wider"
    if all(value < SIGNIFICANT for value in usual.values()):
        cause = "the transformer's weights are as random numbers leave them"
        step = "train it, or load the trained weights: look for warnings of newly initialised ones"
        return check.warned(measured, "never trained", cause, step, deviations=scores)
    if not random:
        return check.passed(measured, deviations=scores)
    return check.warned(
        f"{len(random)} of {len(scores)} matrices are as random numbers: {_some(random)}",
        "re-initialised weights",
        "these weights were not loaded, merged or converted but initialised anew, or their entries are in disorder",
        "look for warnings of newly initialised weights; compare with the training's own checkpoint",
        deviations=scores,
    )


def _structure(weight: torch.Tensor, generator: torch.Generator, draws: int = 8) -> float:
    """How many standard deviations the fourth moment of the singular values lies above that of shuffled entries."""
    flat = weight.flatten()
    orders = (torch.randperm(len(flat), generator=generator) for _ in range(draws))
    moment, *chance = ((w.T @ w).square().sum().double() for w in (weight, *(flat[o].view_as(weight) for o in orders)))
    chance = torch.stack(chance)
    return float((moment - chance.mean()) / chance.std().clamp(min=1e-30))


def copies(check: Check, case: Case) -> Finding:
    """No two matrices of one kind, as of two layers, hold the same numbers."""
    kinds = defaultdict(list)
    for name, weight in matrices(case.model).items():
        kinds[kind_of(name), weight.shape].append((name, weight))
    same = []
    for members in kinds.values():
        rows = torch.stack([_sampled(weight) for _, weight in members])
        rows = rows - rows.mean(dim=1, keepdim=True)
        rows = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)
        alike = ((rows @ rows.T).triu(1) > SAME).nonzero().tolist()
        same += [f"{members[a][0]} and {members[b][0]}" for a, b in alike]
    if not same:
        return check.passed(f"none of {sum(map(len, kinds.values()))} matrices is a copy of another")
    return check.warned(
        f"{len(same)} pairs of matrices are the same: {_some(same)}",
        "copied weights",
        "a layer was written in the place of another when weights were loaded, merged or converted",
        "compare them with the training's own checkpoint",
        pairs=same,
    )


def _sampled(weight: torch.Tensor, most: int = 4096) -> torch.Tensor:
    flat = weight.flatten()
    return flat[torch.linspace(0, len(flat) - 1, min(len(flat), most), device=flat.device).long()]


def digits(check: Check, case: Case) -> Finding:
    """Rows of matrices hold more than {FEWEST_VALUES} different values."""
    coarse, tensors = [], matrices(case.model)
    for name, weight in tensors.items():
        values = [len(row.unique()) for row in weight[:: max(len(weight) // 8, 1)]]
        if weight.shape[1] > 4 * FEWEST_VALUES and sum(values) / len(values) <= FEWEST_VALUES:
            coarse.append(name)
    if not coarse:
        return check.passed(f"so do all of {len(tensors)}")
    return check.warned(
        f"{len(coarse)} of {len(tensors)} have fewer: {_some(coarse)}",
        "weights too coarse",
        "they were rounded to 4 bits or less",
        "quantise the original weights again, to 8 bits, and measure the loss before and after",
        tensors=coarse,
    )


def code_rows(check: Check, case: Case) -> Finding:
    """Entries that are near each other in the vision tokenizer's table are so in the transformer's embeddings, which
    began with them, and in its code head (alignment, against entries in random order)."""
    entries = case.vq_model.quantizer().detach().float().cpu()
    generator = torch.Generator().manual_seed(case.seed)
    chosen = torch.randperm(len(entries), generator=generator)[:COMPARED]
    if len(chosen) < ENOUGH:
        return check.unchecked(f"{len(entries)} codes are too few")
    measured, figures = [], {}
    for name, module in (("code embeddings", case.model.model.code_embeddings), ("code head", case.model.code_head)):
        if module.weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            continue  # quantised
        rows = module.weight.detach().float().cpu()
        aligned = {s: alignment(rows[(chosen + s) % len(rows)], entries[chosen], case.seed) for s in (0, -1, 1)}
        value, score = aligned[0]
        figures[name] = score
        measured.append(f"{name} {value:.2f}, {score:.1f} standard deviations above chance")
        shift = max(aligned, key=lambda s: aligned[s][1])
        step = f"compare the {name} with the vision tokenizer's table, and both with the training's"
        if score <= SIGNIFICANT and aligned[shift][1] > 2 * SIGNIFICANT:
            cause = f"row c belongs to code c{-shift:+d}"
            return check.warned(measured[-1], "wrong code offset", cause, step, **figures)
        if score <= SIGNIFICANT:
            cause = "they are reset or in another order, or the vision tokenizer's table is another than in training"
            return check.warned(measured[-1], f"{name} without order", cause, step, **figures)
    return check.passed("; ".join(measured), **figures)


def matrices(model: nn.Module) -> dict[str, torch.Tensor]:
    """(rows, columns) float32 weights of linear, convolution and embedding layers, by name."""
    return {
        name: parameter.detach().float().flatten(1)
        for name, parameter in model.named_parameters()
        if parameter.ndim >= 2 and parameter.is_floating_point() and parameter.shape[0] > 1
    }


def kind_of(name: str) -> str:
    """A name without its numbers: the same for the same part of all layers."""
    return re.sub(r"\d+", "*", name)


def _some(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (" ..." if len(names) > most else "")
