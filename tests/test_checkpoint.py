"""The shipped checkpoint: small, loadable, and built of the paper's own mechanisms."""

from pathlib import Path

import pytest
import torch

from transformers_nextflow import NextFlowForConditionalGeneration, NextFlowProcessor
from transformers_nextflow.modeling_nextflow_vq import PixelDecoder, PixelEncoder

CHECKPOINT = Path(__file__).parents[1] / "checkpoints" / "nextflow-emoji"


@pytest.fixture(scope="module")
def model() -> NextFlowForConditionalGeneration:
    return NextFlowForConditionalGeneration.from_pretrained(CHECKPOINT).eval()


@pytest.fixture(scope="module")
def processor() -> NextFlowProcessor:
    return NextFlowProcessor.from_pretrained(CHECKPOINT)


def test_checkpoint_is_at_most_45_megabytes():
    assert sum(path.stat().st_size for path in CHECKPOINT.rglob("*") if path.is_file()) <= 45_000_000


def test_every_weight_is_in_the_checkpoint_and_finite(model):
    _, report = NextFlowForConditionalGeneration.from_pretrained(CHECKPOINT, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


def test_its_mechanisms_are_the_papers(model):
    """NextFlow sec. 2.1, 2.2 and 3.1, whatever the library's defaults are."""
    config, vq = model.config, model.config.vq_config
    assert vq.semantic_config.model_type == "siglip2_vision_model"  # naflex: any grid
    assert type(model.model.vq_model.pixel_encoder) is PixelEncoder  # a CNN
    assert type(model.model.vq_model.pixel_decoder) is PixelDecoder
    assert (vq.semantic_weight, vq.pixel_weight) == (1, 1)
    assert vq.normalize_entries
    assert vq.semantic_dim > 0 and vq.pixel_dim > 0
    assert model.model.code_embeddings.weight.shape == (vq.codebook_size, vq.semantic_dim + vq.pixel_dim)  # one table
    assert config.feature_mode == "residual"
    assert config.scale_loss_alpha == 0.9
    half = config.text_config.hidden_size // config.text_config.num_attention_heads // 2
    assert config.text_config.rope_parameters["mrope_section"] == [1] * half  # interleaved
    assert model.model.connector[0].in_features == vq.semantic_dim + vq.pixel_dim  # codes alone, no position
    assert config.position_scale is None  # the finest grid's edge


def test_there_are_two_levels_of_one_final_grid_each(model):
    table = model.model.schedules
    assert list(table.levels) == ["32", "64"]
    assert table.by_aspect_ratio("1:1", "32").final_grid == (4, 4)
    assert table.by_aspect_ratio("1:1", "64").final_grid == (8, 8)


def test_a_seed_draws_one_picture(model, processor):
    chat = [{"role": "user", "content": "red heart, fluent"}]
    inputs = processor.apply_chat_template(chat, generation_mode="image")
    first, again, other = (model.generate(**inputs, generation_mode="image", seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
