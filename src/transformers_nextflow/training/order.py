"""[`OrderedTrainer`]: a resumed training sees what an undisturbed one sees, an evaluation each of its items once."""

import re
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Dataset, Sampler, Subset
from transformers import Trainer, TrainingArguments
from transformers.utils import logging

from ..sampling import integer
from .checkpoints import BY_METRIC, SavingTrainer
from .measuring import MeasuringTrainer

logger = logging.get_logger(__name__)


class EpochOrder(Sampler[int]):
    """A permutation of all items by seed and epoch, the same on every rank; the Trainer deals it out."""

    def __init__(self, num_items: int, seed: int):
        self.num_items, self.seed, self.epoch = num_items, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_items

    def __iter__(self):
        yield from np.random.default_rng([self.seed, self.epoch]).permutation(self.num_items).tolist()


class WithEpoch(Sampler[tuple[int, int]]):
    """Each of an order's indices with the order's epoch."""

    def __init__(self, order: EpochOrder):
        self.order = order

    def set_epoch(self, epoch: int) -> None:
        self.order.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for index in self.order:
            yield self.order.epoch, index


def told_epochs(dataset: Dataset) -> list:
    """The datasets with `set_epoch` that one is, or that torch's own consist of."""
    if isinstance(dataset, ConcatDataset):
        return [each for part in dataset.datasets for each in told_epochs(part)]
    if isinstance(dataset, Subset):
        return told_epochs(dataset.dataset)
    return [dataset] if hasattr(dataset, "set_epoch") else []


class ToldEpochs(Dataset):
    """A dataset of [`told_epochs`] as items of (epoch, index): each index says its epoch, since workers that outlive
    an epoch see nothing of what the main process sets."""

    def __init__(self, dataset: Dataset):
        self.dataset, self.told = dataset, told_epochs(dataset)
        self.epoch: int | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, place: tuple[int, int]):
        epoch, index = place
        if epoch != self.epoch:
            for each in self.told:
                each.set_epoch(epoch)
            self.epoch = epoch
        return self.dataset[index]


class EvenShares(Dataset):
    """A dataset whose first items come again, blank, until it divides by `multiple`: devices get as many batches each,
    none waits for another, none is dropped, and no item counts twice.

    Args:
        blank: makes an item into one of its kind that does not count.
    """

    def __init__(self, dataset: Dataset, multiple: int, blank: Callable[[dict], dict]):
        self.dataset, self.blank = dataset, blank
        self.length = -(-len(dataset) // multiple) * multiple

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        count = len(self.dataset)
        return self.dataset[index] if index < count else self.blank(self.dataset[index % count])


OWN_STEPS = {"remove_unused_columns": False, "neftune_noise_alpha": None, "include_num_input_tokens_seen": "no"}
OWN_STEPS |= {"bf16_full_eval": False, "fp16_full_eval": False, "use_liger_kernel": False}
"""What trainers with steps of their own heed of further options, see [`check_heeded`]."""


def check_heeded(arguments: TrainingArguments, **others) -> None:
    """Raise a `ValueError` for options that the trainers of this package would not heed, and sizes below 1.

    Of several GPUs in one process all but the first are left alone: `DataParallel` would cut tensors by rows.

    Args:
        others: the only values of further options that this trainer heeds.
    """
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        integer(name, getattr(arguments, name), 1)
    if arguments.fp16 and arguments.device.type == "cpu":
        raise ValueError("fp16 is for GPUs, this device is cpu: take bf16, or float32")
    for name, heeded in ({"label_smoothing_factor": 0.0, "train_sampling_strategy": "random"} | others).items():
        if getattr(arguments, name) != heeded:
            raise ValueError(f"{name} is not for this trainer: leave {heeded!r}, got {getattr(arguments, name)!r}")
    if arguments.accelerator_config.dispatch_batches or arguments.accelerator_config.split_batches:
        raise ValueError(
            "dispatch_batches is not for this trainer, nor is split_batches: they cut what one device has loaded, by "
            "rows, which pictures of a batch have others than texts; leave them out, every device loads its own"
        )
    if not arguments.accelerator_config.use_seedable_sampler:
        raise ValueError("use_seedable_sampler is to stay: rows in an order of torch's random numbers are not resumed")
    if arguments.warmup_steps and arguments.lr_scheduler_type in ("constant", *BY_METRIC):
        raise ValueError(
            f"lr_scheduler_type {arguments.lr_scheduler_type.value!r} heeds no warmup_steps, got "
            f"{arguments.warmup_steps}: leave them out, or take 'constant_with_warmup'"
        )
    if arguments.n_gpu > 1:
        logger.warning(f"1 of {arguments.n_gpu} GPUs is used: start by `accelerate launch` to use all")
        arguments._n_gpu = 1


def refuse_shared_weights(trainer: Trainer) -> None:
    """Raise a `ValueError` where devices share the weights of a trainer that takes them whole."""
    shared = trainer.is_deepspeed_enabled and trainer.accelerator.state.deepspeed_plugin.zero_stage == 3
    if trainer.is_fsdp_enabled or shared:
        raise ValueError(f"{type(trainer).__name__} takes whole weights on every device: use DDP, not FSDP or ZeRO-3")


def judge_by(metric: str, arguments: TrainingArguments) -> None:
    """Let the best model, and a learning rate that follows a metric, go by this one, unless `metric_for_best_model`
    says otherwise; and by the lowest of what is a loss, a KL or LPIPS, as `eval_loss_text`, unless `greater_is_better`
    does: `TrainingArguments` know a loss by the end of its name alone. To be called before their own
    `__post_init__`."""
    judges = arguments.load_best_model_at_end or arguments.save_strategy == "best"
    if arguments.metric_for_best_model is None and (judges or arguments.lr_scheduler_type in BY_METRIC):
        arguments.metric_for_best_model = metric
    words = re.split("[_/]", arguments.metric_for_best_model or "")
    if arguments.greater_is_better is None and {"loss", "kl", "lpips"} & set(words):
        arguments.greater_is_better = False


class OrderedTrainer(SavingTrainer):
    """Trainer whose data comes in an [`EpochOrder`], by `data_seed` or else `seed`.

    Datasets with `set_epoch` are told the epoch, in every worker, inside of torch's `Subset` and `ConcatDataset` too.
    Devices share an evaluation, or a prediction, by [`EvenShares`].
    """

    _unnamed: Dataset | None = None  # that a loader may be kept of

    def blank(self, item: dict) -> dict:
        """An item of an evaluation that does not count."""
        raise NotImplementedError

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None):
        """See `Trainer.get_eval_dataloader`, which takes one loader of workers that stay for all unnamed datasets."""
        if not isinstance(eval_dataset, str):
            unnamed = self.eval_dataset if eval_dataset is None else eval_dataset
            if unnamed is not self._unnamed:
                vars(self).get("_eval_dataloaders", {}).pop("eval", None)
            self._unnamed = unnamed
        return super().get_eval_dataloader(eval_dataset)

    def _get_dataloader(self, dataset, description, batch_size, sampler_fn=None, is_training=False, **kwargs):
        shares = self.args.world_size // self.get_tp_size()
        if is_training and told_epochs(dataset):
            order = WithEpoch(sampler_fn(dataset))
            dataset, sampler_fn = ToldEpochs(dataset), lambda _: order
        elif not is_training and (shares > 1 or self.args.dataloader_drop_last):
            dataset = EvenShares(dataset, batch_size * shares, self.blank)
        return super()._get_dataloader(dataset, description, batch_size, sampler_fn, is_training, **kwargs)

    def _get_train_sampler(self, train_dataset=None) -> Sampler:
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return EpochOrder(len(self.train_dataset if train_dataset is None else train_dataset), seed)


class PicturesTrainer(MeasuringTrainer, OrderedTrainer):
    """[`OrderedTrainer`] on batches of pictures, each of which counts as much in a step, however it is split."""

    loss_is_scaled_for_ga = True

    def count(self, inputs: dict) -> int:
        """The pictures of a forward."""
        raise NotImplementedError

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor:
        """The mean over devices, whose gradients' mean is taken, too."""
        own = torch.tensor([sum(map(self.count, batch_samples))], device=device)
        return self.accelerator.gather(own).float().mean()
