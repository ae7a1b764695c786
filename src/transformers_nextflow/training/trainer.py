"""[`NextFlowTrainer`]: transformers' Trainer on packed documents, its loss exact over any split of a step."""

import os
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from math import inf

import numpy as np
import torch
from transformers import TrainerCallback, TrainingArguments

from ..attention import attended_pairs
from ..data.costs import CostModel
from ..data.loading import PackCollator
from ..lora import below_adapters
from ..losses import IGNORE
from ..modeling_nextflow import NextFlowOutput
from .attention_logits import LargestAttentionLogit
from .checkpoints import output_field
from .fsdp import WholeHeadsCallback
from .loading import PrecisionTrainer
from .measuring import refuse_functions_of_outputs
from .order import OrderedTrainer, check_heeded, judge_by


@dataclass
class NextFlowTrainingArguments(TrainingArguments):
    """`TrainingArguments` with other defaults: packs are batches already, and their columns are the forward's.

    Args:
        peak_flops (`float`, *optional*):
            Of one device, in FLOP/s; with it the model FLOPs utilisation is logged as `mfu`.
        z_loss (`float`, defaults to 0.0):
            Coefficient of the squared log-sum-exp added to every target's cross-entropy, and weighed like it, in
            `loss` alone; 0 is the paper's loss.
        log_attention_logits (`bool`, defaults to `True`):
            Whether `max_attention_logit` is logged, which costs half of the attention's forward in the batch before
            each log.

    Raises:
        ValueError: for a negative or infinite `z_loss`, or an option that is not heeded ([`~order.check_heeded`]).
    """

    output_dir: str | None = output_field()
    per_device_train_batch_size: int = field(default=1, metadata={"help": "packs of a forward on each device"})
    remove_unused_columns: bool = field(default=False, metadata={"help": "packs hold what the forward takes"})
    peak_flops: float | None = field(default=None, metadata={"help": "FLOP/s of one device, to log its utilisation"})
    z_loss: float = field(default=0.0, metadata={"help": "coefficient of the squared log-sum-exp in the loss"})
    log_attention_logits: bool = field(default=True, metadata={"help": "log the largest attention logit"})

    def __post_init__(self):
        if not (self.bf16 or self.fp16):  # what `accelerate launch` says, which DeepSpeed compares with these
            self.bf16, self.fp16 = (os.environ.get("ACCELERATE_MIXED_PRECISION") == name for name in ("bf16", "fp16"))
        judge_by("loss", self)
        super().__post_init__()
        check_heeded(self, average_tokens_across_devices=True)
        if not 0 <= self.z_loss < inf:
            raise ValueError(f"z_loss must be a finite number of at least 0, got {self.z_loss}")


class NextFlowTrainer(PrecisionTrainer, OrderedTrainer):
    """Trains [`NextFlowForConditionalGeneration`], or adapters on it, on packs.

    Differs from `Trainer`, beside what [`~order.OrderedTrainer`] does:

    - An optimizer step's loss is the weighted sum over all its targets by the sum of their weights, however they are
      split over accumulation steps and devices. Scale weights sum to the number of codes in every image (eq. 2), so
      the sum of all weights is the number of targets.
    - Beside `loss` are logged the unweighted cross-entropies `loss_text`, `loss_vision` and `loss_scale_1` .. (the
      paper's fig. 11), `tokens_per_second` of real tokens, `flops_per_second` by attended pairs, and `mfu`.
    - `max_attention_logit` is logged too: the largest query x key x scaling that entered a softmax in the last batch
      before the log, over all layers, heads and devices. Only that batch's forward computes it, see
      [`~attention_logits.LargestAttentionLogit`].
    - Packs show stored self-corrected variants by epoch.
    - An evaluation's `eval_loss` is exact over all its targets, however they are split, and `eval_loss_text`,
      `eval_loss_vision` and `eval_loss_scale_1` .. stand beside it.

    Args:
        train_dataset: [`~transformers_nextflow.data.PackedDataset`], or anything with its items.
        data_collator: by default [`~transformers_nextflow.data.PackCollator`] of the dataset.

    Raises:
        ValueError: for streams, or other datasets without a `data_collator`; if the packs do not divide evenly over an
            optimizer step's devices and accumulation; for functions of outputs, as `compute_metrics`, since logits of
            whole packs are never made.
    """

    def __init__(self, model=None, args=None, data_collator=None, train_dataset=None, **kwargs):
        refuse_functions_of_outputs(kwargs)
        held_out = kwargs.get("eval_dataset")
        held_out = list(held_out.values()) if isinstance(held_out, dict) else [held_out]
        known = [dataset for dataset in (train_dataset, *held_out) if dataset is not None]
        if data_collator is None and known:
            _check_packs(known)
            data_collator = PackCollator(known[0])
        if train_dataset is not None and not hasattr(train_dataset, "__len__"):
            kind = type(train_dataset).__name__
            raise ValueError(f"train_dataset must have a length and items by number, got {kind}")
        super().__init__(model, args, data_collator, train_dataset, **kwargs)
        if isinstance(self.data_collator, PackCollator):
            self.data_collator.config = self._nextflow.config  # whose scale weights a stage may have changed
        per_step = self._data_order.items_per_step
        if train_dataset is not None and len(train_dataset) % per_step:
            raise ValueError(
                f"{len(train_dataset)} packs or documents do not divide by the {per_step} of an optimizer step (batch "
                f"size x devices x accumulation): pack with --multiple-of {per_step}, or give as many documents"
            )
        self.label_names = ["shift_labels"]
        self._measured, self._evaluated = (Measured(self._nextflow.model.schedules.max_scales) for _ in range(2))
        self._costs = CostModel.from_config(self._nextflow.config)
        self.add_callback(_Clock(self))
        self.add_callback(WholeHeadsCallback())

    @property
    def _nextflow(self):
        """The model below the wrappers of devices and adapters."""
        return below_adapters(self.accelerator.unwrap_model(self.model))

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | None:
        """See `Trainer._get_num_items_in_batch`, which looks for `labels` before it counts `shift_labels`."""
        targets = [{"labels": None, "shift_labels": batch["shift_labels"]} for batch in batch_samples]
        return super()._get_num_items_in_batch(targets, device)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = {**inputs, "logits_over": "none", "use_cache": False, "return_dict": True}
        if model.training:
            inputs["z_loss"] = getattr(self.args, "z_loss", 0.0)
        else:
            inputs["num_items_in_batch"] = 1.0  # the sum over the batch, which as an argument would be scaled
            num_items_in_batch = None
        watched = model.training and getattr(self.args, "log_attention_logits", True) and self._log_follows()
        with LargestAttentionLogit(self._nextflow.model) if watched else nullcontext() as largest:
            loss, outputs = super().compute_loss(
                model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
            )
        if model.training:
            self._measured.add(outputs, inputs)
        else:
            self._evaluated.add(outputs, inputs, float(outputs.loss))
        if watched:
            self._measured.max_attention_logit = largest.value
        return (loss, outputs) if return_outputs else loss

    def _log_follows(self) -> bool:
        """Whether this forward is a device's last one before the losses are logged."""
        args, gradients = self.args, self.accelerator.gradient_state
        if not gradients.sync_gradients:
            return False
        step = self.state.global_step + 1
        if args.logging_first_step and step == 1:  # whatever the strategy
            return True
        if args.logging_strategy == "epoch":
            return gradients.end_of_dataloader or step == self.state.max_steps
        return args.logging_strategy == "steps" and step % self.state.logging_steps == 0

    def _track_num_input_tokens(self, inputs: dict) -> None:
        """See `Trainer._track_num_input_tokens`, which looks for padding in an `attention_mask`."""
        super()._track_num_input_tokens(inputs | {"attention_mask": inputs["document_ids"] >= 0})

    def blank(self, item: dict) -> dict:
        if "shift_labels" not in item:  # a row of chats
            return item | {"counts": False}
        return item | {"shift_labels": np.full_like(item["shift_labels"], IGNORE)}

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        """See `Trainer.evaluation_loop`, whose mean over batches is no mean over targets."""
        self._evaluated.reset()
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        measured = self._evaluated.pop(self)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in measured.items()})
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs = logs | self._measured.pop(self)
        super().log(logs, start_time)


def _check_packs(known: list) -> None:
    for dataset in known:
        if not all(hasattr(dataset, name) for name in ("spec", "padded")):
            raise ValueError(
                "datasets must be packs or raw documents, see PackedDataset and RawDocuments, or come with a "
                f"data_collator; got {type(dataset).__name__}"
            )


class Measured:
    """What steps have seen since the last log, on this device."""

    def __init__(self, num_scales: int):
        self.num_scales = num_scales
        self.reset()

    def reset(self) -> None:
        self.sums = torch.zeros(1 + self.num_scales, dtype=torch.float64)  # cross-entropy of text, then of each scale
        self.counts = torch.zeros(1 + self.num_scales, dtype=torch.float64)
        self.work = torch.zeros(4, dtype=torch.float64)  # positions, attended pairs, targets, their weighted losses
        self.seconds = 0.0
        self.max_attention_logit = None

    def add(self, outputs: NextFlowOutput, inputs: dict, weighted_sum: float = 0.0) -> None:
        """Count one forward, and the weighted sum of its losses where `loss` is to be their mean."""
        at = inputs["shift_labels"] != IGNORE
        scales, losses = outputs.scale_ids[at].cpu(), outputs.token_losses[at].double().cpu()
        self.sums.index_add_(0, scales, losses)
        self.counts.index_add_(0, scales, torch.ones_like(losses))
        pairs = attended_pairs(outputs.block_ids, inputs["document_ids"])
        tokens = (inputs["document_ids"] >= 0).sum()
        self.work += torch.tensor([int(tokens), int(pairs), int(at.sum()), weighted_sum], dtype=torch.float64)

    def pop(self, trainer: NextFlowTrainer) -> dict[str, float]:
        """Means over all devices since the last call."""
        accelerator, args = trainer.accelerator, trainer.args
        packed = torch.cat([self.sums, self.counts, self.work]).to(accelerator.device)
        packed = accelerator.reduce(packed, reduction="sum").cpu() / trainer.get_tp_size()
        sums, counts, work = packed.split([len(self.sums), len(self.counts), 4])
        seconds, largest = self.seconds, self.max_attention_logit
        self.reset()
        logs = {}
        if work[3]:
            logs["loss"] = float(work[3] / work[2])
        if counts[0]:
            logs["loss_text"] = float(sums[0] / counts[0])
        if counts[1:].sum():
            logs["loss_vision"] = float(sums[1:].sum() / counts[1:].sum())
        for scale in range(1, 1 + self.num_scales):
            if counts[scale]:
                logs[f"loss_scale_{scale}"] = float(sums[scale] / counts[scale])
        if seconds:
            flops = float(work[:3].numpy() @ trainer._costs.coefficients[:3]) / seconds
            logs |= {"tokens_per_second": float(work[0]) / seconds, "flops_per_second": flops}
            if getattr(args, "peak_flops", None):
                logs["mfu"] = flops / (args.peak_flops * args.world_size)
        if largest is not None:
            logs["max_attention_logit"] = float(accelerator.gather(largest).max())
        return logs


class _Clock(TrainerCallback):
    """Tells how long steps took."""

    def __init__(self, trainer: NextFlowTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer._measured.reset()  # of what a training before this has seen since its last log

    def on_step_begin(self, args, state, control, **kwargs):
        self.begun = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer._measured.seconds += time.perf_counter() - self.begun
