"""The model that is trained: loaded in float32, with the adapters that it has."""

from pathlib import Path

import torch
from transformers import Trainer, TrainerCallback
from transformers.utils import logging

from ..configuration_nextflow import NextFlowConfig
from ..liger import register_liger_kernel
from ..modeling_nextflow import NextFlowForConditionalGeneration
from ..modeling_nextflow_vq import NextFlowVQModel
from ..processing_nextflow import NextFlowProcessor
from ..stored_tokenizer import stored_tensors, vision_tokenizer_hash
from ..utils.loading import base_of
from ..utils.precision import AtLeastFloat32
from .fsdp import keep_losses_float32

logger = logging.get_logger(__name__)


def load_to_train(
    name: str, processor: NextFlowProcessor | None = None, vision_tokenizer: bool = True, **kwargs
) -> tuple[torch.nn.Module, NextFlowProcessor]:
    """A model to train on, and its processor unless one is given.

    Args:
        name: a folder or Hub id of a model, or of adapters on one, which are trained on.
        vision_tokenizer: whether it is in the model, or its hash alone, which is all that training on packs needs;
            checkpoints then refer to it, see [`NextFlowConfig`].
        kwargs: of `from_pretrained`; `dtype` is float32 where it is not among them, whatever was saved.
    """
    kwargs = {"dtype": torch.float32} | kwargs
    revision = {"revision": kwargs["revision"]} if "revision" in kwargs else {}
    base = base_of(name, **revision)
    if base is not None:
        from peft import PeftModel

        own = {key: value for key, value in kwargs.items() if key != "revision"}
        model, processor = load_to_train(base, processor, vision_tokenizer, **own)
        return PeftModel.from_pretrained(model, name, is_trainable=True, **revision), processor
    if Path(name).is_dir():  # adapters name it, and may be opened from another place
        name, revision = str(Path(name).resolve()), {}
    processor = processor or NextFlowProcessor.from_pretrained(name, **revision)
    if not vision_tokenizer:
        config = kwargs["config"] = NextFlowConfig.from_pretrained(name, **revision)
        if config.vision_tokenizer is None:
            digest = vision_tokenizer_hash(stored_tensors(name, **revision), config.vq_config)
            config.vision_tokenizer = {"model": name, "sha256": digest, **revision}
    model = NextFlowForConditionalGeneration.from_pretrained(name, vision_tokenizer=vision_tokenizer, **kwargs)
    return model, processor


class PrecisionTrainer(Trainer):
    """Trainer of models that keep some of their parts in float32, and have Liger's kernels in others."""

    def train(self, *args, **kwargs):
        """See `Trainer.train`. As it begins, before devices wrap the model, it warns as [`check_trained`] does. Under
        DeepSpeed in 16 bits what stays float32 is rounded where it is trained, since all that is trained lies in one
        buffer; what is frozen, as a tokenizer that gives codes, stays as it is.

        Raises:
            ImportError: for `use_liger_kernel` without liger-kernel.
            ValueError: for a frozen vision tokenizer under ZeRO-3 in 16 bits, which would round it.
        """
        if self.args.use_liger_kernel:
            register_liger_kernel()
        check_trained(self.model)
        keep_losses_float32(self.accelerator)
        if self.is_deepspeed_enabled and (self.args.bf16 or self.args.fp16):
            round_trained(self.model, also_frozen=self.accelerator.state.deepspeed_plugin.zero_stage == 3)
            self.add_callback(_Unrounded(self.model))
        return super().train(*args, **kwargs)


def round_trained(model: torch.nn.Module, also_frozen: bool) -> None:
    """Let what stays float32 follow casts where it is trained, or everywhere; see [`PrecisionTrainer.train`]."""
    for module in model.modules():
        if isinstance(module, AtLeastFloat32):
            weights = list(module.parameters())
            is_trained = any(weight.requires_grad for weight in weights)
            if also_frozen and weights and not is_trained and isinstance(module, NextFlowVQModel):
                raise ValueError(
                    "ZeRO-3 in 16 bits would round the vision tokenizer, and pictures get other codes: use "
                    "ZeRO-2 or FSDP2, or train on packs with a model loaded by vision_tokenizer=False"
                )
            module.follows_casts = is_trained or also_frozen


class _Unrounded(TrainerCallback):
    """Undoes what DeepSpeed did to the weights that follow no casts: it puts rounded ones into their place."""

    def __init__(self, model: torch.nn.Module):
        fine = [each for each in model.modules() if isinstance(each, AtLeastFloat32) and not each.follows_casts]
        self.weights = [(weight, weight.data) for each in fine for weight in each.parameters()]

    def on_train_begin(self, args, state, control, **kwargs):
        while self.weights:
            weight, data = self.weights.pop()
            weight.data = data.to(weight.device)


def check_trained(model: torch.nn.Module) -> None:
    """Warn of what would be trained in 16 bits alone, where most steps of a small learning rate round to nothing.

    Raises:
        ValueError: if nothing would be trained.
    """
    trained = {name: parameter.dtype for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trained:
        raise ValueError("all parameters are frozen: load adapters with is_trainable=True, or by their name here")
    rounded = [name for name, dtype in trained.items() if dtype in (torch.bfloat16, torch.float16)]
    if rounded:
        logger.warning(
            f"{len(rounded)} of {len(trained)} trained tensors are {str(trained[rounded[0]]).removeprefix('torch.')}, "
            f"such as {rounded[0]}: steps much smaller than a weight are lost. Load the model with "
            "dtype=torch.float32; bf16=True is for the arithmetic."
        )
