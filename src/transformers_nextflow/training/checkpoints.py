"""Which checkpoint a training goes on from, also after it was killed while it wrote one; and what a model's folder is.

[`SavingTrainer`] is what the trainers of this package have in common.
"""

import os
import re
from collections.abc import Iterator, Sized
from contextlib import contextmanager
from dataclasses import field
from pathlib import Path
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer
from transformers.utils import logging

from ..lora import below_adapters
from ..stored_tokenizer import PREFIX, tensors_referred_to
from ..utils.files import read_json
from .ema import FOLDER, STATE, EMACallback, end_whole

logger = logging.get_logger(__name__)

BY_METRIC = ("greedy", "reduce_lr_on_plateau")  # learning rates


def output_field():
    """The field `output_dir` of training arguments, which all commands call `--output`."""
    return field(default=None, metadata={"help": "folder of checkpoints and of the result", "aliases": ["--output"]})


def checkpoint_to_resume(resume_from_checkpoint: str | bool | None, output_dir: str) -> str | None:
    """What to hand to `Trainer.train`, which would take a checkpoint in parts for a whole one.

    Args:
        resume_from_checkpoint: as of `Trainer.train`: a folder, or `True` for the newest whole one in `output_dir`; a
            command line says "True".

    Returns:
        The folder; `None` to begin anew.

    Raises:
        ValueError: if that folder is no whole checkpoint, or there is none.
    """
    if not resume_from_checkpoint:
        return None
    if resume_from_checkpoint not in (True, "True"):
        _check_whole(Path(str(resume_from_checkpoint)))
        return str(resume_from_checkpoint)
    newest = newest_checkpoint(output_dir)
    if newest is None:
        raise ValueError(f"there is no whole checkpoint in {output_dir}: start without resume_from_checkpoint")
    return newest


def newest_checkpoint(output_dir: str | Path) -> str | None:
    """The newest whole one; `None` where there is none."""
    found = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in Path(output_dir).glob("checkpoint-*")]
    for _, path in sorted(((int(match[1]), path) for match, path in found if match), reverse=True):
        try:
            _check_whole(path)
        except ValueError:
            continue
        return str(path)
    return None


def _check_whole(checkpoint: Path) -> None:
    """Raise a `ValueError` for anything but a checkpoint that was written to its end, and whose files have theirs."""
    if not (checkpoint / STATE).is_file():
        raise ValueError(f"{checkpoint} is no whole checkpoint: it has no {STATE}")
    for path in sorted(checkpoint.iterdir()):
        try:
            if path.suffix == ".json":
                read_json(path)
            elif path.suffix == ".safetensors":
                with safe_open(path, framework="pt"):
                    pass
            elif path.suffix in (".pt", ".pth", ".bin") and not is_zipfile(path):
                raise ValueError("it ends too soon")
        except (ValueError, SafetensorError) as error:
            raise ValueError(f"{checkpoint} is no whole checkpoint, {path.name} is damaged: {error}") from error


@contextmanager
def of_this_training(checkpoint: str) -> Iterator[None]:
    """Raise what torch says of weights, of an optimizer's or a scheduler's state or of files that do not fit as a
    `ValueError` that names the checkpoint."""
    try:
        yield
    except (RuntimeError, ValueError, LookupError, FileNotFoundError) as error:
        said = " ".join(str(error).split())
        if isinstance(error, RuntimeError | ValueError) and "state dict" not in said.replace("_", " "):
            raise
        raise ValueError(
            f"{checkpoint} is of another training than this: resume with the model and the options that it was begun "
            f"with ({said[:300]})"
        ) from error


class DataOrder(TrainerCallback, ExportableState):
    """Notes in checkpoints what it follows from which data comes next."""

    def __init__(self, seed: int, items_per_step: int, items: int | None = None):
        self.seed, self.items_per_step, self.items = seed, items_per_step, items

    def state(self) -> dict:
        names = ("seed", "items_per_step", "items")
        return {"args": {name: getattr(self, name) for name in names}, "attributes": {}}

    def check(self, checkpoint: str) -> None:
        """Raise a `ValueError` for a checkpoint whose data came in another order."""
        noted = read_json(Path(checkpoint, STATE)).get("stateful_callbacks", {}).get(type(self).__name__)
        for name, before in (noted["args"] if noted else {}).items():
            if before != getattr(self, name):
                raise ValueError(
                    f"{checkpoint} was trained with {name.replace('_', ' ')} {before}, with {getattr(self, name)} its "
                    "epoch would show some items again and others not at all: resume with the same, or begin an epoch "
                    "by ignore_data_skip"
                )


class Epochs(TrainerCallback):
    """Tells the order of the data which epoch it is, below whatever wraps it: the libraries do not reach it where two
    or more processes go on within an epoch. What workers draw follows from the epoch too."""

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        if train_dataloader.generator is not None:
            train_dataloader.generator.manual_seed(args.seed + int(state.epoch))
        sampler = train_dataloader.batch_sampler
        while hasattr(sampler, "batch_sampler"):
            sampler = sampler.batch_sampler
        order = getattr(sampler, "sampler", None)  # streams have none
        if hasattr(order, "set_epoch"):
            order.set_epoch(int(state.epoch))


class SavingTrainer(Trainer):
    """Trainer that goes on from whole checkpoints alone, where these were in the order of the data, and saves the
    average of an [`EMACallback`] beside the model.

    Of a model without its vision tokenizer, `save_model` brings it into the folder, and so do checkpoints that go to
    the Hub, while others refer to it.

    Raises:
        ValueError: for devices that share sequences, by context or sequence parallelism.
    """

    _brings_tokenizer = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.get_cp_size() * self.get_sp_size() > 1:
            raise ValueError("context and sequence parallelism would cut pictures: leave cp_size and sp_size at 1")
        own = self.args
        seed = own.seed if own.data_seed is None else own.data_seed
        per_step = self.get_total_train_batch_size(own)
        count = len(self.train_dataset) if isinstance(self.train_dataset, Sized) else None  # of streams
        self._data_order = DataOrder(seed, per_step, count)
        self.add_callback(self._data_order)
        self.add_callback(Epochs())

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """See `Trainer.train`. `True` goes on from the newest whole checkpoint in `output_dir`, whatever a killed run
        left beside it; one that has made all its steps is loaded and makes none.

        Raises:
            ValueError: if what should be resumed is no whole checkpoint, or was trained on data in another order.
        """
        self.args.resume_from_checkpoint = checkpoint_to_resume(resume_from_checkpoint, self.args.output_dir)
        if self.args.resume_from_checkpoint and not (self.args.ignore_data_skip or self.args.auto_find_batch_size):
            self._data_order.check(self.args.resume_from_checkpoint)
        shares_weights = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if self.args.world_size > 1 and not shares_weights and "_is_accelerate_prepared" in vars(self.model):
            del self.model._is_accelerate_prepared  # for an evaluation, after which devices would share no gradients
            self.model_wrapped = self.model
        return super().train(self.args.resume_from_checkpoint, *args, **kwargs)

    def create_scheduler(self, *args, **kwargs):
        """See `Trainer.create_scheduler`, where rates that go by a metric go by the lowest, whatever is better."""
        given = self.args.lr_scheduler_kwargs
        if self.args.lr_scheduler_type in BY_METRIC and self.args.greater_is_better:
            self.args.lr_scheduler_kwargs = {"mode": "max"} | (given or {})
        try:
            return super().create_scheduler(*args, **kwargs)
        finally:  # the arguments are the caller's, for whom another rate may come next
            self.args.lr_scheduler_kwargs = given

    def _get_dataloader(self, *args, **kwargs) -> DataLoader:
        """See `Trainer._get_dataloader`. Loaders draw from generators of their own: those whose workers outlive an
        epoch do so once, and again where a training is resumed, which would then draw other numbers."""
        loader = super()._get_dataloader(*args, **kwargs)
        getattr(loader, "base_dataloader", loader).generator = torch.Generator().manual_seed(self.args.seed)
        return loader

    def _init_training_state(self, max_steps: int, *args) -> tuple[int, int]:
        """See `Trainer._init_training_state`, which would go on with the intervals of logs, evaluations and
        checkpoints that the training had, and fail at callbacks that it had not."""
        begun = super()._init_training_state(max_steps, *args)
        self.state.compute_steps(self.args, max_steps)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ExportableState):
                self.state.stateful_callbacks.setdefault(type(callback).__name__, {})
        return begun

    def _run_epoch(self, *args, **kwargs) -> None:
        if self.state.global_step >= self.state.max_steps:  # resumed at its end, where the Trainer would go on
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)
            self.optimizer.eval()  # the weights of a schedule-free one are then those it has found

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        with of_this_training(resume_from_checkpoint):
            self._load_weights(resume_from_checkpoint, model)

    def _load_weights(self, checkpoint: str, model=None) -> None:
        """Those of a checkpoint into the model."""
        super()._load_from_checkpoint(checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not any(Path(str(checkpoint)).glob("rng_state*.pth")):  # which every other checkpoint has
            raise ValueError(f"{checkpoint} holds weights alone, by save_only_model: begin with it as the model")
        if isinstance(self.optimizer.optimizer, LayerWiseDummyOptimizer):
            raise ValueError(f"{checkpoint} has no state of a layerwise optimizer: begin with it as the model")
        before = [dict(group) for group in self.optimizer.param_groups]
        with of_this_training(str(checkpoint)):
            super()._load_optimizer_and_scheduler(checkpoint)
        groups = list(zip(before, self.optimizer.param_groups, strict=True))  # what was loaded took their place
        if any(options.keys() - loaded.keys() for options, loaded in groups):
            own = type(self.optimizer.optimizer).__name__
            raise ValueError(f"{checkpoint} has the state of another optimizer than {own}: resume with the one it has")
        changed = {
            name for own, loaded in groups for name in own.keys() - {"params", "lr"} if own[name] != loaded[name]
        }
        if changed:
            logger.warning(
                f"{checkpoint} goes on with its own {', '.join(sorted(changed))}: to train with others, begin with it "
                "as the model"
            )

    def _averages(self) -> list[EMACallback]:
        callbacks = self.callback_handler.callbacks
        return [each for each in callbacks if isinstance(each, EMACallback) and each.averages]

    def _save_checkpoint(self, model, trial) -> None:
        self.optimizer.eval()
        if self.args.should_save:
            end_whole(self._get_output_dir(trial), self.state)
        for average in self._averages():  # also where no callback asked for this checkpoint, as before a SIGTERM
            average.on_save(self.args, self.state, self.control)
        super()._save_checkpoint(model, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """See `Trainer.save_model`. The average of an [`EMACallback`] is saved too, in the folder `ema` beside."""
        # the Trainer's own calls without a folder, and checkpoints it copies from, are for the Hub
        self._brings_tokenizer = not _internal_call or output_dir is None or self.args.push_to_hub
        super().save_model(output_dir, _internal_call)
        for average in self._averages():
            with average.in_place():
                super().save_model(os.path.join(output_dir or self.args.output_dir, FOLDER), _internal_call=True)

    def create_model_card(self, *args, **kwargs) -> None:
        """See `Trainer.create_model_card`, whose cards are of models with a config."""
        if hasattr(self.model, "config"):
            super().create_model_card(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        model = self.accelerator.unwrap_model(self.model)
        config = getattr(below_adapters(model), "config", None)
        reference = getattr(config, "vision_tokenizer", None)
        if not (self._brings_tokenizer and self.args.should_save and reference) or hasattr(model, "peft_config"):
            return super()._save(output_dir, state_dict)
        state_dict = model.state_dict() if state_dict is None else state_dict
        tokenizer = {PREFIX + name: tensor for name, tensor in tensors_referred_to(config).items()}
        config.vision_tokenizer = None
        try:
            super()._save(output_dir, state_dict | tokenizer)
        finally:
            config.vision_tokenizer = reference
