"""The shipped checkpoint: small, loadable, of two levels; `emoji/test_mechanisms.py` holds its mechanisms."""

import re
from pathlib import Path

import pytest
import torch

from examples.emoji.tasks import WORDINGS
from examples.emoji.wordings import INSTRUCTIONS
from transformers_nextflow import NextFlowForConditionalGeneration, NextFlowProcessor

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


def test_sizes_and_uses_that_the_card_claims_have_scores():
    """What it says that the model does, and at which sizes (width x height), has a row of its own."""
    card = (CHECKPOINT / "README.md").read_text()
    claims = card.split("```")[0]
    sizes = [size.split(" x ") for size in re.findall(r"\d+ x \d+", claims)]
    assert sizes and "describes" in claims
    rows = [f"drawing, {width if width == height else f'{width} x {height}'} px, seen" for width, height in sizes]
    for row in [*rows, "caption, seen", "question, all kinds, seen", "edit, all kinds, seen"]:
        assert f"\n| {row}" in card


def test_the_card_has_every_wording_and_its_share_at_both_sizes():
    card = (CHECKPOINT / "README.md").read_text()
    for wordings in WORDINGS.values():
        for wording in wordings:
            assert re.search(rf"\| `{re.escape(wording)}` \| \d\.\d\d \(.*?\) \| \d\.\d\d \(.*?\) \| \d+ \|", card)
    assert all(f"`{wording.format('...')}`" in card for wordings in INSTRUCTIONS.values() for wording in wordings)
