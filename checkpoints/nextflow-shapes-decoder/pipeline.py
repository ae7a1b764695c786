from diffusers_nextflow import NextFlowDecoderPipeline as Pipeline  # noqa: F401
