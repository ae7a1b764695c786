"""Saved decoders, for the console command: the entry point `transformers_nextflow.decoders` in pyproject.toml."""

from diffusers import DiffusionPipeline

from transformers_nextflow.utils.loading import naming

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
    for decoder in DECODERS:
        if decoder.__name__ == found:
            with naming(f"the decoder in {name}"):
                return decoder.from_pretrained(name)
    known = ", ".join(decoder.__name__ for decoder in DECODERS)
    raise ValueError(f"{name} must hold a diffusion decoder ({known}), got a {found}")
