"""Muon for the matrices of the transformer's layers, AdamW for everything else, as one optimizer."""

from collections.abc import Callable, Iterable

import torch
from torch import nn


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
        self._muon = torch.optim.Muon(muon, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        decayed = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
        self._adamw = torch.optim.AdamW(decayed, lr=lr, weight_decay=weight_decay, betas=betas)
        super().__init__([*self._muon.param_groups, *self._adamw.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Both see the groups and states of the whole, which the scheduler changes and checkpoints hold."""
        self._muon.param_groups, self._adamw.param_groups = self.param_groups[:1], self.param_groups[1:]
        self._muon.state = self._adamw.state = self.state

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure=None) -> None:
        self._muon.step()
        self._adamw.step()
