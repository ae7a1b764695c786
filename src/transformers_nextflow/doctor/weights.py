"""Checks of the weights alone: what training does to every tensor, and what chance and copying never do."""

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping

import torch
from torch import nn

from .case import Case
from .findings import ENOUGH, SIGNIFICANT, Finding, z_score

COMPARED = 256  # entries of the table that are compared at once
SMALLEST, LARGEST = 48, 256  # rows and columns of a matrix from which on it has a spectrum, and that are looked at
FEWEST, CLIPPED = 12, 0.01  # different numbers among 16 neighbours; share of entries that may be at the largest
BEYOND = 64  # times the second largest entry, which an exponent's bit makes of one and training does not
LOST = 0.25  # share of codes' rows that may be like none: those of codes that are not used
LOOKED_AT, SAME = 4096, 0.999  # entries of two tensors, and their correlation if one is a copy


def finite(check: Finding, case: Case) -> Finding:
    """Every weight is a finite number, and no entry of a matrix is far larger than all others."""
    tensors, wide = dict(case.model.named_parameters()), matrices(case.model)
    lead = lambda weight: torch.div(*weight.abs().flatten().topk(2).values).nan_to_num(0, 0)  # noqa: E731
    faults = {
        "weights not finite": (tensors, lambda name: not tensors[name].isfinite().all()),
        "weights out of bounds": (wide, lambda name: lead(wide[name]) > BEYOND),  # of what is not trained both are 0
    }
    return _verdict(check, faults)


def _verdict(check: Finding, faults: Mapping[str, tuple[Collection[str], Callable]], measured: str = "") -> Finding:
    """Faults by those that they are looked for in, by name, and whether a name has it."""
    for fault, (names, has_it) in faults.items():
        if found := [name for name in names if has_it(name)]:
            shown = ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
            return check.verdict(f"{shown} of {len(names)} are not{measured}", {fault: True})
    return check.verdict(f"so are all of {max(len(names) for names, _ in faults.values())}{measured}", {})


def values(check: Finding, case: Case) -> Finding:
    """No tensor, and no row or column of a matrix that is always read, holds one number throughout: biases begin at 0
    and norms at 1, and the first step moves every entry by itself. Few entries are the largest, as they are after
    clipping, and rows of matrices hold more values than 4 bits have."""
    tensors = {name: tensor for name, tensor in case.model.named_parameters() if tensor.numel() > 1}
    every = matrices(case.model)
    wide = [name for name, weight in every.items() if weight.shape[1] > 4 * FEWEST]
    read = [name for name in wide if not re.search("embed|head", name)]
    stacked = [name for name in read if kind_of(name) != name]  # of layers: others may be even
    same = lambda x, dim: (x == x.select(dim, 0).unsqueeze(dim)).all(dim).any()  # noqa: E731
    bounded = lambda x: (x.abs() == x.abs().max()).float().mean()  # noqa: E731
    steps = lambda x: x[:64, : x.shape[1] // 16 * 16].reshape(-1, 16).sort(dim=1).values.diff(dim=1)  # noqa: E731
    # among 16 neighbours of 8 bits are about 15 different numbers, of 4 bits 10, whatever their groups
    different = lambda x: (steps(x) != 0).sum(dim=1).float().mean() + 1  # noqa: E731
    faults = {
        "untrained weights": (tensors, lambda name: same(tensors[name].flatten(), 0)),
        "weights cut off": (read, lambda name: same(every[name], 0) or same(every[name], 1)),
        "weights clipped": (wide, lambda name: bounded(every[name]) > CLIPPED),
        "weights too coarse": (stacked, lambda name: different(every[name]) < FEWEST),
    }
    return _verdict(check, faults)


def copies(check: Finding, case: Case) -> Finding:
    """No two matrices of one kind, as of two layers, hold the same numbers."""
    kinds, same, every = defaultdict(dict), set(), matrices(case.model)
    for name, weight in every.items():
        kinds[kind_of(name), weight.shape][name] = weight.flatten()[:LOOKED_AT]
    for members in kinds.values():
        alike = torch.corrcoef(torch.stack([*members.values()])).reshape(len(members), -1) > SAME
        same |= {name for name, row in zip(members, alike.triu(1).T) if row.any()}  # as one before it
    return _verdict(check, {"copied weights": (every, same.__contains__)})


def spectra(check: Finding, case: Case) -> Finding:
    """Singular values of a trained matrix or kernel are others than those of the same entries in random order, and its
    small ones are no tenth of its kind's."""
    generator = torch.Generator().manual_seed(case.seed)
    found = {
        name: _structure(weight[:LARGEST, :LARGEST].cpu(), generator)
        for name, weight in matrices(case.model).items()
        if min(weight.shape) >= SMALLEST and (".vq_model." not in name or case.model.get_parameter(name).ndim > 2)
    }
    if not found:
        return check.unchecked(f"no matrix has {SMALLEST} rows and columns to tell training from chance")
    scores, small = ({name: pair[at] for name, pair in found.items()} for at in (0, 1))
    usual = usual_of_kind(small)
    faults = {
        "weights of low rank": (found, lambda name: small[name] < usual[name] / 10),
        "re-initialised weights": (found, lambda name: scores[name] < SIGNIFICANT),
    }
    return _verdict(check, faults, f", {min(scores.values()):.0f} to {max(scores.values()):.0f} deviations apart")


def _structure(weight: torch.Tensor, generator: torch.Generator, draws: int = 16) -> tuple[float, float]:
    """By how many deviations singular values lie further from shuffled entries' than these do; a small one's share."""
    shuffled = [weight.flatten()[torch.randperm(weight.numel(), generator=generator)] for _ in range(draws)]
    chance, own = torch.linalg.svdvals(torch.stack(shuffled).view(draws, *weight.shape)), torch.linalg.svdvals(weight)
    mean = chance.mean(dim=0)  # AdamW spreads them wider, Muon may spread them less
    usual = (chance - mean).norm(dim=1) * (draws / (draws - 1)) ** 0.5  # each has its share in the mean
    score, small = ((own - mean).norm() - usual.mean()) / usual.std().clamp(min=1e-30), int(0.9 * len(mean))
    return float(score), float(own[small] / mean[small].clamp(min=1e-30))


def code_rows(check: Finding, case: Case) -> Finding:
    """Entries that are near each other in the vision tokenizer's table are so in the transformer's embeddings, which
    began with them, and in its code head, in every part of both."""
    entries = case.vq_model.quantizer().detach().float().cpu()
    if len(entries) < ENOUGH:
        return check.unchecked(f"{len(entries)} codes are too few")
    measured, faults = [], {}
    for name, module in (("code embeddings", case.model.model.code_embeddings), ("code head", case.model.code_head)):
        rows = module.weight.detach().float().cpu()
        own_V, *shifted = (_order(rows.roll(-shift, 0), entries) for shift in (0, -1, 1))
        of_parts, lost = [z_score(part) for part in own_V.split(COMPARED)], float((own_V < 1).float().mean())
        at = f"in the {COMPARED} rows from {COMPARED * of_parts.index(min(of_parts))} on, {lost:.0%} of all rows as by"
        measured.append(f"{name} {min(of_parts):.0f} deviations above chance {at} chance")
        is_shifted = z_score(own_V) <= SIGNIFICANT < max(map(z_score, shifted))
        faults["wrong code offset"] = faults.get("wrong code offset") or is_shifted
        faults[f"{name} without order"] = min(of_parts) <= SIGNIFICANT
        faults[f"{name} without order in part"] = lost > LOST
    return check.verdict("; ".join(measured), faults)


def _order(rows_VD: torch.Tensor, entries_VC: torch.Tensor) -> torch.Tensor:
    """(V,) how well a row's likenesses to its neighbours fit its entry's, in deviations of what fits other entries."""
    scores = []
    for pair in zip(rows_VD.split(COMPARED), entries_VC.split(COMPARED)):
        profiles = []
        for part in pair:
            likeness = (part - part.mean(0)) @ (part - part.mean(0)).T
            likeness = likeness.fill_diagonal_(0) - likeness.mean(1, keepdim=True)
            profiles.append(nn.functional.normalize(likeness, dim=1))
        fit = profiles[0] @ profiles[1].T
        scores.append((fit.diagonal() - fit.mean(1)) / fit.std(1).clamp(min=1e-12))
    return torch.cat(scores)


def matrices(model: nn.Module) -> dict[str, torch.Tensor]:
    """(rows, columns) float32 weights of linear, convolution and embedding layers of more than one row, by name."""
    named = [(name, x.detach()) for name, x in model.named_parameters() if x.ndim >= 2 and x.is_floating_point()]
    return {name: weight.float().flatten(1) for name, weight in named if len(weight) > 1}


def kind_of(name: str) -> str:
    """A name without its numbers: the same for the same part of all layers."""
    return re.sub(r"\d+", "*", name)


def usual_of_kind(values: dict[str, float]) -> dict[str, float]:
    """By name, the median of its kind."""
    kinds = defaultdict(list)
    for name, value in values.items():
        kinds[kind_of(name)].append(value)
    return {name: float(torch.tensor(kinds[kind_of(name)]).median()) for name in values}
