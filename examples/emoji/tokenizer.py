"""Training of the vision tokenizer: NextFlow's three stages (sec. 3.1) at small size."""

import random
from pathlib import Path

import numpy as np
import torch
from transformers import Siglip2Model

from transformers_nextflow import NextFlowVQModel
from transformers_nextflow.training import NextFlowVQTrainer, NextFlowVQTrainingArguments, prepare_vq_stage

from .sizes import PATCH_SIZE, SCHEDULES, vq_config
from .stages import Drawn, finish, is_finished, own_share, processes, settings
from .world import World, in_a_row, moved, resized, to_pixel_values

STEPS = {"pixel": 1_200, "joint": 2_400, "decoder": 1_500}
PEAK = {"pixel": 8e-4, "joint": 5e-4, "decoder": 5e-4}
BATCH = 32  # pictures of a step, over all processes
SMALL_SHARE, ROW_SHARE = 0.12, 0.2  # of batches: single pictures of 32 pixels; several pictures side by side
MOVED_SHARE = 0.3  # of pictures, which are shifted and resized a little
RESTART_STEPS = 100
DECAY_SHARE = 0.4  # of the steps, the last


def draw_pictures(world: World, rng: random.Random, count: int) -> torch.Tensor:
    """(count, 3, H, W) pictures in [-1, 1] of one canvas, none of them held out."""

    def picture() -> np.ndarray:
        pixels = world.pictures[rng.choice(world.seen)]
        pixels = moved(pixels, rng) if rng.random() < MOVED_SHARE else pixels
        return pixels[:, ::-1] if rng.random() < 0.5 else pixels

    kind = rng.random()
    if kind >= ROW_SHARE:
        edge = 32 if kind < ROW_SHARE + SMALL_SHARE else 64
        return to_pixel_values([resized(picture(), edge) for _ in range(count)])
    height, width = (length * PATCH_SIZE for length in rng.choice(SCHEDULES[1:])[-1])
    cells = max(height, width) // min(height, width)
    return to_pixel_values([in_a_row([picture() for _ in range(cells)], height, width) for _ in range(count)])


class EmojiVQTrainer(NextFlowVQTrainer):
    """Differs from the paper: no perceptual network and no discriminator."""

    def reconstruction_loss(self, reconstruction: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
        """Squared and absolute error, and absolute error of the finite differences, which carry the edges."""
        error = reconstruction - pixel_values
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        return error.square().mean() + 0.2 * error.abs().mean() + 0.2 * edges


@torch.no_grad()
def round_to_bfloat16(model: NextFlowVQModel) -> None:
    """Before anything is coded, so that a checkpoint can hold the weights in half the room and code alike."""
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16())


def train_stage(
    folder: Path, stage: str, model: NextFlowVQModel, world: World, like: str | None = None, **kwargs
) -> NextFlowVQModel:
    """Train a prepared model through one stage, unless it is finished; returns the model as it was saved.

    Args:
        like: the stage whose steps, rate and pictures it has, by default its own.
    """
    like = like or stage
    if not is_finished(folder / stage):
        values = settings(STEPS[like], PEAK[like], DECAY_SHARE)
        arguments = NextFlowVQTrainingArguments(
            folder / stage,
            stage=stage,
            perceptual_weight=0.0,
            discriminator_weight=0.0,
            restart_steps=0 if stage == "decoder" else RESTART_STEPS,
            **values,
        )

        def draw(rng: random.Random) -> dict:
            pixels = draw_pictures(world, rng, own_share(BATCH))
            return {"pixel_values": pixels.contiguous(memory_format=torch.channels_last)}

        batches = Drawn(like, STEPS[like] * processes(), draw)
        model = model.to(memory_format=torch.channels_last)
        finish(EmojiVQTrainer(model, arguments, batches, **kwargs), before_saving=lambda: round_to_bfloat16(model))
    return NextFlowVQModel.from_pretrained(folder / stage).to(memory_format=torch.channels_last)


def train_pixel(folder: Path, world: World) -> NextFlowVQModel:
    """Stage 1: pixel branch and pixel half of the codebook."""
    torch.manual_seed(1)
    model = NextFlowVQModel(vq_config())
    return train_stage(folder, "pixel", prepare_vq_stage(model, "pixel"), world)


def train_joint(folder: Path, model: NextFlowVQModel, teacher: Siglip2Model, world: World) -> NextFlowVQModel:
    """Stage 2: everything, with a semantic encoder that begins as the teacher."""
    torch.manual_seed(2)
    encoder_state = {name: value for name, value in teacher.vision_model.state_dict().items() if "head." not in name}
    model.semantic_encoder.load_state_dict(encoder_state)
    return train_stage(folder, "joint", prepare_vq_stage(model, "joint"), world, teacher=teacher.vision_model)


def train_decoder(folder: Path, model: NextFlowVQModel, world: World) -> NextFlowVQModel:
    """Stage 3: the pixel decoder, twice as deep, alone; the codes stay what they are."""
    torch.manual_seed(3)
    return train_stage(folder, "decoder", prepare_vq_stage(model, "decoder"), world)
