"""The recipe's optimizer: torch's Muon and AdamW in one, and resumable."""

import copy

import pytest
import torch
from torch import nn

from examples.emoji.muon import MuonWithAdamW, orthogonalized
from tests.fresh import run

TWO_PROCESSES = """
import torch
import torch.distributed as dist

from tests.emoji.test_muon import model, optimizer, train
from tests.ranks import on_ranks


def work():
    dist.init_process_group("gloo")
    module = model()
    train(module, optimizer(module), range(3))
    torch.save(module.state_dict(), f"{dist.get_rank()}.pt")


on_ranks(work)
"""


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "layers": nn.ModuleList([*(nn.Linear(24, 24) for _ in range(3)), nn.Linear(24, 60)]),
            "head": nn.Linear(60, 8),
        }
    )


def optimizer(module: nn.Module) -> MuonWithAdamW:
    return MuonWithAdamW(module.named_parameters(), lambda name: name.startswith("layers"), 0.02, 0.1, (0.9, 0.95))


def train(module: nn.Module, optimizer: torch.optim.Optimizer, seeds) -> None:
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for parameter in module.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def test_it_moves_as_muon_and_adamw_of_torch_do():
    ours, theirs = model(), model()
    train(ours, optimizer(ours), range(3))
    layers, head = theirs["layers"], theirs["head"]
    matrices = [layer.weight for layer in layers]
    muon = torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    biases = {"params": [*(layer.bias for layer in layers), head.bias], "weight_decay": 0.0}
    adamw = torch.optim.AdamW([{"params": [head.weight]}, biases], lr=0.02, weight_decay=0.1, betas=(0.9, 0.95))
    for seed in range(3):
        train(theirs, muon, [seed])
        adamw.step()
    for (name, own), other, start in zip(ours.named_parameters(), theirs.parameters(), model().parameters()):
        moved, by_muon = (other - start).norm(), name.startswith("layers") and name.endswith("weight")
        assert moved > 0 and (own - other).norm() < (0.02 * moved if by_muon else 1e-6), name  # theirs in bfloat16


@pytest.mark.parametrize("shape", [(16, 16), (48, 16), (16, 48)])
def test_singular_values_come_near_one_and_directions_stay(shape):
    torch.manual_seed(1)
    matrices = torch.randn(3, *shape)
    found = orthogonalized(matrices)
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    sizes = torch.linalg.svdvals(found)
    assert 0.4 < sizes.min() and sizes.max() < 1.3
    torch.testing.assert_close(left @ (left.mT @ found @ right.mT) @ right, found, atol=1e-4, rtol=1e-4)
    inner = (left.mT @ found @ right.mT).abs()
    assert (inner - torch.diag_embed(inner.diagonal(dim1=-2, dim2=-1))).max() < 1e-3


def test_it_goes_on_from_its_state():
    whole, parts = model(), model()
    train(whole, optimizer(whole), range(4))
    first = optimizer(parts)
    train(parts, first, range(2))
    second = optimizer(parts)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train(parts, second, range(2, 4))
    for own, other in zip(parts.parameters(), whole.parameters()):
        assert torch.equal(own, other)


def test_processes_share_the_work(tmp_path):
    """Of matrices of one shape, one process has two and the other one, or none."""
    whole = model()
    train(whole, optimizer(whole), range(3))
    run("-c", TWO_PROCESSES, folder=tmp_path)
    for rank in range(2):
        for name, value in torch.load(tmp_path / f"{rank}.pt", weights_only=True).items():
            torch.testing.assert_close(value, whole.state_dict()[name], msg=name)


def test_a_schedule_changes_the_rate_of_all():
    module = model()
    found = optimizer(module)
    before = copy.deepcopy(module.state_dict())
    for group in found.param_groups:
        group["lr"] = 0.0
    train(module, found, range(2))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
