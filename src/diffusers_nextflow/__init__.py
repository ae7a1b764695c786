"""NextFlow (arXiv 2601.02204) for diffusers: importing this package lets `DiffusionPipeline` load its pipelines."""

import sys

import diffusers
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from transformers import PreTrainedModel, ProcessorMixin

from transformers_nextflow import NextFlowForConditionalGeneration, NextFlowProcessor, NextFlowVQModel

from .conditioning import NextFlowConditioner, condition_dim
from .decoding import NextFlowDecoderMixin
from .pipeline_nextflow import NextFlowPipeline
from .pipelines import (
    DECODERS,
    NextFlowDecoderPipeline,
    NextFlowFluxDecoderPipeline,
    NextFlowQwenImageDecoderPipeline,
    NextFlowXLDecoderPipeline,
)
from .pixel_autoencoder import PixelAutoencoder

# What `DiffusionPipeline.from_pretrained` looks up: a pipeline's class on `diffusers`, and the classes of components,
# by the module's name in model_index.json, on `diffusers.pipelines`.
for pipeline in (NextFlowPipeline, *DECODERS):
    setattr(diffusers, pipeline.__name__, pipeline)
diffusers.pipelines.diffusers_nextflow = sys.modules[__name__]

__all__ = [
    "DiffusionPipeline",
    "ModelMixin",
    "NextFlowConditioner",
    "NextFlowDecoderMixin",
    "NextFlowDecoderPipeline",
    "NextFlowFluxDecoderPipeline",
    "NextFlowForConditionalGeneration",
    "NextFlowPipeline",
    "NextFlowProcessor",
    "NextFlowQwenImageDecoderPipeline",
    "NextFlowVQModel",
    "NextFlowXLDecoderPipeline",
    "PixelAutoencoder",
    "PreTrainedModel",
    "ProcessorMixin",
    "SchedulerMixin",
    "condition_dim",
]
