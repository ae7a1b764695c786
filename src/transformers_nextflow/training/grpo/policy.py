"""The model that is trained: loaded in float32, with the adapters that it has."""

import torch
from peft import PeftConfig, PeftModel
from transformers.utils import find_adapter_config_file, logging

from ...modeling_nextflow import NextFlowForConditionalGeneration
from ...processing_nextflow import NextFlowProcessor

logger = logging.get_logger(__name__)


def load_policy(
    name: str, processor: NextFlowProcessor | None = None, **kwargs
) -> tuple[torch.nn.Module, NextFlowProcessor]:
    """A model to train on, and its processor unless one is given.

    Args:
        name: a folder or Hub id of a model, or of adapters on one, which are trained on.
        kwargs: of `from_pretrained`; `dtype` is float32 where it is not among them, whatever was saved.
    """
    kwargs = {"dtype": torch.float32} | kwargs
    revision = {"revision": kwargs["revision"]} if "revision" in kwargs else {}
    if find_adapter_config_file(name, **revision) is None:
        processor = processor or NextFlowProcessor.from_pretrained(name, **revision)
        return NextFlowForConditionalGeneration.from_pretrained(name, **kwargs), processor
    base = PeftConfig.from_pretrained(name, **revision).base_model_name_or_path
    model, processor = load_policy(base, processor, **{key: kwargs[key] for key in kwargs if key != "revision"})
    return PeftModel.from_pretrained(model, name, is_trainable=True, **revision), processor


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
