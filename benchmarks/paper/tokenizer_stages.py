"""The tokenizer's three stages and scale drop (sec. 3.1, table 12): `python -m benchmarks.paper.tokenizer_stages RUN`.

Arms of the recipe's tokenizer, with RUN's teacher:

- `staged`: pixel branch alone, then all parts, half of the steps each;
- `joint`: all parts from the start, as many steps;
- `staged-without-drop`: `staged` with every scale in every batch.

Each is measured before and after (`enlarged_`) the doubled decoder is trained alone for half as many steps again:
PSNR in dB of names that no training saw, and with about half of the scales dropped; `gained` is what it adds.
"""

import random
import time
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PrinterCallback

from examples.emoji.sizes import SCHEDULES, vq_config
from examples.emoji.splits import NAME
from examples.emoji.stages import Drawn, settings
from examples.emoji.teacher import train_teacher
from examples.emoji.tokenizer import BATCH, DECAY_SHARE, PEAK, RESTART_STEPS, EmojiVQTrainer, draw_pictures
from examples.emoji.world import World, to_pixel_values
from transformers_nextflow import NextFlowVQModel
from transformers_nextflow.training import NextFlowVQTrainingArguments, prepare_vq_stage
from transformers_nextflow.training.metrics import psnr

from .arms import Claim, conduct

ARMS = ("staged", "joint", "staged-without-drop")
MASKS = 8  # draws of dropped scales that are measured
STAGED = "the pixel branch is trained first, then all parts; reconstruction surpasses TokenFlow's, trained jointly"
DECODER = "the pixel decoder, doubled and trained alone, reconstructs better"
DROP = "training with half of the scales dropped at times makes the tokenizer robust"
CLAIMS = [
    Claim(STAGED, "sec. 3.1, table 12", "staged", "joint", "enlarged_psnr", "+"),
    Claim(DECODER, "sec. 3.1, table 12", "staged", None, "gained", "+"),
    Claim(DROP, "sec. 3.1", "staged", "staged-without-drop", "enlarged_dropped_psnr", "+"),
    Claim(None, None, "staged", "staged-without-drop", "enlarged_psnr", None),
]


def train_stage(
    folder: Path, stage: str, model: NextFlowVQModel, world: World, steps: int, seed: int, drop: float, **kwargs
) -> NextFlowVQModel:
    """The model, trained through a stage."""
    model = prepare_vq_stage(model, stage).to(memory_format=torch.channels_last)
    values = settings(steps, PEAK[stage], DECAY_SHARE) | {"save_strategy": "no", "seed": seed, "scale_drop": drop}
    values |= {"use_cpu": True, "perceptual_weight": 0.0, "discriminator_weight": 0.0}
    values |= {"restart_steps": 0 if stage == "decoder" else RESTART_STEPS}
    arguments = NextFlowVQTrainingArguments(folder / "work", stage=stage, **values)

    def draw(rng: random.Random) -> dict:
        return {"pixel_values": draw_pictures(world, rng, BATCH).contiguous(memory_format=torch.channels_last)}

    trainer = EmojiVQTrainer(model, arguments, Drawn(f"{stage} {seed}", steps, draw), **kwargs)
    trainer.remove_callback(PrinterCallback)  # standard output is for the result
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has a slow backward at these lengths on a CPU
        trainer.train()
    return model


@torch.no_grad()
def measure(model: NextFlowVQModel, world: World, count: int) -> dict[str, float]:
    """Mean PSNR of `count` pictures of names never seen, with all scales and with about half of them."""
    rng = random.Random("tokenizer stages")
    rows = world.rows(NAME, "dev")
    pixels = to_pixel_values([world.pictures[row] for row in rng.sample(rows, min(count, len(rows)))])
    masks = [[True] + [rng.random() < 0.5 for _ in SCHEDULES[0][1:]] for _ in range(MASKS)]

    def mean_psnr(keep_scales: list[bool] | None = None) -> float:
        rebuilt = model(pixels, keep_scales=keep_scales).reconstruction.clamp(-1, 1)
        return float(psnr(rebuilt, pixels).mean())

    model.eval()
    return {"psnr": round(mean_psnr(), 3), "dropped_psnr": round(sum(map(mean_psnr, masks)) / MASKS, 3)}


def run_arm(folder: Path, arm: str, seed: int, options) -> dict:
    world = World(options.data)
    teacher = train_teacher(options.run, world)  # which is finished
    torch.manual_seed(seed)
    model, drop = NextFlowVQModel(vq_config()), 0.0 if arm == "staged-without-drop" else 0.1
    encoder_state = {name: value for name, value in teacher.vision_model.state_dict().items() if "head." not in name}
    model.semantic_encoder.load_state_dict(encoder_state)
    started = time.process_time()
    pixel_steps = 0 if arm == "joint" else options.steps // 2
    if pixel_steps:
        model = train_stage(folder, "pixel", model, world, pixel_steps, seed, drop)
    joint_steps = options.steps - pixel_steps
    model = train_stage(folder, "joint", model, world, joint_steps, seed, drop, teacher=teacher.vision_model)
    before = measure(model, world, options.held_out)
    model = train_stage(folder, "decoder", model, world, options.steps // 2, seed, drop)
    after = measure(model, world, options.held_out)
    final = before | {f"enlarged_{name}": value for name, value in after.items()}
    final["gained"] = round(after["psnr"] - before["psnr"], 3)
    return {"cpu_seconds": round(time.process_time() - started, 1), "final": final}


if __name__ == "__main__":
    conduct("tokenizer_stages", __doc__, CLAIMS, ARMS, run_arm, needs=("teacher/finished",), steps=550)
