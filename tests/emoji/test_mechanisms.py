"""The recipe's models, and the checkpoint, hold the paper's mechanisms, whatever the library's defaults are.

`paper_mechanisms.json` is the table: what the paper says and in which section, where a model has it, and its value.
"""

import json
from functools import reduce
from pathlib import Path

import pytest
from test_checkpoint import CHECKPOINT

from examples.emoji.documents import EXTRACTION
from examples.emoji.sizes import nextflow_config, vq_config
from examples.emoji.text import train_text_tokenizer
from examples.emoji.transformer import TRAININGS
from transformers_nextflow import NextFlowForConditionalGeneration

TABLE = json.loads((Path(__file__).parent / "paper_mechanisms.json").read_text())


@pytest.fixture(scope="module", params=["recipe", "checkpoint"])
def model(request) -> NextFlowForConditionalGeneration:
    if request.param == "checkpoint":
        return NextFlowForConditionalGeneration.from_pretrained(CHECKPOINT)
    tokenizer = train_text_tokenizer(["red heart, fluent"], 300)
    return NextFlowForConditionalGeneration(nextflow_config(tokenizer, vq_config()))


def read(value, name: str):
    return value[name] if isinstance(value, dict) else getattr(value, name)


@pytest.mark.parametrize("row", TABLE, ids=[row["mechanism"] for row in TABLE])
def test_a_mechanism_is_the_papers(model, row):
    assert reduce(read, row["at"].split("."), model) == row["value"], row["paper"]


def test_one_codebook_of_two_halves_serves_all_scales(model):
    vq = model.config.vq_config
    halves = model.model.vq_model.quantizer
    assert halves.semantic_codebook.shape == (vq.codebook_size, vq.semantic_dim)
    assert halves.pixel_codebook.shape == (vq.codebook_size, vq.pixel_dim)
    assert model.model.code_embeddings.weight.shape == (vq.codebook_size, vq.semantic_dim + vq.pixel_dim)
    assert min(vq.semantic_dim, vq.pixel_dim) > 0


def test_nothing_but_rope_says_where_a_code_lies(model):
    """The connector reads entries alone, and no weight of the transformer belongs to a position."""
    vq, schedule = model.config.vq_config, model.model.schedules
    assert model.model.connector[0].in_features == vq.semantic_dim + vq.pixel_dim
    own = {name: p for name, p in model.named_parameters() if "vq_model" not in name}
    assert not [name for name in own if "position" in name]
    cells = {each.lengths[-1] for each in schedule} | {each.num_codes for each in schedule}
    assert not [name for name, parameter in own.items() if cells & set(parameter.shape)]


def test_one_head_and_one_embedding_of_scales_serve_all_levels(model):
    assert model.code_head.out_features == model.config.vq_config.codebook_size
    assert len(model.model.schedules.levels) == 2


def test_the_trainings_disturb_inputs_and_reweight_scales_as_the_paper_does():
    """All samples, 60% of each scale's tokens (sec. 3.1); eq. 2 with alpha .9 beyond the lowest level."""
    correction = EXTRACTION.self_correction
    assert (correction.probability, correction.token_share) == (1.0, 0.6)
    assert (correction.first_scale, correction.last_scale) == (0, None)
    alphas = [training.scale_loss_alpha for training in TRAININGS.values()]
    assert alphas == [0.0, 0.0, 0.9, 0.9, 0.9, 0.9]
