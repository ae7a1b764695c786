"""[`EMACallback`]: an exponential moving average of the weights that a Trainer trains."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..utils.files import write_atomically
from .fsdp import let_go, local_part, sharded_like, whole_tensor

FILE = "ema.safetensors"
FOLDER = "ema"
STATE = "trainer_state.json"  # the Trainer writes it last


class EMACallback(TrainerCallback):
    """After every optimizer step `average = decay * average + (1 - decay) * weights`, for any Trainer.

    The average of all parameters that are trained, in float32, begins at the weights that training begins with. Every
    checkpoint holds it as `ema.safetensors`, by the parameters' names; a resumed training goes on from it. Weights
    sharded by FSDP2 have sharded averages, and whole ones in the file. This package's Trainers save the average beside
    their model, as a model like it in the folder `ema`.

    ```python
    with average.in_place():
        trainer.evaluate()
    ```

    The checkpoint that a training resumes from is `args.resume_from_checkpoint` where that is set, as this package's
    Trainers do, or else the one of its step in `args.output_dir`. With `load_best_model_at_end` the average at the end
    is that of the best checkpoint.

    Args:
        decay: in [0, 1).
        warmup: whether the decay is reached by (1 + step) / (10 + step), so that the first weights are soon forgotten.

    Attributes:
        averages: by parameter name, while training and after it.

    Raises:
        ValueError: for other decays; in training if the checkpoint resumed from has no average of these parameters,
            for weights that DeepSpeed's ZeRO-3 shards, or in a search of hyperparameters.
    """

    def __init__(self, decay: float = 0.999, warmup: bool = False):
        if not 0 <= decay < 1:
            raise ValueError(f"decay must lie in [0, 1), got {decay}")
        self.decay, self.warmup = decay, warmup
        self.averages: dict[str, torch.Tensor] = {}

    def copy_to(self, model: nn.Module) -> None:
        """Put the averages in the place of the weights of the trained model, of a part of it, or of one like it.

        Raises:
            ValueError: if it has none of the averaged parameters.
        """
        let_go(self._model)
        prefixes = {id(module): f"{path}." for path, module in self._model.named_modules() if path}
        prefix = prefixes.get(id(model), "")
        averaged = {name: p for name, p in model.named_parameters() if prefix + name in self.averages}
        if not averaged:
            raise ValueError(f"the model has none of the averaged parameters, such as {next(iter(self.averages))}")
        for name, parameter in averaged.items():
            local_part(parameter.detach()).copy_(local_part(self.averages[prefix + name]))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """While this runs the trained model is the average."""
        weights = {name: local_part(parameter.detach()).clone() for name, parameter in self._parameters.items()}
        self.copy_to(self._model)
        try:
            yield
        finally:
            let_go(self._model)
            for name, weight in weights.items():
                local_part(self._parameters[name].detach()).copy_(weight)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._model = model
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if any(hasattr(parameter, "ds_id") for parameter in self._parameters.values()):
            raise ValueError("EMACallback cannot average weights that ZeRO-3 shards: train with ZeRO-2 or FSDP2")
        if state.is_hyper_param_search:
            raise ValueError("EMACallback is for one training, runs of a search have folders that it does not know")
        self.averages = {name: p.detach().float().clone() for name, p in self._parameters.items()}
        self._saved = None
        if state.global_step:
            self._load(Path(args.resume_from_checkpoint or _checkpoint(args.output_dir, state)) / FILE)

    @torch.no_grad()
    def on_optimizer_step(self, args, state, control, **kwargs):
        step = state.global_step
        decay = min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay
        for name, parameter in self._parameters.items():
            local_part(self.averages[name]).lerp_(local_part(parameter).float(), 1 - decay)

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_save:  # before the Trainer's files, so that a checkpoint that looks whole has it
            if args.should_save:
                end_whole(args.output_dir, state)
            self._save(args, state)

    on_epoch_end = on_step_end

    def on_save(self, args, state, control, **kwargs):
        if self._saved != state.global_step:  # an evaluation decided on this checkpoint
            self._save(args, state)

    def on_train_end(self, args, state, control, **kwargs):
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._load(Path(state.best_model_checkpoint) / FILE)

    def _save(self, args, state) -> None:
        whole = {}
        for name, average in self.averages.items():
            average = whole_tensor(average)
            if args.should_save:
                whole[name] = average.cpu().contiguous()  # as weights with channels last are not
        self._saved = state.global_step
        if args.should_save:
            path = _checkpoint(args.output_dir, state) / FILE
            write_atomically(path, lambda partial: save_file(whole, partial, metadata={"format": "pt"}))

    def _load(self, path: Path) -> None:
        if not path.is_file():
            raise ValueError(f"there is no {path}: the training to resume kept no average")
        with safe_open(path, framework="pt") as file:
            if different := sorted(self.averages.keys() ^ file.keys()):
                raise ValueError(f"{path} holds other parameters than are trained, the first is {different[0]}")
            for name, average in self.averages.items():
                local_part(average).copy_(local_part(sharded_like(file.get_tensor(name), average)))


def _checkpoint(output_dir: str, state) -> Path:
    return Path(output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")


def end_whole(output_dir: str, state) -> None:
    """Let a checkpoint of an earlier run look whole no more, before that of this step takes its place file by file."""
    (_checkpoint(output_dir, state) / STATE).unlink(missing_ok=True)
