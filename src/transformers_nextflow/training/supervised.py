"""[`NextFlowSFTTrainer`]: TRL's trainer of answers, which may be pictures."""

from trl import SFTConfig, SFTTrainer

from .chats import ChatCollator, has_pictures
from .joint_head import add_joint_head
from .loading import check_trained


class NextFlowSFTTrainer(SFTTrainer):
    """TRL's `SFTTrainer`, whose loss of datasets with pictures is the model's own: text and codes under one softmax,
    scales weighted by eq. 2, pictures of the assistant targets like its texts.

    Differs from `SFTTrainer` on datasets with pictures, beside the loss: what the assistant says and draws is the
    target, whatever `assistant_only_loss` says; a row longer than `args.max_length` is an error, not cut; `entropy`
    and `mean_token_accuracy` are over text and codes. With datasets of text alone it is TRL's own.

    Args:
        data_collator: default for rows with `images` or `image`: [`~chats.ChatCollator`], pictures at the highest
            level.

    Raises:
        ValueError: on pictures, for a `loss_type` other than `"nll"`, or `completion_only_loss=False`.
    """

    def __init__(self, model, args: SFTConfig | None = None, data_collator=None, train_dataset=None, **kwargs):
        super().__init__(model, args, data_collator, train_dataset, **kwargs)
        check_trained(self.model)
        if not has_pictures(train_dataset):
            return
        if self.args.loss_type != "nll":
            raise ValueError(f'loss_type must be "nll" where there are pictures, got {self.args.loss_type!r}')
        if self.args.completion_only_loss is False:
            raise ValueError("completion_only_loss=False: where there are pictures, prompts are only read")
        if data_collator is None:
            lengths = {"max_length": self.args.max_length, "pad_to_multiple_of": self.args.pad_to_multiple_of}
            self.data_collator = ChatCollator(self.processing_class, **lengths)
        add_joint_head(self.model, self.accelerator)
