"""The paper's fig. 8: the single codebook that the dual one is compared with."""

import argparse

import torch

from benchmarks.paper import codebook
from examples.emoji import tokenizer
from transformers_nextflow import NextFlowForConditionalGeneration


def test_the_single_codebook_is_the_pixel_half_trained_as_long_as_both(
    small_world_folder, emoji_checkpoint, tmp_path, monkeypatch
):
    monkeypatch.setitem(tokenizer.STEPS, "joint", 2)
    monkeypatch.setattr(tokenizer, "BATCH", 8)
    before = NextFlowForConditionalGeneration.from_pretrained(emoji_checkpoint).model.vq_model
    before.save_pretrained(tmp_path / "pixel")
    options = argparse.Namespace(run=tmp_path, data=small_world_folder)
    single = codebook.tokenizer_of(tmp_path, "single", options).eval()
    assert not torch.equal(single.quantizer.pixel_codebook, before.quantizer.pixel_codebook)
    pixels = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        expected = single(pixels, pixel_only=True).quantization.target_codes
    assert torch.equal(single.encode(pixels), expected)
    assert not torch.equal(before.encode(pixels), before(pixels, pixel_only=True).quantization.target_codes)
    assert not single.condition_features(expected, (8, 8))[0].any()
    again = codebook.tokenizer_of(tmp_path, "single", options)  # which is finished
    assert torch.equal(again.quantizer.pixel_codebook, single.quantizer.pixel_codebook)
