"""Whether something else than what the checkpoint holds would do better, and the check of the transformer by it.

Alterations are hooks on outputs of modules, so they work on weights of any kind, sharded and quantised ones too, and
leave no trace.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from heapq import nlargest
from itertools import combinations, starmap
from operator import itemgetter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN

from .case import Case
from .findings import ENOUGH, MATERIAL, SIGNIFICANT, Finding, z_score
from .weights import usual_of_kind

MOST_LAYERS = 8  # every two of which are exchanged
KNOWS = 0.8  # of the loss of a model that knows nothing
# of all layers; other matrices are at another size where these are
FACTORS = {"q_proj": (0.125, 0.5, 2, 8), "o_proj": (0, 0.5, 2, 8), "down_proj": (0, 0.125, 0.5, 2, 8)}
FEW, CONFIRMED, ALMOST = 3, 4, 0.8  # rows tried first; alterations then tried on all; share of the best that equals it


class Alteration(NamedTuple):
    """One thing that a checkpoint might have had otherwise: in words, the fault if the altered model is better, and a
    context in which it is altered."""

    what: str
    fault: str
    apply: Callable[[], AbstractContextManager]

    @classmethod
    def of(cls, what: str, fault: str, change: Callable, *modules: nn.Module) -> "Alteration":
        """Of what modules give, see [`hooked`]."""
        return cls(what, fault, partial(hooked, change, *modules))


@contextmanager
def hooked(change: Callable, *modules: nn.Module) -> Iterator[None]:
    """Every output of some modules changed, by module, inputs and output."""
    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_hook(change).remove)
        yield


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
def setting(*changes: tuple[Any, str, Any]) -> Iterator[None]:
    """Attributes of owners, by name, with other values."""
    with ExitStack() as stack:
        for owner, name, value in changes:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        yield


def exchanged(first: str, second: str, *owners: nn.Module) -> AbstractContextManager:
    """Two modules of each owner in each other's place."""
    names = (first, second), (second, first)
    return setting(*[(owner, one, getattr(owner, other)) for owner in owners for one, other in names])


def headed(decoder: nn.Module, size: int) -> AbstractContextManager:
    """All layers with heads of another size, and the rotary frequencies of the same base for it."""
    rotary, half = decoder.rotary_emb, size // 2
    places = torch.arange(half, device=rotary.inv_freq.device) * (len(rotary.inv_freq) / half)
    frequencies = rotary.inv_freq[0] * (rotary.inv_freq[1] / rotary.inv_freq[0]) ** places
    of_heads = [("head_dim", size), ("scaling", size**-0.5)]
    of_layers = [(layer.self_attn, *each) for layer in decoder.layers for each in of_heads]
    return setting((rotary, "inv_freq", frequencies), (rotary, "mrope_section", [1] * half), *of_layers)


def resized(name: str, module: nn.Module) -> Iterator[Alteration]:
    """A module's output at half, and at twice its size."""
    for factor, size in ((0.5, "large"), (2.0, "small")):
        yield Alteration(f"with {name} times {factor:g}", f"weights too {size}", partial(times, factor, module))


def levelled(name: str, module: nn.Module) -> Alteration:
    """A norm with one weight throughout, or an embedding with one row: their means."""
    weight = module.weight.detach()
    mean, what = weight.mean(dim=0), "weight" if weight.ndim == 1 else "row"
    even = (lambda output: output / weight * mean) if weight.ndim == 1 else mean.expand_as
    change = lambda module, inputs, output: even(output)  # noqa: E731
    return Alteration.of(f"with one {what} throughout in {name}", f"{what}s in disorder", change, module)


def reordered(name: str, module: nn.Embedding) -> Iterator[Alteration]:
    """An embedding's rows the other way round, or one further."""
    last = module.num_embeddings - 1
    ways = {"in reverse": lambda ids: last - ids, "one on": lambda ids: ids + 1, "one back": lambda ids: ids - 1}
    for what, way in ways.items():
        change = lambda table, inputs, _, way=way: F.embedding(way(inputs[0]).clamp(0, last), table.weight)  # noqa: E731
        yield Alteration.of(f"with the rows of {name} {what}", "rows in disorder", change, module)


def judge(
    check: Finding, measure: Callable, rows: Sequence, whole, resizable, movable, seed: int, hopeless=math.inf
) -> Finding:
    """The finding of a model's parts by the (R,) losses that `measure` gives of rows: of alterations of the `whole`,
    of modules at other sizes, and in other orders, by name; of a model as bad as `hopeless` no order matters."""
    if len(rows) < ENOUGH:
        return check.unchecked(f"{len(rows)} rows are too few")
    own_R = measure(rows)
    least = MATERIAL * float(own_R.mean().abs())

    def gain(altered: AbstractContextManager, count: int | None = None) -> torch.Tensor:
        with altered:
            return own_R[:count] - measure(rows[:count])

    def best(alterations: Iterable[Alteration]) -> tuple[Alteration, float] | None:
        """The one that surely saves most, of those that promise most on few rows; of almost equal ones the first."""
        few = [(each, float(gain(each.apply(), FEW).mean())) for each in alterations]
        promising = nlargest(CONFIRMED, [pair for pair in few if pair[1] > least], key=itemgetter(1))
        gains = [(pair[0], gain(pair[0].apply())) for pair in few if pair in promising]
        sure = [(each, float(gain_R.mean())) for each, gain_R in gains if z_score(gain_R) > SIGNIFICANT]
        enough = max([least, *(ALMOST * saved for _, saved in sure)])
        return next((pair for pair in sure if pair[1] > enough), None)

    measured = f"{len({*resizable, *movable})} parts over {len(rows)} rows, loss {float(own_R.mean()):.2f}"
    better = best(whole)
    if better is None and float(own_R.mean()) < hopeless:
        rises = {name: -float(gain(shuffled(module, seed), FEW).mean()) for name, module in movable.items()}
        usual, idle = usual_of_kind(rises), {}
        for name in (name for name in rises if rises[name] < usual[name] / 10 and usual[name] > least / 4):
            gain_R = gain(shuffled(movable[name], seed))
            if -gain_R.mean() < usual[name] / 10 and -z_score(gain_R) < SIGNIFICANT:
                idle[name] = -float(gain_R.mean())
        if idle:
            measured += f"; outputs of {', '.join(idle)} can be in another order at {max(idle.values()):+.3f}"
            return check.verdict(measured, {"weights without effect": True})
    better = better or best(each for name, module in resizable.items() for each in resized(name, module))
    measured += f", {better[1]:.2f} less {better[0].what}" if better else ""
    return check.verdict(measured, {better[0].fault: True} if better else {})


def parts(check: Finding, case: Case) -> Finding:
    """No part predicts better at half or twice its size, no norm or scale at its mean or another's, no two layers
    exchanged, not all of them without biases, attention or MLP, no setting of config.json otherwise; and no matrix can
    have its outputs in another order without loss, where the model is better than one that knows nothing."""
    inner = case.model.model
    names = ("connector", "code_embeddings", "scale_embedding", "scale_embedding.index", "scale_embedding.length")
    named = {f"layers.{name}": module for name, module in inner.language_model.layers.named_modules()}
    norms = {name: module for name, module in named.items() if name.endswith("layernorm")}
    adding = {name: module for name, module in named.items() if name.endswith(("o_proj", "down_proj"))}
    movable = {name: module for name, module in named.items() if isinstance(module, nn.Linear)}
    index = {"scale_embedding.index": inner.scale_embedding.index}
    level = starmap(levelled, {**norms, **index, "norm": inner.language_model.norm}.items())
    whole = [*_other_settings(case), *_of_all_layers(case), *level, *reordered(*index.popitem())]
    resizable = {**{name: inner.get_submodule(name) for name in names}, **adding, **norms}
    hopeless = KNOWS * math.log(inner.config.vq_config.codebook_size)
    return judge(check, case.losses, case.rows, whole, resizable, movable, case.seed, hopeless)


def _other_settings(case: Case) -> Iterator[Alteration]:
    """Settings of config.json that weights do not show."""
    config, decoder = case.config, case.model.model.language_model
    rotary, attention = decoder.rotary_emb, decoder.layers[0].self_attn
    half = len(rotary.inv_freq)
    first, second = half // 4, 3 * half // 8
    places = torch.arange(half, device=rotary.inv_freq.device) / half
    is_default, bases = rotary.rope_type == "default", (1e-3, 1e-2, 0.1, 10, 100, 1e3)
    others = [rotary.inv_freq * factor**-places for factor in bases if is_default]
    others += [rotary.inv_freq * factor for factor in (0.125, 0.25, 0.5, 2, 4, 8)]
    settings = [
        *(("feature mode", config, "feature_mode", mode) for mode in ("accumulated", "residual")),
        ("position scale", config, "position_scale", None),
        ("rotary sections", rotary, "mrope_section", [1] * half),
        ("rotary sections", rotary, "mrope_section", [first, second, half - first - second]),
        *(("rotary base", rotary, "inv_freq", frequencies) for frequencies in others),
    ]
    for name, *changed in settings:
        yield Alteration(f"with another {name}", f"wrong {name}", partial(setting, tuple(changed)))
    for size in (attention.head_dim // 2, 2 * attention.head_dim):
        if is_default and size % 4 == 0 and config.text_config.num_key_value_heads * attention.head_dim % size == 0:
            yield Alteration(f"with heads of {size}", "wrong number of heads", partial(headed, decoder, size))
    for name in ("silu", "gelu", "relu"):
        change = lambda module, inputs, _, name=name: ACT2FN[name](inputs[0])  # noqa: E731
        activations = [layer.mlp.act_fn for layer in decoder.layers]
        yield Alteration.of(f"with the activation {name}", "wrong activation", change, *activations)


def _of_all_layers(case: Case) -> Iterator[Alteration]:
    """What conversion and merging get wrong in all layers at once: sizes, biases, square matrices, the rotary order of
    queries and keys, halves of code embeddings; and every two layers, of many neighbours, in each other's place."""
    inner = case.model.model
    layers, table, kinds = inner.language_model.layers, inner.code_embeddings, defaultdict(list)
    apply: Callable[[], AbstractContextManager]
    change: Callable
    for name, module in layers.named_modules():
        kinds[name.rpartition(".")[2]].append(module)
    for kind, factors in FACTORS.items():
        for factor in factors:
            fault = "wrong scale of weights" if factor else f"damaged {'MLPs' if kind == 'down_proj' else 'attention'}"
            apply = partial(times, factor, *kinds[kind])
            yield Alteration(f"with {kind} of all layers times {factor:g}", fault, apply)
    shapes = {kind: members[0].weight.shape for kind, members in kinds.items() if isinstance(members[0], nn.Linear)}
    for a, b in combinations(shapes, 2):
        owners = [layer.self_attn if hasattr(layer.self_attn, a) else layer.mlp for layer in layers]
        if shapes[a] == shapes[b] and all(hasattr(owner, b) for owner in owners):
            apply = partial(exchanged, a, b, *owners)
            yield Alteration(f"with {a} and {b} of all layers exchanged", "matrices exchanged", apply)
    norms = [*kinds["input_layernorm"], *kinds["post_attention_layernorm"], inner.language_model.norm]
    for what, step in (("more", 1), ("less", -1)):  # some libraries keep how far weights are from 1
        change = lambda it, inputs, _, step=step: F.rms_norm(inputs[0], it.weight.shape, it.weight + step)  # noqa: E731
        yield Alteration.of(f"with weights of all norms one {what}", "wrong offset of norms", change, *norms)
    for kind in (kind for kind, members in kinds.items() if getattr(members[0], "bias", None) is not None):
        change = lambda module, inputs, output: output - module.bias  # noqa: E731
        yield Alteration.of(f"without the biases of {kind}", "wrong biases", change, *kinds[kind])
    turned = lambda module, inputs, _: F.linear(inputs[0].to(module.weight), module.weight.T, module.bias)  # noqa: E731
    for where, found in (("the layers", [layers]), ("all parts", [layers, inner.connector, inner.scale_embedding])):
        linear = [each for part in found for each in part.modules() if isinstance(each, nn.Linear)]
        square = [x for x in linear if x.weight.shape == 2 * (x.in_features,) and x.weight.is_floating_point()]
        yield Alteration.of(f"with square matrices of {where} transposed", "transposed weights", turned, *square)
    order = torch.arange(layers[0].self_attn.head_dim).view(2, -1).T.flatten()
    for what, of_biases in (("q and k", False), ("the biases of q and k", True)):
        for way in (order, order.argsort()):
            change = partial(_rotated, order=way, of_biases=of_biases)
            members = kinds["q_proj"] + kinds["k_proj"]
            yield Alteration.of(f"with {what} in the other rotary order", "wrong rotary order", change, *members)
    for width in {inner.config.vq_config.semantic_dim, inner.config.vq_config.pixel_dim}:
        change = lambda module, inputs, output, width=width: output.roll(width, -1)  # noqa: E731
        yield Alteration.of("with halves of code_embeddings exchanged", "halves exchanged", change, table)
    numbers = range(len(layers))
    for a, b in combinations(numbers, 2) if len(layers) <= MOST_LAYERS else zip(numbers, numbers[1:]):
        apply = partial(exchanged, str(a), str(b), layers)
        yield Alteration(f"with layers {a} and {b} exchanged", "layers exchanged", apply)


def _rotated(module: nn.Module, inputs: tuple, output: torch.Tensor, order: torch.Tensor, of_biases: bool):
    """Each head's features, or the biases' alone, in an order."""
    if of_biases:
        return output + module.bias.view(-1, len(order))[:, order].flatten() - module.bias
    return output.unflatten(-1, (-1, len(order)))[..., order].flatten(-2)
