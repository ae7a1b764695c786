"""Alterations of a model: each undoes its damage alone, and what does better by them is named."""

import copy
from types import SimpleNamespace

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


def from_zero(model):
    """As libraries that keep how far a norm's weights are from 1."""
    for name, weight in model.model.language_model.named_parameters():
        if "norm" in name:
            weight.sub_(1)


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
        (from_zero, "wrong offset of norms"),
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
    assert "with heads of 8" in {each.what for each in tried.whole}
    sizes = {each.what for each in tried.whole if " of all layers times " in each.what}
    factors = {"q_proj": (0.125, 0.5, 2, 8), "o_proj": (0, 0.5, 2, 8), "down_proj": (0, 0.125, 0.5, 2, 8)}
    assert sizes == {f"with {kind} of all layers times {x}" for kind, tried in factors.items() for x in tried}


@pytest.mark.parametrize("most, pairs", [(3, {"0 and 1", "0 and 2", "1 and 2"}), (2, {"0 and 1", "1 and 2"})])
def test_of_many_layers_neighbours_are_exchanged(most, pairs, tiny_config, monkeypatch):
    tiny_config.text_config.num_hidden_layers = 3
    tiny_config.text_config.layer_types = ["full_attention"] * 3
    model = NextFlowForConditionalGeneration(tiny_config)
    monkeypatch.setattr(alterations, "MOST_LAYERS", most)
    case = SimpleNamespace(model=model, config=model.config, losses=None, rows=[], seed=0)
    tried = [each.what for each in parts_of(case).whole if each.fault == "layers exchanged"]
    assert sorted(tried) == sorted(f"with layers {pair} exchanged" for pair in pairs)


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

    def finding(self):
        rows = [torch.randn(4, 64, generator=torch.Generator().manual_seed(seed)) for seed in range(16)]
        named = {f"layers.{number}": layer for number, layer in enumerate(self.layers)}
        return judge(Finding("parts", "toy", ""), self.losses, rows, [], named, named, 0)


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
    module = nn.Embedding(64, 64) if kind is nn.Embedding else nn.RMSNorm(64)
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


@torch.no_grad()
def test_what_is_better_one_row_on_is_named():
    torch.manual_seed(0)
    table = nn.Embedding(16, 8)
    wanted = table.weight.detach().clone()
    table.weight.copy_(wanted.roll(1, 0))
    rows = [torch.randint(15, (32,)) for _ in range(16)]
    losses = lambda rows: torch.stack([(table(row) - wanted[row]).square().mean() + 0.01 for row in rows])  # noqa: E731
    found = judge(Finding("parts", "toy", ""), losses, rows, [*reordered("the table", table)], {}, {}, 0)
    assert found.fault == "rows in disorder" and "the table one on" in found.measured
    table.weight.copy_(wanted)
    assert judge(Finding("parts", "toy", ""), losses, rows, [*reordered("the table", table)], {}, {}, 0).fault is None


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
