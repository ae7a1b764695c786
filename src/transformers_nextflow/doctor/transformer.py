"""The check of the transformer's parts, by losses on rows of shards, which it knows, or on described pictures."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN

from .alterations import Alteration, exchanged, hooked, judge, levelled, reordered, setting, times
from .case import Case
from .findings import Check, Finding

MOST_LAYERS = 8  # every two of which are exchanged
KNOWS = 0.8  # of the loss of a model that knows nothing


def other_settings(case: Case) -> Iterator[Alteration]:
    """Settings of config.json that weights do not show."""
    rotary = case.model.model.language_model.rotary_emb
    mode = "residual" if case.config.feature_mode == "accumulated" else "accumulated"
    listed: list[tuple] = [("feature mode", case.config, "feature_mode", mode)]
    if case.config.position_scale is not None:
        listed.append(("position scale", case.config, "position_scale", None))
    half = len(rotary.inv_freq)
    for sections in ([1] * half, [half // 4, 3 * half // 8, half - half // 4 - 3 * half // 8]):
        if sections != list(rotary.mrope_section):
            listed.append(("rotary sections", rotary, "mrope_section", sections))
    if rotary.rope_type == "default":
        places = torch.arange(half, device=rotary.inv_freq.device) / half
        for factor in (1e-3, 1e-2, 0.1, 10, 100, 1e3):
            listed.append(("rotary base", rotary, "inv_freq", rotary.inv_freq * factor**-places))
    activations = [layer.mlp.act_fn for layer in case.model.model.language_model.layers]
    for other in ("silu", "gelu", "relu"):
        if other != case.config.text_config.hidden_act:
            change = lambda module, inputs, _, other=other: ACT2FN[other](inputs[0])  # noqa: E731
            cause = "the weights were trained with another hidden_act than config.json says"
            yield Alteration(f"with {other}", "wrong activation", cause, partial(hooked, change, *activations))
    for name, owner, attribute, value in listed:
        cause = f"the weights were trained with another {name} than config.json says"
        apply = lambda owner=owner, attribute=attribute, value=value: setting(owner, attribute, value)  # noqa: E731
        yield Alteration(f"with another {name}", f"wrong {name}", cause, apply)


def parts(check: Check, case: Case) -> Finding:
    """No part predicts better at half or twice its size, no norm or scale at its mean or another's, no two layers
    exchanged, not all of them without biases, attention or MLP, no setting of config.json otherwise; and no matrix can
    have its outputs in another order without loss, where the model is better than one that knows nothing."""
    inner = case.model.model
    names = ("connector", "code_embeddings", "scale_embedding", "scale_embedding.index", "scale_embedding.length")
    resizable = {name: inner.get_submodule(name) for name in names}
    ends = ("o_proj", "down_proj", "input_layernorm", "post_attention_layernorm")
    named = {f"layers.{name}": module for name, module in inner.language_model.layers.named_modules()}
    resizable |= {name: module for name, module in named.items() if name.endswith(ends)}
    movable = {name: module for name, module in named.items() if isinstance(module, nn.Linear)}
    level = {"scale_embedding.index": inner.scale_embedding.index, "norm": inner.language_model.norm}
    level |= {name: module for name, module in named.items() if name.endswith("layernorm")}
    whole = [*other_settings(case), *_of_all_layers(case), *(levelled(*each) for each in level.items())]
    whole += reordered("scale_embedding.index", inner.scale_embedding.index)
    halves = inner.config.vq_config.semantic_dim, inner.config.vq_config.pixel_dim
    whole += [_turned("code_embeddings", inner.code_embeddings, width) for width in dict.fromkeys(halves)]
    hopeless = KNOWS * math.log(inner.config.vq_config.codebook_size)
    return judge(check, case.losses, case.rows, whole, resizable, movable, case.seed, hopeless)


def _turned(name: str, module: nn.Module, width: int) -> Alteration:
    apply = partial(hooked, lambda module, inputs, output: output.roll(width, -1), module)
    cause = f"{name}: semantic and pixel halves are in each other's place"
    return Alteration(f"with the halves of {name} exchanged", "halves exchanged", cause, apply)


def _of_all_layers(case: Case) -> Iterator[Alteration]:
    """Queries and MLPs of all layers at other sizes; attention and MLPs at half their size and left out; biases of a
    kind left out; queries and keys, and their biases, in the other rotary order; every two layers, of many neighbours,
    in each other's place."""
    layers = case.model.model.language_model.layers
    modules = dict(layers.named_modules())
    of_kind = lambda *ends: [module for name, module in modules.items() if name.endswith(ends)]  # noqa: E731
    apply: Callable
    for kind in ("q_proj", "up_proj"):
        for factor in (0.125, 0.5, 2.0, 8.0):
            cause = (
                f"{kind} of all layers is too {'large' if factor < 1 else 'small'}: a scale was put in, or left out"
            )
            apply = partial(times, factor, *of_kind(kind))
            yield Alteration(f"with {kind} of all layers times {factor:g}", "wrong scale of weights", cause, apply)
    for what, members in (("attention", of_kind("o_proj")), ("MLPs", of_kind("down_proj"))):
        for much, factor in (("half the", 0.5), ("no", 0.0)):
            apply = partial(times, factor, *members)
            cause = f"{what} do harm in all layers: weights were split, joined or ordered otherwise than in training"
            yield Alteration(f"with {much} {what} in all layers", f"damaged {what}", cause, apply)
    biased = {name.rpartition(".")[2] for name, module in modules.items() if getattr(module, "bias", None) is not None}
    for kind in sorted(biased):
        apply = partial(hooked, lambda module, inputs, output: output - module.bias, *of_kind(kind))
        cause = f"the biases of {kind} do harm: their order is not that of training, or they are another model's"
        yield Alteration(f"without the biases of {kind}", "wrong biases", cause, apply)
    inner = case.model.model
    turned = lambda module, inputs, _: F.linear(inputs[0].to(module.weight), module.weight.T, module.bias)  # noqa: E731
    cause = "a converter transposed matrices by their shapes, and so no square ones, or all of them"
    for where, found in (("the layers", [layers]), ("all parts", [layers, inner.connector, inner.scale_embedding])):
        linear = [each for part in found for each in part.modules() if isinstance(each, nn.Linear)]
        square = [x for x in linear if x.weight.shape == 2 * (x.in_features,) and x.weight.is_floating_point()]
        apply = partial(hooked, turned, *square)
        yield Alteration(f"with square matrices of {where} transposed", "transposed weights", cause, apply)
    order = torch.arange(layers[0].self_attn.head_dim).view(2, -1).T.flatten()
    for what in ("q and k", *(["the biases of q and k"] if {"q_proj", "k_proj"} <= biased else [])):
        for way in (order, order.argsort()):
            rotated = partial(_rotated, order=way, biases="biases" in what)
            cause = f"{what} are in the other rotary order: conversion took halves for neighbours, or did not"
            apply = partial(hooked, rotated, *of_kind("q_proj", "k_proj"))
            yield Alteration(f"with {what} in the other rotary order", "wrong rotary order", cause, apply)
    numbers = range(len(layers))
    for a, b in combinations(numbers, 2) if len(layers) <= MOST_LAYERS else zip(numbers, numbers[1:]):
        cause = f"layers {a} and {b} are in each other's place"
        yield Alteration(
            f"with layers {a} and {b} exchanged", "layers exchanged", cause, partial(exchanged, layers, a, b)
        )


def _rotated(module: nn.Module, inputs: tuple, output: torch.Tensor, order: torch.Tensor, biases: bool):
    """Each head's features, or the biases' alone, in an order."""
    if biases:
        return output + module.bias.view(-1, len(order))[:, order].flatten() - module.bias
    return output.unflatten(-1, (-1, len(order)))[..., order].flatten(-2)
