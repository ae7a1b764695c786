"""Alterations of a model: each undoes its damage alone, and what does better by them is named."""

import copy
import math
from functools import partial
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from damage import (
    activate,
    exchange,
    exchange_halves,
    exchange_matrices,
    guess_heads,
    layers,
    permute,
    reorder,
    transpose,
)
from torch import nn

from transformers_nextflow import NextFlowForConditionalGeneration
from transformers_nextflow.doctor import alterations
from transformers_nextflow.doctor.alterations import (
    Alteration,
    exchanged,
    headed,
    hooked,
    judge,
    levelled,
    reordered,
    setting,
    shuffled,
    times,
)
from transformers_nextflow.doctor.case import Case
from transformers_nextflow.doctor.findings import Finding
from transformers_nextflow.doctor.pictures import default_pictures


def parts_of(case) -> SimpleNamespace:
    """What the check of parts has its judge try."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(alterations, "judge", lambda *arguments: SimpleNamespace(arguments=arguments))
        found = alterations.parts(None, case).arguments
    return SimpleNamespace(whole=found[3], resizable=found[4], movable=found[5], hopeless=found[7])


@pytest.fixture(scope="module")
def known(random_model, tiny_processor):
    """A row, and the logits of its codes."""
    case = Case(random_model, tiny_processor, default_pictures(random_model.model.schedules, 0, each=1))
    with torch.no_grad():
        return case.rows[0], case.logits(case.rows[0])[0][0]


def scale(kind, factor):
    def do(model):
        for name, module in layers(model).named_modules():
            if name.endswith(kind):
                for weight in module.parameters():
                    weight.mul_(factor)

    return do


def transpose_all(model, *parts):
    for part in (layers(model), *(getattr(model.model, name) for name in parts)):
        for module in part.modules():
            if isinstance(module, nn.Linear):
                transpose(module.weight)


def rebase(factor):
    def do(model):
        rotary = model.model.language_model.rotary_emb
        rotary.inv_freq *= factor ** (torch.arange(len(rotary.inv_freq)) / len(rotary.inv_freq))

    return do


def offset(step):
    """As libraries that keep how far a norm's weights are from 1."""

    def do(model):
        for name, weight in model.model.language_model.named_parameters():
            if "norm" in name:
                weight.add_(step)

    return do


def reverse_index(model):
    table = model.model.scale_embedding.index.weight
    table.copy_(table.flip(0))


FEATURES, ROTARY = "wrong feature mode", "wrong rotary order"


@pytest.mark.parametrize(
    "do, fault",
    [
        (scale("q_proj", 8), "wrong scale of weights"),
        (scale("q_proj", 0.5), "wrong scale of weights"),
        (scale("o_proj", 2), "wrong scale of weights"),
        (scale("down_proj", 0.125), "wrong scale of weights"),
        (lambda model: exchange_matrices(model, "q_proj", "o_proj"), "matrices exchanged"),
        (lambda model: exchange_matrices(model, "k_proj", "v_proj"), "matrices exchanged"),
        (lambda model: exchange_matrices(model, "gate_proj", "up_proj"), "matrices exchanged"),
        (lambda model: exchange(model, 0, 1), "layers exchanged"),
        (lambda model: reorder(model, of_biases=False), ROTARY),
        (lambda model: reorder(model, of_biases=True), ROTARY),
        (transpose_all, "transposed weights"),
        (lambda model: transpose_all(model, "connector", "scale_embedding"), "transposed weights"),
        (rebase(10), "wrong rotary base"),
        (rebase(1e-3), "wrong rotary base"),
        (lambda model: model.model.language_model.rotary_emb.inv_freq.mul_(0.25), "wrong rotary base"),
        (offset(-1), "wrong offset of norms"),
        (offset(1), "wrong offset of norms"),
        (exchange_halves, "halves exchanged"),
        (reverse_index, "rows in disorder"),
        (lambda model: setattr(model.config, "feature_mode", "accumulated"), FEATURES),
        (lambda model: activate(model, "relu"), "wrong activation"),
        (lambda model: activate(model, "gelu"), "wrong activation"),
        (
            lambda model: setattr(model.model.language_model.rotary_emb, "mrope_section", [8, 0, 0]),
            "wrong rotary sections",
        ),
    ],
)
@torch.no_grad()
def test_damage_is_undone_by_an_alteration_of_its_name(do, fault, random_model, known, tiny_processor):
    (row, wanted), model = known, copy.deepcopy(random_model)
    case = Case(model, tiny_processor, [])
    do(model)
    logits = [case.logits(row)[0][0]]
    for each in parts_of(case).whole:
        if each.fault == fault:
            with each.apply():
                logits.append(case.logits(row)[0][0])
    assert [torch.allclose(each, wanted, atol=1e-3) for each in logits].count(True) == 1
    assert not torch.allclose(logits[0], wanted, atol=1e-3)


@torch.no_grad()
def test_heads_of_half_the_size_are_undone_for_texts(tiny_model):
    model, ids = copy.deepcopy(tiny_model), torch.arange(6)[None] + 10
    whole = model(input_ids=ids, logits_over="text").logits
    guess_heads(model)
    assert not torch.allclose(model(input_ids=ids, logits_over="text").logits, whole, atol=1e-4)
    with headed(model.model.language_model, 16):
        torch.testing.assert_close(model(input_ids=ids, logits_over="text").logits, whole)


def test_all_parts_of_the_transformer_are_tried(tiny_model):
    tried = parts_of(SimpleNamespace(model=tiny_model, config=tiny_model.config, losses=None, rows=[], seed=0))
    linear = {f"layers.{name}" for name, it in layers(tiny_model).named_modules() if isinstance(it, nn.Linear)}
    assert set(tried.movable) == linear and len(linear) == 14
    scales = {"scale_embedding", "scale_embedding.index", "scale_embedding.length"}
    adding = {name for name in linear if name.endswith(("o_proj", "down_proj"))}
    norms = {f"layers.{n}.{name}" for n in range(2) for name in ("input_layernorm", "post_attention_layernorm")}
    assert set(tried.resizable) == {"connector", "code_embeddings"} | scales | adding | norms
    levels = {each.what.rpartition(" ")[2] for each in tried.whole if each.what.startswith("with one ")}
    assert levels == norms | {"norm", "scale_embedding.index"}
    assert tried.hopeless == pytest.approx(0.8 * torch.tensor(64.0).log().item())
    without = {each.what for each in tried.whole if each.what.startswith("without")}
    assert without == {f"without the biases of {kind}_proj" for kind in "qkv"}
    dropped = {each.fault for each in tried.whole if each.what.endswith("times 0")}
    assert dropped == {"damaged attention", "damaged MLPs"}
    assert {each.what for each in tried.whole if each.fault == "wrong number of heads"} == {"with heads of 8"}
    sizes = {each.what for each in tried.whole if " of all layers times " in each.what}
    factors = {"q_proj": (0.125, 0.5, 2, 8), "o_proj": (0, 0.5, 2, 8), "down_proj": (0, 0.125, 0.5, 2, 8)}
    assert sizes == {f"with {kind} of all layers times {x}" for kind, tried in factors.items() for x in tried}


@pytest.mark.parametrize(
    "count, pairs",
    [(3, {(0, 1), (0, 2), (1, 2)}), (8, {*combinations(range(8), 2)}), (9, {(n, n + 1) for n in range(8)})],
)
def test_of_many_layers_neighbours_are_exchanged(count, pairs, tiny_config):
    tiny_config.text_config.num_hidden_layers = count
    tiny_config.text_config.layer_types = ["full_attention"] * count
    model = NextFlowForConditionalGeneration(tiny_config)
    case = SimpleNamespace(model=model, config=model.config, losses=None, rows=[], seed=0)
    tried = [each.what for each in parts_of(case).whole if each.fault == "layers exchanged"]
    assert sorted(tried) == sorted(f"with layers {a} and {b} exchanged" for a, b in pairs)


@pytest.mark.parametrize("rope_type", ["default", "yarn"])
def test_rotary_settings_are_those_of_other_bases_heads_and_sections(rope_type, tiny_model):
    """Of heads of 128; where frequencies are no powers of a base, neither bases nor heads are tried."""
    rotary, own = tiny_model.model.language_model.rotary_emb, 1e4 ** -(torch.arange(64) / 64)
    case = SimpleNamespace(model=tiny_model, config=tiny_model.config, losses=None, rows=[], seed=0)
    with setting((rotary, "inv_freq", own), (rotary, "rope_type", rope_type)):
        bases, factors, sections, heads = [], [], [], []
        for each in parts_of(case).whole:
            with each.apply():
                ratio = rotary.inv_freq / own if len(rotary.inv_freq) == 64 else None
                if each.fault == "wrong rotary base":
                    is_even = torch.allclose(ratio, ratio[0])
                    (factors if is_even else bases).append(float(ratio[0] if is_even else ratio[32] ** -2))
                elif each.fault == "wrong rotary sections":
                    sections.append(rotary.mrope_section)
                elif each.fault == "wrong number of heads":
                    heads.append(each.what)
    is_default = rope_type == "default"
    assert bases == (pytest.approx([1e-3, 1e-2, 0.1, 10, 100, 1e3]) if is_default else [])
    assert factors == pytest.approx([0.125, 0.25, 0.5, 2, 4, 8])
    assert sections == [[1] * 64, [16, 24, 24]] and heads == (["with heads of 8"] if is_default else [])


@pytest.mark.parametrize(
    "count, size, tried", [(1, 16, {8}), (2, 16, {8, 32}), (1, 4, set()), (3, 8, {4}), (4, 12, {24}), (1, 24, {12})]
)
def test_heads_are_of_quarters_and_fill_the_keys(count, size, tried, tiny_model):
    attention, text = tiny_model.model.language_model.layers[0].self_attn, tiny_model.config.text_config
    case = SimpleNamespace(model=tiny_model, config=tiny_model.config, losses=None, rows=[], seed=0)
    with setting((attention, "head_dim", size), (text, "num_key_value_heads", count)):
        found = {each.what for each in parts_of(case).whole if each.fault == "wrong number of heads"}
    assert found == {f"with heads of {each}" for each in tried}


@pytest.mark.parametrize("sections", [[1] * 8, [2, 3, 3]])
@torch.no_grad()
def test_rotary_sections_of_two_kinds_are_tried(sections, random_model, known, tiny_processor):
    model = copy.deepcopy(random_model)
    rotary, case = model.model.language_model.rotary_emb, Case(model, tiny_processor, [])
    with setting((rotary, "mrope_section", sections)):
        wanted = case.logits(known[0])[0][0]
    rotary.mrope_section = [8, 0, 0]
    undone = []
    for each in parts_of(case).whole:
        if each.fault == "wrong rotary sections":
            with each.apply():
                undone.append(torch.allclose(case.logits(known[0])[0][0], wanted, atol=1e-4))
    assert sorted(undone) == [False, True]


class Sum(nn.Module):
    """Rows of 64 numbers through three mappings, the truth of which is known."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(3))
        self.wanted = [layer.weight.detach().clone() for layer in self.layers]

    def losses(self, rows):
        pairs = list(zip(self.layers, self.wanted))
        return torch.stack([sum((layer(x) - x @ w.T).square().mean() + 0.01 for layer, w in pairs) for x in rows])

    def finding(self, whole=()):
        rows = [torch.randn(4, 64, generator=torch.Generator().manual_seed(seed)) for seed in range(16)]
        named = {f"layers.{number}": layer for number, layer in enumerate(self.layers)}
        return judge(Finding("parts", "toy", ""), self.losses, rows, whole, named, named, 0)


@pytest.mark.parametrize(
    "factor, fault",
    [(1, None), (2.2, "weights too large"), (0.45, "weights too small"), (-1, "weights without effect")],
)
@torch.no_grad()
def test_what_does_better_at_another_size_is_named(factor, fault):
    toy = Sum()
    toy.layers[1].weight.mul_(factor)
    finding = toy.finding()
    assert finding.fault == fault
    assert fault is None or "layers.1" in finding.measured
    if abs(factor) != 1:
        assert f"less with layers.1 times {2 if factor < 1 else 0.5:g}" in finding.measured


@torch.no_grad()
def test_what_can_be_in_any_order_is_named():
    toy = Sum()
    permute(toy.layers[2].weight)
    finding = toy.finding()
    assert finding.fault == "weights without effect" and "layers.2" in finding.measured


@pytest.mark.parametrize("kind, fault", [(nn.Embedding, "rows in disorder"), (nn.RMSNorm, "weights in disorder")])
@torch.no_grad()
def test_what_does_better_at_its_mean_is_named(kind, fault):
    torch.manual_seed(0)
    module = nn.Embedding(64, 32) if kind is nn.Embedding else nn.RMSNorm(64)
    module.weight.normal_()
    wanted = copy.deepcopy(module)
    rows = [torch.randint(64, (32,)) if kind is nn.Embedding else torch.randn(32, 64) for _ in range(16)]

    def losses(rows):
        return torch.stack([(module(row) - wanted(row)).square().mean() + 0.01 for row in rows])

    def finding():
        return judge(Finding("parts", "toy", ""), losses, rows, [levelled("the table", module)], {}, {}, 0)

    assert finding().fault is None
    permute(module.weight)
    assert finding().fault == fault and "the table" in finding().measured


@pytest.mark.parametrize(
    "way, change",
    [
        ("one on", lambda weight: weight.roll(1, 0)),
        ("one back", lambda weight: weight.roll(-1, 0)),
        ("in reverse", lambda weight: weight.flip(0)),
    ],
)
@torch.no_grad()
def test_what_is_better_one_row_on_or_back_or_in_reverse_is_named(way, change):
    """And undoes it wholly, but for ids at an end of the table, which have no next one."""
    torch.manual_seed(0)
    table = nn.Embedding(16, 8)
    wanted = table.weight.detach().clone()
    table.weight.copy_(change(wanted))
    ids = {"one on": (0, 15), "one back": (1, 16), "in reverse": (0, 16)}[way]
    rows = [torch.randint(*ids, (32,)) for _ in range(16)]
    losses = lambda rows: torch.stack([(table(row) - wanted[row]).square().mean() + 0.01 for row in rows])  # noqa: E731
    saved = float(losses(rows).mean()) - 0.01
    found = judge(Finding("parts", "toy", ""), losses, rows, [*reordered("the table", table)], {}, {}, 0)
    assert found.fault == "rows in disorder"
    assert f"{saved:.2f} less with the rows of the table {way}" in found.measured
    table.weight.copy_(wanted)
    assert judge(Finding("parts", "toy", ""), losses, rows, [*reordered("the table", table)], {}, {}, 0).fault is None


class Choice:
    """Losses of rows, by what is chosen, and alterations that choose."""

    def __init__(self, **losses):
        self.losses, self.now = {name: torch.tensor(each) for name, each in losses.items()}, "own"

    def finding(self, count=12, **settings):
        whole = [
            Alteration(name, name, partial(setting, (self, "now", name))) for name in self.losses if name != "own"
        ]
        rows = list(range(count))
        measure = lambda rows: self.losses[self.now][rows]  # noqa: E731
        return judge(Finding("parts", "toy", ""), measure, rows, whole, {}, {}, 0, **settings)


@pytest.mark.parametrize("saved, fault", [(0.019, None), (0.021, "other")])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_fiftieth_of_the_loss_is_to_be_saved_on_twelve_rows(saved, fault, sign):
    own = sign * 2.0
    choice = Choice(own=[own] * 12, other=[own - 2 * saved] * 12)
    found = choice.finding()
    assert found.fault == fault and f"parts over 12 rows, loss {own:.2f}" in found.measured
    assert choice.finding(11).severity == "unchecked" and choice.finding(11).measured == "11 rows are too few"


@pytest.mark.parametrize("first, fault", [(0.79, "second"), (0.81, "first")])
def test_of_almost_equal_alterations_the_first_is_named(first, fault):
    choice = Choice(own=[3.0] * 12, none=[3.0] * 12, first=[3 - first] * 12, second=[2.0] * 12)
    found = choice.finding()
    assert found.fault == fault and f"{1.0 if fault == 'second' else first:.2f} less {fault}" in found.measured


@pytest.mark.parametrize("noise, fault", [(0.7, "other"), (1.1, None)])
def test_what_an_alteration_saves_has_to_be_sure(noise, fault):
    """Of 12 rows: 4.7 standard errors are enough, 3 are not."""
    choice = Choice(own=[3.0] * 12, other=[2.0 + noise * (-1) ** n for n in range(12)])
    assert choice.finding().fault == fault


def test_four_that_promise_most_on_three_rows_are_tried_on_all():
    promising = {f"unsure {n}": [2.0 - 0.1 * n] * 3 + [5.0] * 9 for n in range(3)}
    fourth, fifth = {"fourth": [2.1] * 12}, {"fifth": [2.2] * 12}
    assert Choice(own=[3.0] * 12, **fifth, **promising, **fourth).finding().fault == "fourth"
    assert Choice(own=[3.0] * 12, **fifth, **promising, more=[1.0] * 3 + [5.0] * 9).finding().fault is None
    assert Choice(own=[3.0] * 12, late=[3.4, 3.4] + [2.25] * 10).finding().fault is None
    assert Choice(own=[3.0] * 12, early=[3.1, 3.1] + [2.1] * 10).finding().fault == "early"


def orders(*rises, own=1.0, whole=(), hopeless=math.inf):
    """The finding of parts by what rows cost more, each part's features in another order."""
    parts = {f"layers.{number}": nn.Linear(8, 8) for number in range(len(rises))}
    x, rises = torch.randn(1, 8), [torch.as_tensor(rise, dtype=torch.float64).expand(12) for rise in rises]
    plain = {name: part(x) for name, part in parts.items()}

    def measure(rows):
        are_moved = [not torch.equal(part(x), plain[name]) for name, part in parts.items()]
        return own + sum(rise[: len(rows)] * is_moved for rise, is_moved in zip(rises, are_moved))

    return judge(Finding("parts", "toy", ""), measure, range(12), whole, {}, parts, 0, hopeless)


def around(mean: float, first: float) -> list[float]:
    """Twelve numbers that start with `first` thrice, and whose mean is no more than chance."""
    rest = (12 * mean - 3 * first) / 9
    return [first] * 3 + [rest + 2.0, rest - 2.0] * 4 + [rest]


@pytest.mark.parametrize(
    "rise, usual, fault",
    [
        (around(0.095, 0.0), 1.0, "weights without effect"),
        (around(0.105, 0.0), 1.0, None),
        (around(0.095, 0.095), 1.0, "weights without effect"),
        (around(0.095, 0.105), 1.0, None),  # not on the few rows that come first
        ([0.09] * 12, 1.0, None),  # little, but surely
        ([0.0] * 12, 0.0055, "weights without effect"),
        ([0.0] * 12, 0.0045, None),  # as little as all others
    ],
)
@torch.no_grad()
def test_what_another_order_costs_a_tenth_of_the_usual_is_without_effect(rise, usual, fault):
    found = orders(usual, rise, usual, usual)
    assert found.fault == fault
    if fault is not None:
        what, _, costs = found.measured.partition("; ")[2].rpartition(" ")
        assert what == "outputs of layers.1 can be in another order at"
        assert float(costs) == pytest.approx(np.mean(rise), abs=1e-3)


@torch.no_grad()
def test_of_a_hopeless_model_no_order_matters():
    assert orders(1.0, [0.0] * 12, 1.0, hopeless=1.0).fault is None
    assert orders(1.0, [0.0] * 12, 1.0, hopeless=1.01).fault == "weights without effect"


@torch.no_grad()
def test_what_is_better_as_a_whole_comes_before_orders_and_sizes():
    toy = Sum()
    permute(toy.layers[2].weight)
    whole = [Alteration("without it", "too much", partial(times, 0.0, toy.layers[2]))]
    assert toy.finding(whole).fault == "too much"


@torch.no_grad()
def test_features_in_another_order_are_those_of_permuted_weights():
    """Channels of convolutions, the last axis of all others."""
    for module, inputs in [(nn.Conv2d(3, 8, 1), torch.randn(2, 3, 5, 5)), (nn.Linear(3, 8), torch.randn(2, 5, 3))]:
        plain, other = module(inputs), copy.deepcopy(module)
        with shuffled(module, 0):
            found = module(inputs)
        order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
        other.weight.copy_(module.weight[order])
        other.bias.copy_(module.bias[order])
        torch.testing.assert_close(found, other(inputs))
        assert not torch.equal(found, plain)


@torch.no_grad()
def test_without_biases_a_projection_is_its_weight(random_model, known, tiny_processor):
    model = copy.deepcopy(random_model)
    [without] = [each for each in parts_of(Case(model, tiny_processor, [])).whole if each.what.endswith("of q_proj")]
    stack, x = layers(model), torch.randn(1, 4, 32)
    with without.apply():
        for layer in stack:
            q, k = layer.self_attn.q_proj, layer.self_attn.k_proj
            torch.testing.assert_close(q(x), x @ q.weight.T)
            torch.testing.assert_close(k(x), x @ k.weight.T + k.bias)


@torch.no_grad()
def test_alterations_leave_no_trace(tiny_model):
    model = copy.deepcopy(tiny_model)
    ids, stack, rotary = torch.arange(6)[None] + 10, layers(model), model.model.language_model.rotary_emb
    before = model(input_ids=ids, logits_over="text").logits
    contexts = [
        shuffled(stack[0].mlp.down_proj, 0),
        hooked(lambda module, inputs, output: output + 1, stack[0].self_attn.o_proj),
        exchanged("0", "1", stack),
        exchanged("gate_proj", "up_proj", *(layer.mlp for layer in stack)),
        headed(model.model.language_model, 8),
        times(2.0, *(layer.mlp.down_proj for layer in stack)),
        setting((rotary, "inv_freq", rotary.inv_freq * 3)),
    ]
    for context in contexts:
        with context:
            assert not torch.equal(model(input_ids=ids, logits_over="text").logits, before)
        assert torch.equal(model(input_ids=ids, logits_over="text").logits, before)
