"""Scores of the vision tokenizer."""

import numpy as np
import torch

from examples.emoji.evaluate_tokenizer import NamesFound
from examples.emoji.sizes import vq_config
from examples.emoji.teacher import new_teacher, teacher_tokenizer
from examples.emoji.world import World, to_pixel_values
from transformers_nextflow import NextFlowVQModel


@torch.inference_mode()
def test_names_are_found_by_the_direction_of_decoded_features():
    """Distillation teaches nothing else; a teacher reads them as long as its own."""
    torch.manual_seed(0)
    pictures = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
    world = World.from_arrays(pictures, ["cat", "dog", "sun", "car"], ["noto"] * 4)
    model, teacher = NextFlowVQModel(vq_config()).eval(), new_teacher(teacher_tokenizer(world)).eval()
    found, codes = NamesFound(world, teacher, model), model.encode(to_pixel_values(list(pictures)))
    expected = found.embeddings(codes, (8, 8))
    for parameter in model.semantic_decoder.to_features[-1].parameters():
        parameter *= 7
    assert torch.allclose(found.embeddings(codes, (8, 8)), expected, atol=1e-5)
    for parameter in model.semantic_decoder.to_features[-1].parameters():
        parameter *= -1
    assert not torch.allclose(found.embeddings(codes, (8, 8)), expected, atol=1e-2)
    features = model.semantic_features(to_pixel_values(list(pictures)), teacher.vision_model)
    assert torch.isclose(found.length, features.norm(dim=-1).mean(), rtol=1e-5)
