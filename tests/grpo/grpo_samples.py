"""What tests of GRPO share: a policy whose weights matter, chats and pictures."""

import copy

import numpy as np
import torch
from PIL import Image

from transformers_nextflow.scales import ScaleSchedule

SCHEDULE = ScaleSchedule(((1, 1), (2, 2), (3, 3)))


def policy_of(model):
    """A copy with random weights large enough to matter."""
    torch.manual_seed(1)
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("model.vq_model") and parameter.ndim > 1:
                parameter.normal_(std=1.5 * parameter.shape[-1] ** -0.5)
        model.model.code_embeddings.weight.normal_()
        model.model.scale_embedding.index.weight.normal_()
        model.model.vq_model.semantic_to_code[-1].weight.mul_(50)
        model.model.vq_model.pixel_encoder.to_code.weight.mul_(50)
    return model.eval()


def picture(seed: int, height: int = 24, width: int = 24) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height))


def chat(text: str, *images: Image.Image) -> list[dict]:
    items = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*items, {"type": "text", "text": text}]}]
