"""What benchmarks ask a model of the emoji world, and how the judge scores it."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from examples.emoji.documents import draw_picture
from examples.emoji.judge import Judge
from examples.emoji.tasks import Item, Picture
from examples.emoji.world import World

BATCH = 32
LEVEL = "64"


def chat_of(item: Item, world: World) -> list[dict]:
    """The item's prompt as a chat."""
    content = [
        {"type": "image", "image": Image.fromarray(draw_picture(part, world, LEVEL))}
        if isinstance(part, Picture)
        else {"type": "text", "text": part}
        for part in item.user
    ]
    return [{"role": "user", "content": content}]


@torch.no_grad()
def draw(model, processor, items: Sequence[Item], world: World, seed: int = 0, **controls) -> list[np.ndarray]:
    """One square picture for each item, uint8 (H, W, 3); the n-th samples from `seed` + n, by the checkpoint's own
    controls and what `controls` changes of them."""
    grid, drawn = model.model.schedules.by_aspect_ratio("1:1", LEVEL).final_grid, []
    for start in range(0, len(items), BATCH):
        chats = [chat_of(item, world) for item in items[start : start + BATCH]]
        inputs = processor.apply_chat_template(chats, generation_mode="image")
        seeds = [seed + start + place for place in range(len(chats))]
        size = {"aspect_ratio": "1:1", "level": LEVEL}
        codes = model.generate(**inputs, generation_mode="image", seed=seeds, **size, **controls)
        drawn += map(np.asarray, processor.post_process_image(model.decode_image_tokens(codes, grid)))
    return drawn


@torch.no_grad()
def answer(model, processor, items: Sequence[Item], world: World) -> list[str]:
    """The likeliest answer to each item's question."""
    answers = []
    for start in range(0, len(items), BATCH):
        inputs = processor.apply_chat_template([chat_of(item, world) for item in items[start : start + BATCH]])
        ids = model.generate(**inputs, max_new_tokens=32, do_sample=False)
        replies = ids[:, inputs["input_ids"].shape[1] :]
        answers += [text.strip() for text in processor.batch_decode(replies, skip_special_tokens=True)]
    return answers


def share_right(judge: Judge, drawn: Sequence[np.ndarray], items: Sequence[Item]) -> float:
    """R@1: how many of the pictures are nearest to the one asked for, among all of the world."""
    return round(float(judge.right(drawn, [item.targets[0] for item in items])["picture"].mean()), 4)
