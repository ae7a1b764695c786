"""The joint cross-entropy against the plain one, and what it is divided by."""

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny_models import BOI, SQUARE, TEXT_ROWS, WIDE, Picture, batch_of, codes_of, relative, tiny_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from transformers_nextflow import losses
from transformers_nextflow.losses import IGNORE

POSITIONS, WIDTH, ROWS = 15, 8, (13, 7)  # text rows, codes
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
CHUNKS = pytest.mark.parametrize("at_once", [1, 3 * sum(ROWS), 2**20], ids=["1 each", "3 each", "one chunk"])


def example(dtype: torch.dtype, scale: float = 1.0) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Hidden states and rows of two heads, targets, and weights of which one is 0."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(length, WIDTH) for length in (POSITIONS, *ROWS)]
    inputs = [nn.Parameter((scale * torch.randn(shape, generator=generator)).to(dtype)) for shape in shapes]
    targets = torch.randint(sum(ROWS), (POSITIONS,), generator=generator)
    weights = 3 * torch.rand(POSITIONS, generator=generator)
    weights[3] = 0.0
    return inputs, targets, weights


def head_of(rows: nn.Parameter) -> nn.Linear:
    with torch.device("meta"):
        head = nn.Linear(rows.shape[1], len(rows), bias=False)
    head.weight = rows
    return head


def joint_cross_entropy(hidden, text_rows, code_rows, targets, weights, z_loss=0.0):
    heads = [head_of(rows) for rows in (text_rows, code_rows)]
    return losses.joint_cross_entropy(hidden, heads, len(text_rows) + len(code_rows), targets, weights, z_loss)


def of_heads(hidden, heads, targets, weights, z_loss=0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """All logits at once."""
    logits = torch.cat([head(hidden) for head in heads], dim=-1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    each = F.cross_entropy(logits, targets, reduction="none")
    return ((each + z_loss * logits.logsumexp(-1) ** 2) * weights).sum(), each.detach()


def plain(hidden, text_rows, code_rows, targets, weights, z_loss=0.0) -> tuple[torch.Tensor, torch.Tensor]:
    return of_heads(hidden, [head_of(text_rows), head_of(code_rows)], targets, weights, z_loss)


def value_and_gradients(loss, inputs, targets, weights, factor: float = 1.0, **kwargs) -> list[torch.Tensor]:
    total, each = loss(*inputs, targets, weights, **kwargs)
    return [total.detach(), each, *torch.autograd.grad(total * factor, inputs)]


@DTYPES
@CHUNKS
def test_value_and_gradients_are_the_plain_ones(monkeypatch, dtype, at_once):
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", at_once)
    inputs, targets, weights = example(dtype)
    expected = value_and_gradients(plain, inputs, targets, weights, factor=0.3)
    for ours, theirs in zip(value_and_gradients(joint_cross_entropy, inputs, targets, weights, 0.3), expected):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        assert relative(ours, theirs) < TOLERANCES[dtype]


@DTYPES
@CHUNKS
def test_z_loss_is_the_plain_one(monkeypatch, dtype, at_once):
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", at_once)
    inputs, targets, weights = example(dtype)
    without = value_and_gradients(plain, inputs, targets, weights)
    expected = value_and_gradients(plain, inputs, targets, weights, factor=0.3, z_loss=0.2)
    ours = value_and_gradients(joint_cross_entropy, inputs, targets, weights, factor=0.3, z_loss=0.2)
    for mine, theirs in zip(ours, expected):
        assert relative(mine, theirs) < TOLERANCES[dtype]
    assert relative(ours[0], without[0]) > 0.1 and relative(ours[1], without[1]) < TOLERANCES[dtype]


@CHUNKS
def test_under_autocast(monkeypatch, at_once):
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", at_once)
    inputs, targets, weights = example(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = (value_and_gradients(loss, inputs, targets, weights) for loss in (joint_cross_entropy, plain))
    for mine, expected in zip(ours, theirs):
        assert mine.dtype == expected.dtype == torch.float32
        assert relative(mine, expected) < TOLERANCES[torch.bfloat16]
    assert relative(ours[1], value_and_gradients(plain, inputs, targets, weights)[1]) > 1e-5  # it did run in bfloat16


def test_large_logits_stay_finite():
    inputs, targets, weights = example(torch.float32, scale=30.0)
    exact = [nn.Parameter(tensor.detach().double()) for tensor in inputs]
    expected = value_and_gradients(plain, exact, targets, weights)
    for ours, theirs in zip(value_and_gradients(joint_cross_entropy, inputs, targets, weights), expected):
        assert ours.isfinite().all() and relative(ours.double(), theirs) < 1e-5


@pytest.mark.parametrize("trained", [(0,), (1,), (2,), (0, 2)], ids=["hidden", "text rows", "codes", "all but text"])
def test_only_what_is_trained_gets_a_gradient(trained):
    inputs, targets, weights = example(torch.float64)
    expected = value_and_gradients(plain, inputs, targets, weights)[2:]
    inputs = [nn.Parameter(tensor.detach(), index in trained) for index, tensor in enumerate(inputs)]
    joint_cross_entropy(*inputs, targets, weights)[0].backward()
    for index, (tensor, gradient) in enumerate(zip(inputs, expected)):
        if index in trained:
            assert relative(tensor.grad, gradient) < 1e-12
        else:
            assert tensor.grad is None


def test_gradients_by_differences(monkeypatch):
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", 4 * sum(ROWS))
    inputs, targets, weights = example(torch.float64)
    weights = weights.double()
    step = 1e-6
    *_, hidden, text_rows, code_rows = value_and_gradients(joint_cross_entropy, inputs, targets, weights, z_loss=0.1)
    for tensor, gradient in zip(inputs, (hidden, text_rows, code_rows)):
        direction = torch.randn_like(tensor)
        sums = []
        for sign in (1, -1):
            with torch.no_grad():
                tensor += sign * step * direction
                sums.append(joint_cross_entropy(*inputs, targets, weights, z_loss=0.1)[0])
                tensor -= sign * step * direction
        assert torch.isclose((sums[0] - sums[1]) / (2 * step), (gradient * direction).sum(), rtol=1e-7)


def test_a_second_backward_is_refused():
    inputs, targets, weights = example(torch.float64)
    total, _ = joint_cross_entropy(*inputs, targets, weights)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="compute it again"):
        total.backward()


def test_gradients_add_up_over_two_losses(monkeypatch):
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", 4 * sum(ROWS))
    inputs, targets, weights = example(torch.float64)
    for factor in (0.3, 0.6):
        (joint_cross_entropy(*inputs, targets, weights)[0] * factor).backward()
    for tensor, expected in zip(inputs, value_and_gradients(plain, inputs, targets, weights, 0.9)[2:]):
        assert relative(tensor.grad, expected) < 1e-12


def test_nothing_supervised_is_zero():
    inputs, targets, weights = example(torch.float32)
    nothing = [inputs[0][:0], *inputs[1:]]
    total, each = joint_cross_entropy(*nothing, targets[:0], weights[:0])
    total.backward()
    assert total == 0 and each.shape == (0,)
    assert not any(tensor.grad.any() for tensor in inputs)


def test_no_positions_of_half_trained_heads():
    """As on a device whose row of a batch has no target, while the hidden states are frozen."""
    (hidden, text_rows, code_rows), targets, weights = example(torch.float32)
    code_rows.requires_grad_(False)
    total, _ = joint_cross_entropy(hidden[:0].detach(), text_rows, code_rows, targets[:0], weights[:0])
    total.backward()
    assert not text_rows.grad.any() and code_rows.grad is None


# Heads that are more than rows


class Adapted(nn.Module):
    """A frozen layer and a low rank beside it, and a layer that nothing calls."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = nn.Linear(WIDTH, 3, bias=False), nn.Linear(3, base.out_features, bias=False)
        self.unused = nn.Linear(2, 2)

    def forward(self, hidden):
        return self.base(hidden) + self.up(self.down(hidden))


def soft_capped(head: nn.Linear) -> nn.Module:
    return nn.Sequential(head, nn.Tanh())


def with_bias(head: nn.Linear) -> nn.Module:
    head.bias = nn.Parameter(torch.linspace(-1, 1, head.out_features))
    return head


def with_hook_on_gradients(head: nn.Linear) -> nn.Module:
    head.weight.register_hook(lambda gradient: gradient * 0.1)
    return head


def with_forward_hook(head: nn.Linear) -> nn.Module:
    head.register_forward_hook(lambda module, args, output: output * 1.5)
    return head


def parametrised(head: nn.Linear) -> nn.Module:
    return nn.utils.parametrizations.weight_norm(head)


def after_norm(head: nn.Linear) -> nn.Module:
    return nn.Sequential(nn.RMSNorm(WIDTH), head)


HEADS = [Adapted, soft_capped, with_bias, with_hook_on_gradients, with_forward_hook, parametrised, after_norm]


@CHUNKS
@pytest.mark.parametrize("change", HEADS, ids=lambda change: change.__name__)
def test_changed_heads(monkeypatch, change, at_once):
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", at_once)
    torch.manual_seed(0)
    (hidden, *rows), targets, weights = example(torch.float32)
    heads = nn.ModuleList([change(head_of(rows[0])), head_of(rows[1])])
    others, other_hidden = copy.deepcopy(heads), copy.deepcopy(hidden)
    if change is with_hook_on_gradients:  # is not copied
        others = nn.ModuleList([change(others[0]), others[1]])
    total, _ = losses.joint_cross_entropy(hidden, heads, sum(ROWS), targets, weights)
    expected, _ = of_heads(other_hidden, others, targets, weights)
    assert relative(total, expected) < 1e-5
    for loss in (total, expected):
        (loss * 0.3).backward()
    assert relative(hidden.grad, other_hidden.grad) < 1e-5
    for (name, weight), other in zip(heads.named_parameters(), others.parameters(), strict=True):
        if "unused" in name:
            assert other.grad is None and not weight.grad.any()
        elif other.grad is None:
            assert weight.grad is None and not weight.requires_grad
        else:
            assert relative(weight.grad, other.grad) < 1e-5, name


def test_hooks_on_gradients_while_the_hidden_states_are_frozen():
    (hidden, *rows), targets, weights = example(torch.float32)
    heads, gradients = [with_hook_on_gradients(head_of(weight)) for weight in rows], []
    for loss in (
        losses.joint_cross_entropy(hidden.detach(), heads, sum(ROWS), targets, weights)[0],
        of_heads(hidden.detach(), heads, targets, weights)[0],
    ):
        gradients.append(torch.autograd.grad(loss, rows))
    for ours, theirs in zip(*gradients):
        assert relative(ours, theirs) < 1e-5


def test_one_weight_in_both_heads_and_in_the_hidden_states():
    _, targets, weights = example(torch.float64)
    table = nn.Parameter(torch.randn(10, WIDTH, dtype=torch.float64))
    targets, gradients = targets % 20, []
    for loss in (joint_cross_entropy, plain):
        hidden = table[targets % 10].tanh()
        gradients += torch.autograd.grad(loss(hidden, table, table, targets, weights)[0], table)
    assert relative(*gradients) < 1e-12


def test_inside_a_checkpoint(monkeypatch):
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", 4 * sum(ROWS))
    inputs, targets, weights = example(torch.float64)

    def checkpointed(*args):
        return torch.utils.checkpoint.checkpoint(joint_cross_entropy, *args, use_reentrant=False)

    expected = value_and_gradients(plain, inputs, targets, weights)
    for ours, theirs in zip(value_and_gradients(checkpointed, inputs, targets, weights), expected):
        assert relative(ours, theirs) < 1e-12


def test_compiled_without_a_break(monkeypatch):
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", 4 * sum(ROWS))
    inputs, targets, weights = example(torch.float64)
    heads = [head_of(rows) for rows in inputs[1:]]
    compiled = torch.compile(losses.joint_cross_entropy, fullgraph=True, backend="aot_eager")
    total, each = compiled(inputs[0], heads, sum(ROWS), targets, weights)
    got = [total, each, *torch.autograd.grad(total, inputs)]
    for ours, theirs in zip(got, value_and_gradients(plain, inputs, targets, weights)):
        assert relative(ours, theirs) < 1e-12


class Largest(TorchDispatchMode):
    """Elements of the largest tensor, and how many matrix products there were, of them such as add in place."""

    def __init__(self):
        super().__init__()
        self.elements = self.products = self.added = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.added += function.overloadpacket is torch.ops.aten.addmm_
        self.products += function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_)
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_the_logits_of_all_positions_never_exist_at_once(monkeypatch):
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", 100)
    hidden = torch.randn(60, 2, requires_grad=True)
    text_rows, code_rows = nn.Parameter(torch.randn(30, 2)), nn.Parameter(torch.randn(20, 2))
    targets, weights = torch.arange(60) % 50, torch.ones(60)
    with Largest() as largest:
        value_and_gradients(joint_cross_entropy, [hidden, text_rows, code_rows], targets, weights)
    assert largest.elements == 120 and largest.products == 30 * 6
    assert largest.added == 30 * 4  # a product on its own would be as large as the head
    with Largest() as largest:
        value_and_gradients(plain, [hidden, text_rows, code_rows], targets, weights)
    assert largest.elements == 60 * 50


def test_no_gradients_are_computed_where_none_are_wanted():
    inputs, targets, weights = example(torch.float64)
    with Largest() as largest, torch.no_grad():
        total, each = joint_cross_entropy(*inputs, targets, weights)
    assert not total.requires_grad and largest.products == 2
    assert relative(each, plain(*inputs, targets, weights)[1]) < 1e-12


# The normaliser

DOCUMENTS = [
    [10 + i, *range(20, 20 + 3 * (i % 3)), Picture(WIDE if i % 3 else SQUARE, seed=i), *range(30, 30 + i)]
    for i in range(8)
]


def weight_of(document: list) -> int:
    """Every token but the first is predicted, `<boi>` too; the weights of a picture's codes sum to their number."""
    tokens = sum(not isinstance(part, Picture) for part in document)
    return tokens + sum({SQUARE: 14, WIDE: 11}[part.grid] for part in document if isinstance(part, Picture))


def optimizer_step(model, documents: list, num_items: torch.Tensor, z_loss: float) -> torch.Tensor:
    """A document at a time: accumulated gradients, and the sum of the losses."""
    total = torch.zeros((), dtype=torch.float64)
    for document in documents:
        inputs = batch_of(model, document)
        loss = model(**inputs, labels=inputs["input_ids"], num_items_in_batch=num_items, z_loss=z_loss).loss
        loss.backward()
        total += loss.detach()
    return total


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def by_hand(model, z_loss: float) -> float:
    """eq. 2 and text, document by document, from logits."""
    total = 0.0
    for document in DOCUMENTS:
        at = next(index for index, part in enumerate(document) if isinstance(part, Picture))
        picture, after = document[at], document[at + 1 :]
        codes = (codes_of(model, picture) + TEXT_ROWS).tolist()
        lengths = [1, 4, 9] if picture.grid == SQUARE else [1, 2, 8]
        weights = [length**-0.9 for length in lengths for _ in range(length)]
        predicted = [*document[1:at], BOI, *codes, *after]  # <eoi> is no target; its own is the next token
        weighted = [1] * at + [w * len(codes) / sum(weights) for w in weights] + [1] * len(after)
        logits = model(**batch_of(model, document)).logits[0]
        log_sums = logits.logsumexp(-1).tolist()
        for i, (target, weight) in enumerate(zip(predicted, weighted)):
            total += weight * (log_sums[i] - logits[i, target].item() + z_loss * log_sums[i] ** 2)
    return total / sum(map(weight_of, DOCUMENTS))


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_eight_accumulated_are_one_batch(z_loss):
    model = tiny_model().double().train()
    num_items = torch.tensor(float(sum(map(weight_of, DOCUMENTS))))
    accumulated = optimizer_step(model, DOCUMENTS, num_items, z_loss)
    accumulated_gradients = gradients(model)

    model = tiny_model().double().train()
    inputs = batch_of(model, *DOCUMENTS)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, IGNORE)
    whole = model(**inputs, labels=labels, z_loss=z_loss).loss
    whole.backward()

    with torch.no_grad():
        expected = by_hand(model, z_loss)
    for loss in (accumulated, whole):
        assert loss.item() == pytest.approx(expected, rel=1e-6)
    for name, gradient in gradients(model).items():
        assert relative(accumulated_gradients[name], gradient) < 1e-6, name
