"""Checks of the weights alone: what training does to every tensor, and what chance and copying never do."""

import re
from collections import defaultdict

import torch
from torch import nn

from .case import Case
from .findings import ENOUGH, SIGNIFICANT, Check, Finding, z_score

COMPARE = "compare weights and config.json with the training's own checkpoint"
COMPARED = 256  # entries of the table that are compared at once
SMALLEST, LARGEST = 48, 256  # rows and columns of a matrix from which on it has a spectrum, and that are looked at
FEWEST, CLIPPED = 12, 0.01  # different numbers among 16 neighbours; share of entries that may be at the largest
LOST = 0.25  # share of codes' rows that may be like none: those of codes that are not used
LOOKED_AT, SAME = 4096, 0.999  # entries of two tensors, and their correlation if one is a copy


def finite(check: Check, case: Case) -> Finding:
    """Every weight is a finite number."""
    tensors = dict(case.model.named_parameters())
    broken = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if not broken:
        return check.passed(f"all {len(tensors)} tensors are finite")
    cause = "training diverged, a narrow dtype overflowed, or a file was damaged"
    step = "go back to the last checkpoint without; look at the loss and the gradient norm before it"
    return check.failed(f"{_some(broken)} of {len(tensors)} are not", "weights not finite", cause, step)


def values(check: Check, case: Case) -> Finding:
    """No tensor, and no row or column of a matrix that is always read, holds one number throughout: biases begin at 0
    and norms at 1, and the first step moves every entry by itself. Few entries are the largest, as they are after
    clipping, and rows of matrices hold more values than 4 bits have."""
    tensors = {name: tensor for name, tensor in case.model.named_parameters() if tensor.numel() > 1}
    wide = {name: weight for name, weight in matrices(case.model).items() if weight.shape[1] > 4 * FEWEST}
    read = {name: weight for name, weight in wide.items() if not re.search("embed|head", name)}
    stacked = {name: weight for name, weight in read.items() if kind_of(name) != name}  # of layers: others may be even
    cut = lambda x: (x == x[:1]).all(0).any() or (x == x[:, :1]).all(1).any()  # noqa: E731
    kinds = (
        ("untrained weights", "one number throughout", tensors, lambda x: (x == x.flatten()[0]).all()),
        ("weights cut off", "one number in a row or column", read, cut),
        ("weights clipped", "often at one bound", wide, lambda x: (x.abs() == x.abs().max()).float().mean() > CLIPPED),
        ("weights too coarse", "of 4 bits or less", stacked, lambda x: _different(x[:64]) < FEWEST),
    )
    for fault, what, members, is_so in kinds:
        if found := [name for name, weight in members.items() if is_so(weight)]:
            cause = "they were never trained, or reset, cut, rounded or left out in loading, merging or conversion"
            return check.warned(f"{_some(found)} of {len(members)} are {what}", fault, cause, COMPARE)
    return check.passed(f"so do all of {len(tensors)} tensors")


def _different(weight: torch.Tensor) -> float:
    """How many different numbers are among 16 neighbours: about 15 of 8 bits, 10 of 4, whatever their groups."""
    rows = weight[:, : weight.shape[1] // 16 * 16].reshape(-1, 16).sort(dim=1).values
    return float((rows.diff(dim=1) != 0).sum(dim=1).float().mean()) + 1


def spectra(check: Check, case: Case) -> Finding:
    """Singular values of a trained matrix or kernel are others than those of the same entries in random order, and its
    small ones are no tenth of its kind's."""
    kinds: dict[str, dict[str, tuple[float, float]]] = defaultdict(dict)
    generator = torch.Generator().manual_seed(case.seed)
    for name, weight in matrices(case.model).items():
        if min(weight.shape) >= SMALLEST and (".vq_model." not in name or case.model.get_parameter(name).ndim > 2):
            kinds[kind_of(name)][name] = _structure(weight[:LARGEST, :LARGEST].cpu(), generator)
    if not kinds:
        return check.unchecked(f"no matrix has {SMALLEST} rows and columns to tell training from chance")
    usual = {kind: torch.tensor([*each.values()]).median(dim=0).values.tolist() for kind, each in kinds.items()}
    every = {name: found for each in kinds.values() for name, found in each.items()}
    if low := [name for name, (_, small) in every.items() if small < usual[kind_of(name)][1] / 10]:
        cause = "they were compressed, cut, or replaced by a product of small matrices"
        return check.warned(f"{_some(low)} of {len(every)} matrices are", "weights of low rank", cause, COMPARE)
    scores = {name: score for name, (score, _) in every.items()}
    random = [name for name, score in scores.items() if score < SIGNIFICANT]
    measured = f"they are {min(scores.values()):.0f} to {max(scores.values()):.0f} deviations of chance apart"
    if not random:
        return check.passed(measured, deviations=scores)
    measured = f"{_some(random)} of {len(scores)} matrices are not"
    cause = "they were not loaded, merged or converted but initialised anew, or their entries are in disorder"
    return check.warned(measured, "re-initialised weights", cause, COMPARE, deviations=scores)


def _structure(weight: torch.Tensor, generator: torch.Generator, draws: int = 16) -> tuple[float, float]:
    """By how many deviations singular values lie further from shuffled entries' than these do; a small one's share."""
    shuffled = [weight.flatten()[torch.randperm(weight.numel(), generator=generator)] for _ in range(draws)]
    chance, own = torch.linalg.svdvals(torch.stack(shuffled).view(draws, *weight.shape)), torch.linalg.svdvals(weight)
    mean = chance.mean(dim=0)  # AdamW spreads them wider, Muon may spread them less
    usual = (chance - mean).norm(dim=1) * (draws / (draws - 1)) ** 0.5  # each has its share in the mean
    score, small = ((own - mean).norm() - usual.mean()) / usual.std().clamp(min=1e-30), int(0.9 * len(mean))
    return float(score), float(own[small] / mean[small].clamp(min=1e-30))


def copies(check: Check, case: Case) -> Finding:
    """No two matrices of one kind, as of two layers, hold the same numbers."""
    kinds = defaultdict(list)
    for name, weight in matrices(case.model).items():
        kinds[kind_of(name), weight.shape].append((name, weight))
    same = []
    for members in kinds.values():
        rows = torch.stack([weight.flatten()[:LOOKED_AT] for _, weight in members])
        rows = rows - rows.mean(dim=1, keepdim=True)
        rows = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)
        alike = ((rows @ rows.T).triu(1) > SAME).nonzero().tolist()
        same += [f"{members[a][0]} and {members[b][0]}" for a, b in alike]
    if not same:
        return check.passed(f"none of {sum(map(len, kinds.values()))} matrices is a copy of another")
    cause = "a layer was written in the place of another when weights were loaded, merged or converted"
    return check.warned(f"{_some(same)} are the same", "copied weights", cause, COMPARE)


def code_rows(check: Check, case: Case) -> Finding:
    """Entries that are near each other in the vision tokenizer's table are so in the transformer's embeddings, which
    began with them, and in its code head, in every part of both."""
    entries = case.vq_model.quantizer().detach().float().cpu()
    if len(entries) < ENOUGH:
        return check.unchecked(f"{len(entries)} codes are too few")
    measured = []
    for name, module in (("code embeddings", case.model.model.code_embeddings), ("code head", case.model.code_head)):
        rows = module.weight.detach().float().cpu()
        scores = {shift: _order(rows.roll(-shift, 0), entries) for shift in (0, -1, 1)}
        own_V, shift = scores[0], max(scores, key=lambda shift: float(scores[shift].mean()))
        of_parts = [z_score(part) for part in own_V.split(COMPARED)]
        measured.append(f"{name} {min(of_parts):.0f} deviations above chance")
        if shift and z_score(own_V) <= SIGNIFICANT < z_score(scores[shift]):
            return check.warned(measured[-1], "wrong code offset", f"row c belongs to code c{-shift:+d}", COMPARE)
        if min(of_parts) <= SIGNIFICANT:
            cause = "they are reset or in another order, or the vision tokenizer's table is another than in training"
            measured[-1] += f", of {COMPARED} rows from {COMPARED * of_parts.index(min(of_parts))} on"
            return check.warned(measured[-1], f"{name} without order", cause, COMPARE)
        if (lost := float((own_V < 1).float().mean())) > LOST:
            cause = "entries of the table were restarted after the transformer was trained, or these rows were reset"
            measured[-1] += f", {lost:.0%} of the rows as by chance"
            return check.warned(measured[-1], f"{name} without order in part", cause, COMPARE)
    return check.passed("; ".join(measured))


def _order(rows_VD: torch.Tensor, entries_VC: torch.Tensor) -> torch.Tensor:
    """(V,) how well a row's likenesses to its neighbours fit its entry's, in deviations of what fits other entries."""
    scores = []
    for pair in zip(rows_VD.split(COMPARED), entries_VC.split(COMPARED)):
        profiles = []
        for part in pair:
            likeness = (part - part.mean(0)) @ (part - part.mean(0)).T
            likeness = likeness.fill_diagonal_(0) - likeness.mean(1, keepdim=True)
            profiles.append(likeness / likeness.norm(dim=1, keepdim=True).clamp(min=1e-12))
        fit = profiles[0] @ profiles[1].T
        scores.append((fit.diagonal() - fit.mean(1)) / fit.std(1).clamp(min=1e-12))
    return torch.cat(scores)


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
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
