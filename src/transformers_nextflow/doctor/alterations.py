"""Damage shows as this: something else than what the checkpoint holds would do better.

In a trained model no part is better at another size, and every matrix matters: with its outputs in another order, the
loss rises. Both hold whatever the model was trained on, and both end where a part was reset, permuted, scaled,
exchanged, or taken from elsewhere. Alterations are hooks on outputs of modules, so they work on weights of any kind,
sharded and quantised ones too, and leave no trace.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .findings import ENOUGH, MATERIAL, SIGNIFICANT, Check, Finding, z_score
from .weights import COMPARE, kind_of

FEW = 3  # rows that alterations are first tried on
CONFIRMED = 4  # of them, which are tried on all rows

Measure = Callable[[Sequence], torch.Tensor]
"""(R,) losses of rows, lower is better."""


@dataclass(frozen=True)
class Alteration:
    """One thing that a checkpoint might have had otherwise: in words, the fault and its cause if the altered model is
    better, and a context in which it is altered."""

    what: str
    fault: str
    cause: str
    apply: Callable[[], AbstractContextManager]


@contextmanager
def hooked(change: Callable, *modules: nn.Module) -> Iterator[None]:
    """Every output of some modules changed, by module, inputs and output."""
    handles = [module.register_forward_hook(change) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def shuffled(module: nn.Module, seed: int) -> AbstractContextManager:
    """The module's output features in another order, as with the rows of its weight permuted."""
    dim = 1 if isinstance(module, nn.Conv2d) else -1

    def change(module: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        order = torch.randperm(output.shape[dim], generator=torch.Generator().manual_seed(seed))
        return output.index_select(dim, order.to(output.device))

    return hooked(change, module)


def times(factor: float, *modules: nn.Module) -> AbstractContextManager:
    return hooked(lambda module, inputs, output: output * factor, *modules)


@contextmanager
def setting(owner: Any, name: str, value: Any) -> Iterator[None]:
    kept = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, kept)


@contextmanager
def exchanged(layers: nn.ModuleList, first: int, second: int) -> Iterator[None]:
    a, b = layers[first], layers[second]
    layers[first], layers[second] = b, a
    try:
        yield
    finally:
        layers[first], layers[second] = a, b


def resized(name: str, module: nn.Module) -> Iterator[Alteration]:
    """A module's output at half, and at twice its size."""
    for factor, size, much in ((0.5, "large", "much"), (2.0, "small", "little")):
        cause = f"{name} adds too {much}: its weights, or those before it, were scaled, reset, or come from elsewhere"
        apply = partial(times, factor, module)
        yield Alteration(f"with {name} times {factor:g}", f"weights too {size}", cause, apply)


def levelled(name: str, module: nn.Module) -> Alteration:
    """A norm with one weight throughout, or an embedding with one row: their means."""
    weight = module.weight.detach()
    mean, what = weight.mean(dim=0), "weight" if weight.ndim == 1 else "row"
    even = (lambda output: output / weight * mean) if weight.ndim == 1 else mean.expand_as
    apply = partial(hooked, lambda module, inputs, output: even(output), module)
    cause = f"{name}: its {what}s are in another order than in training, were reset, or come from elsewhere"
    return Alteration(f"with one {what} throughout in {name}", f"{what}s in disorder", cause, apply)


def reordered(name: str, module: nn.Embedding) -> Iterator[Alteration]:
    """An embedding's rows the other way round, or one further."""
    last = module.num_embeddings - 1
    cause = f"{name}: its rows are in another order than in training, or ids are off"
    ways = {"in reverse": lambda ids: last - ids, "one on": lambda ids: ids + 1, "one back": lambda ids: ids - 1}
    for what, way in ways.items():
        change = lambda table, inputs, _, way=way: F.embedding(way(inputs[0]).clamp(0, last), table.weight)  # noqa: E731
        apply = partial(hooked, change, module)
        yield Alteration(f"with the rows of {name} {what}", "rows in disorder", cause, apply)


def search(measure: Measure, rows: Sequence, alterations: Iterable[Alteration], before: float, least: float):
    """The best alteration, where one is better than none, by more than chance and by `least`: it, and the mean losses
    as it is and altered. All are tried on a `FEW` rows, whose mean is `before`, the most promising on all."""
    gains = [(before - float(_altered(measure, rows[:FEW], each.apply()).mean()), each) for each in alterations]
    promising = sorted((pair for pair in gains if pair[0] > least), key=lambda pair: -pair[0])[:CONFIRMED]
    own_R, found = measure(rows) if promising else None, []
    for _, alteration in promising:
        gain_R = own_R - _altered(measure, rows, alteration.apply())
        if z_score(gain_R) > SIGNIFICANT and float(gain_R.mean()) > least:
            found.append((alteration, float(own_R.mean()), float((own_R - gain_R).mean())))
    return min(found, key=lambda better: better[2], default=None)


def _altered(measure: Measure, rows: Sequence, alteration: AbstractContextManager) -> torch.Tensor:
    with alteration:
        return measure(rows)


def without_effect(
    measure: Measure, rows: Sequence, modules: dict[str, nn.Module], seed: int, before: float, least: float
) -> dict[str, float]:
    """Modules whose output features can be in another order without loss, or by chance, and at a tenth of what this
    costs others of their kind, where that is `least` and more; with what it costs."""
    own_R, found = None, {}
    kinds: dict[str, list[str]] = defaultdict(list)
    for name in modules:
        kinds[kind_of(name)].append(name)
    for names in kinds.values():
        altered = {name: _altered(measure, rows[:FEW], shuffled(modules[name], seed)) for name in names}
        rises = {name: float(losses.mean()) - before for name, losses in altered.items()}
        usual = float(torch.tensor(list(rises.values())).median())
        for name in (name for name, rise in rises.items() if rise < usual / 10 and usual > least and len(rises) > 2):
            own_R = measure(rows) if own_R is None else own_R
            rise_R = _altered(measure, rows, shuffled(modules[name], seed)) - own_R
            if float(rise_R.mean()) < usual / 10 and z_score(rise_R) < SIGNIFICANT:
                found[name] = float(rise_R.mean())
    return found


def judge(
    check: Check,
    measure: Measure,
    rows: Sequence,
    whole: list[Alteration],
    resizable: dict,
    movable: dict,
    seed: int,
    hopeless: float = math.inf,
) -> Finding:
    """The finding of a model's parts.

    Args:
        whole: alterations that concern more than one part.
        resizable, movable: modules whose outputs are tried at other sizes, and in other orders, by name.
        hopeless: loss of a model so bad that no order of anything would matter.
    """
    if len(rows) < ENOUGH:
        return check.unchecked(f"{len(rows)} rows are too few")
    before = float(measure(rows[:FEW]).mean())
    least = MATERIAL * abs(before)
    better = search(measure, rows, whole, before, least)
    idle = {}
    if better is None and before < hopeless:
        idle = without_effect(measure, rows, movable, seed, before, least / 4)
    if idle:
        names = ", ".join(idle)
        measured = f"the outputs of {names} can be in another order at {max(idle.values()):+.3f} ({len(rows)} rows)"
        cause = f"{names}: weights were reset, their rows are in disorder, or they come from another model"
        return check.warned(measured, "weights without effect", cause, COMPARE)
    if better is None:
        sizes = [each for name, module in resizable.items() for each in resized(name, module)]
        better = search(measure, rows, sizes, before, least)
    if better is None:
        return check.passed(f"so it is with {len({*resizable, *movable})} parts over {len(rows)} rows")
    alteration, before, after = better
    measured = f"{before:.2f} as it is, {after:.2f} {alteration.what} ({len(rows)} rows)"
    return check.warned(measured, alteration.fault, alteration.cause, COMPARE)
