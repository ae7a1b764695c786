"""The shipped checkpoint is what its card says: small, loadable, and able."""

import json
import random
from pathlib import Path

import pytest
import torch

from examples.shapes.evaluate import Evaluator, captions, text_to_image, tokenizer
from examples.shapes.grammar import CATEGORIES, held_out_prompts
from transformers_nextflow import NextFlowForConditionalGeneration, NextFlowProcessor

CHECKPOINT = Path(__file__).parents[1] / "checkpoints" / "nextflow-shapes"


@pytest.fixture(scope="module")
def evaluator() -> Evaluator:
    model = NextFlowForConditionalGeneration.from_pretrained(CHECKPOINT).eval()
    return Evaluator(model, NextFlowProcessor.from_pretrained(CHECKPOINT), seed=1)


@pytest.fixture(scope="module")
def card_scores() -> dict:
    return json.loads((CHECKPOINT / "scores.json").read_text())


def test_checkpoint_is_under_25_megabytes():
    assert sum(path.stat().st_size for path in CHECKPOINT.rglob("*") if path.is_file()) < 25_000_000


def test_checkpoint_loads_as_float32(evaluator):
    assert {parameter.dtype for parameter in evaluator.model.parameters()} == {torch.float32}


def test_pictures_show_held_out_prompts_about_as_often_as_the_card_says(evaluator, card_scores):
    score = text_to_image(evaluator, prompts=25, copies=1, split="test")["overall"]
    assert score["high"] >= card_scores["text_to_image"]["overall"]["low"]


def test_captions_are_about_as_true_as_the_card_says(evaluator, card_scores):
    requests = [request for category in CATEGORIES for request in held_out_prompts(category, 20, seed=1)]
    score = captions(evaluator, [request.reference_scene(random.Random(request.text)) for request in requests])
    assert score["high"] >= card_scores["caption_scene_match"]["low"]


def test_reconstructions_read_as_their_originals_about_as_often_as_the_card_says(evaluator, card_scores):
    requests = [request for category in CATEGORIES for request in held_out_prompts(category, 12, seed=1)]
    scenes = [request.reference_scene(random.Random(request.text)) for request in requests]
    score = tokenizer(evaluator, requests, scenes)["ceiling"]
    assert score["high"] >= card_scores["tokenizer"]["ceiling"]["low"] >= 0.75


def test_one_seed_draws_one_picture(evaluator):
    first, again, other = (
        Evaluator(evaluator.model, evaluator.processor, seed).pictures(["a red circle"])[0][0] for seed in (3, 3, 4)
    )
    assert (first == again).all()
    assert (first != other).any()
