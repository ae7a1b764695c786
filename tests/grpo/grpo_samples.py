"""What tests of GRPO share: a policy whose weights matter, chats and pictures."""

import copy

import numpy as np
import torch
from PIL import Image
from tiny_models import enlarge_

from transformers_nextflow.scales import ScaleSchedule

SCHEDULE = ScaleSchedule(((1, 1), (2, 2), (3, 3)))


def policy_of(model):
    """A copy with random weights large enough to matter."""
    torch.manual_seed(1)
    return enlarge_(copy.deepcopy(model)).eval()


def picture(seed: int, height: int = 24, width: int = 24) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height))


def chat(text: str, *images: Image.Image) -> list[dict]:
    items = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*items, {"type": "text", "text": text}]}]
