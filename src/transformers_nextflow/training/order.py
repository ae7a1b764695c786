"""[`OrderedTrainer`]: a resumed training sees the data that an undisturbed one sees."""

import numpy as np
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback

from .checkpoints import checkpoint_to_resume


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


class OrderedTrainer(Trainer):
    """Trainer whose data comes in an [`EpochOrder`], by `data_seed` or else `seed`.

    Datasets with `set_epoch` are told the epoch. `train` goes on from whole checkpoints alone.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_callback(_Epochs(self))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """See `Trainer.train`. `True` goes on from the newest whole checkpoint in `output_dir`, whatever a killed run
        left beside it.

        Raises:
            ValueError: if what should be resumed is no whole checkpoint.
        """
        self.args.resume_from_checkpoint = checkpoint_to_resume(resume_from_checkpoint, self.args.output_dir)
        return super().train(self.args.resume_from_checkpoint, *args, **kwargs)

    def _get_train_sampler(self, train_dataset=None) -> Sampler:
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self._order = EpochOrder(len(self.train_dataset if train_dataset is None else train_dataset), seed)
        return self._order


class _Epochs(TrainerCallback):
    """Tells order and dataset which epoch it is, below whatever wraps them in a resumed or distributed run."""

    def __init__(self, trainer: OrderedTrainer):
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs):
        epoch = int(state.epoch)
        self.trainer._order.set_epoch(epoch)
        if hasattr(self.trainer.train_dataset, "set_epoch"):
            self.trainer.train_dataset.set_epoch(epoch)
