"""The judge as a reward, and prompts of the world as a dataset for GRPO."""

import dataclasses
import json
import random
from collections.abc import Sequence

from PIL import Image

from .grammar import CATEGORIES, Request, held_out_prompts, sample_request
from .judge import judge_request
from .world import Described


def to_json(request: Request) -> str:
    return json.dumps(dataclasses.asdict(request))


def from_json(text: str) -> Request:
    values = json.loads(text)
    values["objects"] = tuple(Described(**item) for item in values["objects"])
    values["relations"] = tuple(map(tuple, values["relations"]))
    return Request(**values)


def shapes_judge(images: Sequence[Image.Image], request: Sequence[str], **kwargs) -> list[float]:
    """1 for a picture that shows what was asked for and nothing else, else 0."""
    return [float(judge_request(image, from_json(text))) for image, text in zip(images, request)]


def _row(request: Request) -> dict:
    return {"prompt": [{"role": "user", "content": request.text}], "request": to_json(request)}


def training_prompts(count: int, seed: int = 0, categories: Sequence[str] = CATEGORIES) -> list[dict]:
    """Rows of prompts that show nothing held out."""
    rng = random.Random(f"grpo {seed}")
    return [_row(sample_request(rng, rng.choice(list(categories)))) for _ in range(count)]


def held_out_rows(per_category: int, seed: int = 0, split: str = "dev") -> list[dict]:
    """Rows of held-out prompts of every category."""
    return [_row(request) for name in CATEGORIES for request in held_out_prompts(name, per_category, seed, split)]
