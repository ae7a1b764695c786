"""Muon for the matrices of the transformer's layers, AdamW for everything else, as one optimizer."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import nn

MOMENTUM = 0.95
COEFFICIENTS = 3.4445, -4.7750, 2.0315  # of five Newton-Schulz steps, which bring singular values near 1
STEPS = 5


def orthogonalized(matrices: torch.Tensor) -> torch.Tensor:
    """(n, rows, columns) with all singular values brought to about 1, by Newton-Schulz steps in the dtype given.

    `torch.optim.Muon` does the same in bfloat16, which takes a third of a training step on a CPU without AMX.
    """
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


def orthogonalized_by_all(matrices: torch.Tensor) -> torch.Tensor:
    """As [`orthogonalized`], of matrices that every process has: each brings its share of them there."""
    if not dist.is_initialized():
        return orthogonalized(matrices)
    updates = torch.empty_like(matrices)
    shares = updates.tensor_split(dist.get_world_size())
    own = dist.get_rank()
    shares[own].copy_(orthogonalized(matrices.tensor_split(len(shares))[own]))
    for rank, share in enumerate(shares):
        dist.broadcast(share, rank)
    return updates


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon at the step size that matches AdamW's for the matrices that `by_muon` names, AdamW for the others.

    Differs from the paper, whose optimizer is AdamW: at these sizes Muon needs fewer steps.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        by_muon: Callable[[str], bool],
        lr: float,
        weight_decay: float,
        betas: tuple[float, float],
    ):
        muon, matrices, others = [], [], []
        for name, parameter in named_parameters:
            if parameter.requires_grad:
                group = others if parameter.ndim < 2 else muon if by_muon(name) else matrices
                group.append(parameter)
        decayed = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
        self._adamw = torch.optim.AdamW(decayed, lr=lr, weight_decay=weight_decay, betas=betas)
        by_muon_group = {"params": muon, "lr": lr, "weight_decay": weight_decay}
        super().__init__([by_muon_group, *self._adamw.param_groups], {})
        self._share()

    def _share(self) -> None:
        """AdamW sees the groups and states of the whole, which the scheduler changes and checkpoints hold."""
        self._adamw.param_groups, self._adamw.state = self.param_groups[1:], self.state

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure=None) -> None:
        group, alike = self.param_groups[0], defaultdict(list)
        for matrix in group["params"]:
            if matrix.grad is not None:
                alike[matrix.shape].append(matrix)
        for shape, matrices in alike.items():
            updates = orthogonalized_by_all(torch.stack([self._momentum(matrix) for matrix in matrices]))
            for matrix, update in zip(matrices, updates):
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(update, alpha=-0.2 * math.sqrt(max(shape)) * group["lr"])
        self._adamw.step()

    def _momentum(self, matrix: nn.Parameter) -> torch.Tensor:
        """Nesterov's, of a matrix's gradients."""
        state = self.state[matrix]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(matrix)
        average = state["momentum_buffer"].lerp_(matrix.grad, 1 - MOMENTUM)
        return matrix.grad.lerp(average, MOMENTUM)
