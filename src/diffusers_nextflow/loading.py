"""Saved decoders, for the console command: the entry point `transformers_nextflow.decoders` in pyproject.toml."""

from diffusers import DiffusionPipeline

from transformers_nextflow.loading import naming

from .decoding import NextFlowDecoderMixin
from .pipelines import DECODERS


def load_saved_decoder(name: str) -> NextFlowDecoderMixin:
    """A decoder of any family.

    Args:
        name: folder, or id on the Hub.

    Raises:
        OSError: if it holds no pipeline.
        ValueError: if that is no decoder, or its files are damaged.
    """
    with naming(f"the model_index.json in {name}"):
        found = DiffusionPipeline.load_config(name).get("_class_name")
    classes = {decoder.__name__: decoder for decoder in DECODERS}
    if found not in list(classes):
        raise ValueError(f"{name} must hold a diffusion decoder ({', '.join(classes)}), got a {found}")
    with naming(f"the decoder in {name}"):
        return classes[found].from_pretrained(name)
