"""[`NextFlowDPOTrainer`]: TRL's trainer of preferences, between pictures."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from trl import DPOConfig, DPOTrainer

from ..lora import below_adapters
from ..losses import IGNORE
from ..processing_nextflow import NextFlowProcessor
from ..sampling import integer
from .chats import ChatCollator, as_messages, has_pictures, with_images
from .checkpoints import SavingTrainer
from .joint_head import add_joint_head
from .loading import PrecisionTrainer
from .order import check_heeded


class NextFlowDPOTrainer(PrecisionTrainer, SavingTrainer, DPOTrainer):
    """TRL's `DPOTrainer`, where answers may be pictures: the log-probability of one is that of its codes of the first
    `num_scales` scales, which hold what a picture is of (VARGPT-v1.1, arXiv 2504.02949, prefers pictures by DPO too;
    NextFlow's paper has no such stage). Text in an answer counts whole.

    Everything else is TRL's, its `loss_type`s and adapters. The reference is the model as it is handed over, where
    TRL's trainer loads it anew from where it came from.

    Args:
        train_dataset: rows with `prompt`, `chosen` and `rejected`, texts or messages, and `images`, which fill the
            image items of the three in this order.
        data_collator: default for rows with `images` or `image`: [`PreferenceCollator`].
        num_scales: of a picture count; default all.

    Raises:
        ValueError: for a `num_scales` below 1; on pictures for an `ld_alpha`, which is for texts, or an option that is
            not heeded ([`~order.check_heeded`]); in training for a reference that follows the policy, of which
            checkpoints have nothing, where it is resumed.
    """

    def __init__(
        self,
        model,
        ref_model=None,
        args: DPOConfig | None = None,
        data_collator=None,
        train_dataset=None,
        *positional,
        num_scales: int | None = None,
        **kwargs,
    ):
        if num_scales is not None:
            integer("num_scales", num_scales, 1)
        adapted = hasattr(model, "peft_config") or kwargs.get("peft_config") is not None
        if ref_model is None and not isinstance(model, str) and not adapted:
            ref_model = copy.deepcopy(model)
        super().__init__(model, ref_model, args, data_collator, train_dataset, *positional, **kwargs)
        if not has_pictures(train_dataset):
            return
        check_heeded(self.args, padding_free=False)
        self.accelerator.dataloader_config.dispatch_batches = False  # nor by default, as of streams
        if self.ld_alpha is not None:
            raise ValueError(f"ld_alpha is for texts of different lengths, got {self.ld_alpha}")
        if data_collator is None:
            lengths = {"max_length": self.args.max_length, "pad_to_multiple_of": self.args.pad_to_multiple_of}
            self.data_collator = PreferenceCollator(self.processing_class, num_scales, **lengths)
        add_joint_head(self.model, self.accelerator)
        if self.ref_model is not None:
            add_joint_head(self.ref_model, self.accelerator)
            if self.is_deepspeed_enabled:  # which has rounded the reference's tokenizer; both score the same codes
                models = [below_adapters(self.accelerator.unwrap_model(m)).model for m in (self.ref_model, self.model)]
                for weight, exact in zip(*(model.vq_model.parameters() for model in models)):
                    weight.data = exact.data.to(weight.device)
                models[0].code_embeddings.follows_casts = True
                models[0].code_embeddings.to(models[0].language_model.dtype)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """See [`~checkpoints.SavingTrainer.train`]."""
        if resume_from_checkpoint and self.args.sync_ref_model:
            raise ValueError("sync_ref_model is not resumed, since no checkpoint has it: begin anew from one")
        return super().train(resume_from_checkpoint, *args, **kwargs)


class PreferenceCollator(ChatCollator):
    """Rows of `prompt`, `chosen` and `rejected` to batches of all chosen, then all rejected chats.

    Args:
        num_scales: of a picture in an answer count; default all.
        kwargs: of [`~chats.ChatCollator`].
    """

    def __init__(self, processor: NextFlowProcessor, num_scales: int | None = None, **kwargs):
        super().__init__(processor, **kwargs)
        self.num_scales = num_scales

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """
        Returns:
            (2B, L) tensors as of [`~chats.ChatCollator`], `completion_mask`, 1 where an output is scored, and the same
            as `loss_weights`.
        """
        pairs = [_answers(row, f"row {place}") for place, row in enumerate(rows)]
        batch = self.collate([chat for answers in zip(*pairs) for chat in answers])
        scored = batch["shift_labels"] != IGNORE
        starts = (batch["input_ids"] == self.spec.special.boi).nonzero().tolist()
        for (row, start), grid in zip(starts, batch.get("image_grid_hw", torch.empty(0, 2)).tolist()):
            schedule = self.spec.schedules.by_grid(tuple(grid))
            counted = schedule.prefix(min(self.num_scales or len(schedule), len(schedule)))
            scored[row, start + counted.num_codes : start + schedule.num_codes] = False
        batch |= {"completion_mask": scored.long(), "loss_weights": scored.float()}
        return {name: value for name, value in batch.items() if name not in ("labels", "document_ids")}


def _answers(row: Mapping[str, Any], where: str) -> tuple[list[dict], list[dict]]:
    """The chats of the chosen and of the rejected answer, pictures in them."""
    if missing := {"prompt", "chosen", "rejected"} - set(row):
        raise ValueError(f"{where} must have prompt, chosen and rejected, {', '.join(sorted(missing))} missing")
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    parts = {name: as_messages(row[name], role) for name, role in roles.items()}
    whole = with_images(sum(parts.values(), []), row.get("images", row.get("image")), where)
    after_prompt, after_chosen = len(parts["prompt"]), len(parts["prompt"]) + len(parts["chosen"])
    prompt, chosen, rejected = whole[:after_prompt], whole[after_prompt:after_chosen], whole[after_chosen:]
    return prompt + chosen, prompt + rejected
