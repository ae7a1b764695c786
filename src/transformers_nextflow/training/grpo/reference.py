"""[`Reference`]: the policy as it was handed over, which eq. 5 holds the trained one to."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from ...utils.files import write_atomically
from ..fsdp import let_go, local_part, sharded_like, whole_tensor


class Reference:
    """A copy of what is trained of a model, be it adapters, parts or all of it; the rest is the model's own.

    Differs from TRL, whose reference is the model without its adapters, with a copy of them, or loaded anew: this is
    one way for all, and takes no more memory than what is trained.
    """

    def __init__(self, model: torch.nn.Module):
        self.model = model
        self.trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.weights = {name: parameter.detach().clone() for name, parameter in self.trained.items()}

    def shard(self, model: torch.nn.Module) -> None:
        """Take the parameters that training has put in the place of those that the model was handed over with."""
        self.model, parameters = model, dict(model.named_parameters())
        self.trained = {name: parameters[name] for name in self.trained}
        self.weights = {name: sharded_like(self.weights[name], own.detach()) for name, own in self.trained.items()}

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """While this runs the model is the reference; for forwards without gradient."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        let_go(self.model)
        for name, parameter in self.trained.items():
            policy, reference = local_part(parameter.detach()), local_part(self.weights[name])
            kept = policy.clone()
            policy.copy_(reference)
            reference.copy_(kept)

    def follow(self, share: float) -> None:
        """Go the share of the way to the policy."""
        for name, parameter in self.trained.items():
            local_part(self.weights[name]).lerp_(local_part(parameter.detach()), share)

    def save(self, path: Path, should_save: bool) -> None:
        """Write it where `should_save`; all processes call this together."""
        weights = {name: whole_tensor(weight).contiguous() for name, weight in self.weights.items()}
        if should_save:
            write_atomically(path, lambda partial: save_file(weights, partial))

    def load(self, path: Path) -> None:
        for name, weight in load_file(path).items():
            own = self.weights[name]
            local_part(own).copy_(local_part(sharded_like(weight, own)))


class FollowPolicy(TrainerCallback):
    """Lets a reference follow the policy every `ref_model_sync_steps` by `ref_model_mixup_alpha`, as TRL's does."""

    def __init__(self, reference: Reference):
        self.reference = reference

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % args.ref_model_sync_steps == 0:
            self.reference.follow(args.ref_model_mixup_alpha)
