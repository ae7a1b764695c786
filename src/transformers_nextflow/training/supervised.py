"""[`NextFlowSFTTrainer`]: TRL's trainer of answers, which may be pictures."""

import torch
from trl import SFTConfig, SFTTrainer

from .chats import ChatCollator, has_pictures
from .checkpoints import SavingTrainer
from .joint_head import add_joint_head
from .loading import PrecisionTrainer
from .order import check_heeded


class NextFlowSFTTrainer(PrecisionTrainer, SavingTrainer, SFTTrainer):
    """TRL's `SFTTrainer`, whose loss of datasets with pictures is the model's own: text and codes under one softmax,
    scales weighted by eq. 2, pictures of the assistant targets like its texts.

    Differs from `SFTTrainer` on datasets with pictures, beside the loss: what the assistant says and draws is the
    target, whatever `assistant_only_loss` says; a row longer than `args.max_length` is an error, not cut; `entropy`
    and `mean_token_accuracy` are over text and codes, and an evaluation's loss is the mean over all its targets,
    however they are split into batches. With datasets of text alone it is TRL's own.

    Args:
        data_collator: default for rows with `images` or `image`: [`~chats.ChatCollator`], pictures at the highest
            level.

    Raises:
        ValueError: on pictures, for a `loss_type` other than `"nll"`, `completion_only_loss=False`, or an option that
            is not heeded ([`~order.check_heeded`]).
    """

    def __init__(self, model, args: SFTConfig | None = None, data_collator=None, train_dataset=None, **kwargs):
        super().__init__(model, args, data_collator, train_dataset, **kwargs)
        if not has_pictures(train_dataset):
            return
        check_heeded(self.args)
        self.accelerator.dataloader_config.dispatch_batches = False  # nor by default, as of streams
        if self.args.loss_type != "nll":
            raise ValueError(f'loss_type must be "nll" where there are pictures, got {self.args.loss_type!r}')
        if self.args.completion_only_loss is False:
            raise ValueError("completion_only_loss=False: where there are pictures, prompts are only read")
        if data_collator is None:
            lengths = {"max_length": self.args.max_length, "pad_to_multiple_of": self.args.pad_to_multiple_of}
            self.data_collator = ChatCollator(self.processing_class, **lengths)
        add_joint_head(self.model, self.accelerator)

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        """See `Trainer.evaluation_loop`, whose mean over batches is no mean over targets."""
        arguments = dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        if not isinstance(self.data_collator, ChatCollator):
            return super().evaluation_loop(*arguments)
        counted = []

        def count(module, args, outputs):
            if "log_probs" in outputs:  # no forward for the logits
                rows = torch.stack([-outputs.log_probs, outputs.label_mask], dim=-1).double().sum(dim=1)
                counted.append(self.accelerator.gather_for_metrics(rows))  # each once, however processes share them

        handle = self.model.register_forward_hook(count)
        try:
            output = super().evaluation_loop(*arguments)
        finally:
            handle.remove()
        loss, targets = torch.cat(counted).sum(dim=0).tolist()
        return output._replace(metrics=output.metrics | {f"{metric_key_prefix}_loss": loss / targets})
