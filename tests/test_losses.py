"""The joint cross-entropy against the plain one, and what it is divided by."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from tiny_models import BOI, SQUARE, TEXT_ROWS, WIDE, Picture, batch_of, codes_of, relative, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from transformers_nextflow import losses
from transformers_nextflow.losses import IGNORE

POSITIONS, WIDTH, ROWS = (2, 10), 8, (13, 7)  # text rows, codes
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
CHUNKS = pytest.mark.parametrize("at_once", [1, 3 * sum(ROWS), 2**20], ids=["1 each", "3 each", "one chunk"])


def example(dtype: torch.dtype, scale: float = 1.0) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Hidden states and rows, targets of which five are ignored, and weights of which one is 0."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(*POSITIONS, WIDTH), *((rows, WIDTH) for rows in ROWS)]
    inputs = [(scale * torch.randn(shape, generator=generator)).to(dtype).requires_grad_() for shape in shapes]
    targets = torch.randint(sum(ROWS), POSITIONS, generator=generator)
    weights = 3 * torch.rand(POSITIONS, generator=generator)
    targets[0, :4] = targets[1, 9] = IGNORE
    weights[1, 3] = 0.0
    return inputs, targets, weights


def joint_cross_entropy(hidden, text_rows, code_rows, targets, weights, z_loss=0.0):
    heads = [partial(F.linear, weight=rows) for rows in (text_rows, code_rows)]
    at, num_rows = targets != IGNORE, len(text_rows) + len(code_rows)
    total, each = losses.joint_cross_entropy(hidden[at], heads, num_rows, targets[at], weights[at], z_loss)
    return total, each.new_zeros(targets.shape).masked_scatter(at, each)


def plain(hidden, text_rows, code_rows, targets, weights, z_loss=0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """All logits at once."""
    logits = torch.cat([F.linear(hidden, text_rows), F.linear(hidden, code_rows)], dim=-1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    each = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=IGNORE)
    each = each.view_as(targets)
    squares = torch.where(targets == IGNORE, 0.0, logits.logsumexp(-1) ** 2)
    return ((each + z_loss * squares) * weights).sum(), each.detach()


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
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = value_and_gradients(plain, exact, targets, weights)
    for ours, theirs in zip(value_and_gradients(joint_cross_entropy, inputs, targets, weights), expected):
        assert ours.isfinite().all() and relative(ours.double(), theirs) < 1e-5


@pytest.mark.parametrize("trained", [(0,), (1,), (2,), (0, 2)], ids=["hidden", "text rows", "codes", "all but text"])
def test_only_what_is_trained_gets_a_gradient(trained):
    inputs, targets, weights = example(torch.float64)
    expected = value_and_gradients(plain, inputs, targets, weights)[2:]
    inputs = [tensor.detach().requires_grad_(index in trained) for index, tensor in enumerate(inputs)]
    joint_cross_entropy(*inputs, targets, weights)[0].backward()
    for index, (tensor, gradient) in enumerate(zip(inputs, expected)):
        if index in trained:
            assert relative(tensor.grad, gradient) < 1e-12
        else:
            assert tensor.grad is None


def test_a_second_backward_gives_the_same():
    inputs, targets, weights = example(torch.float64)
    total, _ = joint_cross_entropy(*inputs, targets, weights)
    first, second = (torch.autograd.grad(total * 0.3, inputs, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_nothing_supervised_is_zero():
    inputs, targets, weights = example(torch.float32)
    total, each, *gradients = value_and_gradients(
        joint_cross_entropy, inputs, torch.full_like(targets, IGNORE), weights
    )
    assert total == 0 and not any(tensor.any() for tensor in (each, *gradients))


class Largest(TorchDispatchMode):
    """Elements of the largest tensor, and how many matrix products there were."""

    def __init__(self):
        super().__init__()
        self.elements = self.products = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.products += function.overloadpacket is torch.ops.aten.mm
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_the_logits_of_all_positions_never_exist_at_once(monkeypatch):
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", 100)
    hidden = torch.randn(60, 2, requires_grad=True)
    text_rows, code_rows = torch.randn(30, 2, requires_grad=True), torch.randn(20, 2, requires_grad=True)
    targets, weights = torch.arange(60) % 50, torch.ones(60)
    with Largest() as largest:
        value_and_gradients(joint_cross_entropy, [hidden, text_rows, code_rows], targets, weights)
    assert largest.elements == 120 and largest.products == 30 * 8
    with Largest() as largest:
        value_and_gradients(plain, [hidden[None], text_rows, code_rows], targets[None], weights[None])
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
