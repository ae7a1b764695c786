"""Saved pipelines load where the package is installed, but nobody has imported it."""

import pytest

pytest.importorskip("diffusers", reason="the diffusion decoder needs diffusers")

from diffusers_nextflow import NextFlowPipeline
from tests.diffusers.tiny_decoders import decoder
from tests.fresh import run

LOADING = """
import sys
from diffusers import DiffusionPipeline

decoder, whole = sys.argv[1:]
for arguments in ({}, {"custom_pipeline": decoder}):
    try:
        DiffusionPipeline.from_pretrained(decoder, **arguments)
    except (AttributeError, ValueError) as error:
        print(type(error).__name__)
assert "diffusers_nextflow" not in sys.modules
for folder in (decoder, whole, decoder):
    pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
    print(type(pipe).__module__, type(pipe).__name__, type(pipe.components.get("conditioner")).__name__)
print(type(pipe).__name__, type(DiffusionPipeline.from_pretrained(whole).decoder).__name__)
"""


def test_saved_folders_bring_the_import_with_them(tmp_path, tiny_model, tiny_processor):
    decoder("unet", trained=True).save_pretrained(tmp_path / "decoder")
    flux = decoder("flux", trained=True)
    NextFlowPipeline(tiny_model, tiny_processor, flux).save_pretrained(tmp_path / "whole")
    assert run("-c", LOADING, tmp_path / "decoder", tmp_path / "whole").splitlines() == [
        "AttributeError",  # of a class that diffusers does not know
        "ValueError",  # the code is not trusted
        "diffusers_nextflow.pipelines NextFlowDecoderPipeline NextFlowConditioner",
        "diffusers_nextflow.pipeline_nextflow NextFlowPipeline NoneType",
        "diffusers_nextflow.pipelines NextFlowDecoderPipeline NextFlowConditioner",
        "NextFlowDecoderPipeline NextFlowFluxDecoderPipeline",
    ]
