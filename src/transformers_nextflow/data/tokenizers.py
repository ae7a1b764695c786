"""What codes documents: a NextFlow's configuration, processor and vision tokenizer, without its transformer."""

from ..configuration_nextflow import NextFlowConfig
from ..modeling_nextflow_vq import NextFlowVQModel
from ..processing_nextflow import NextFlowProcessor
from ..utils.loading import load_config, load_processor, load_vq_model


def load_tokenizers(model: str, device: str = "cpu") -> tuple[NextFlowConfig, NextFlowProcessor, NextFlowVQModel]:
    """Configuration, processor and float32 vision tokenizer of a folder or Hub id."""
    config = load_config(model)
    return config, load_processor(model), load_vq_model(model).to(device)
