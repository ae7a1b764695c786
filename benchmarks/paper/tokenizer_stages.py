"""The tokenizer's three stages and scale drop (sec. 3.1, table 12): `python -m benchmarks.paper.tokenizer_stages RUN`.

A small CNN tokenizer, because the recipe's own encoder is fitted in closed form; RUN gives the semantic teacher. Arms:

- `staged`: pixel branch alone, then all parts, half of the steps each;
- `joint`: all parts from the start, as many steps;
- `staged-without-drop`: `staged` with every scale in every batch.

Each is measured there (`codes`), and after the doubled decoder has been trained alone for half as many steps again
(`decoder`): PSNR in dB of held-out scenes and photographs, and of the scenes with about half of the scales dropped.
"""

import random
import time
from argparse import Namespace
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PrinterCallback

from examples.shapes.data import picture_batch, to_pixel_values
from examples.shapes.evaluate import fidelity, photo_pixels
from examples.shapes.sizes import LEVELS, PATCH_SIZE, SCHEDULES, TEACHER_VISION
from examples.shapes.stages import Drawn, settings
from examples.shapes.tokenizer import BATCH, PHOTO_SHARE, ShapesVQTrainer, train_teacher
from examples.shapes.world import render, sample_scene
from transformers_nextflow import NextFlowProcessor, NextFlowVQConfig, NextFlowVQModel
from transformers_nextflow.training import NextFlowVQTrainingArguments, prepare_vq_stage

from .arms import Claim, begin, conclude, parse, run_arms

ARMS = ("staged", "joint", "staged-without-drop")
PEAK = 5e-4
MASKS = 8  # draws of dropped scales that are measured
STAGED = "the pixel branch is trained first, then all parts; reconstruction surpasses TokenFlow's, trained jointly"
DECODER = "the pixel decoder, doubled and trained alone, reconstructs better"
DROP = "training with half of the scales dropped at times makes the tokenizer robust"
CLAIMS = (
    Claim(STAGED, "sec. 3.1, table 12", "staged, decoder", "joint, decoder", "scenes", "+"),
    Claim(STAGED, "sec. 3.1, table 12", "staged, decoder", "joint, decoder", "photographs", "+"),
    Claim(DECODER, "sec. 3.1, table 12", "staged, decoder", "staged, codes", "scenes", "+"),
    Claim(DECODER, "sec. 3.1, table 12", "staged, decoder", "staged, codes", "photographs", "+"),
    Claim(DROP, "sec. 3.1", "staged, decoder", "staged-without-drop, decoder", "scenes_dropped", "+"),
    Claim(None, None, "staged, decoder", "staged-without-drop, decoder", "scenes", None),
)


def new_tokenizer() -> NextFlowVQModel:
    """A CNN that downsamples by 8, with the recipe's grids and semantic branch."""
    config = NextFlowVQConfig(
        semantic_config={**TEACHER_VISION, "vision_use_head": False},
        semantic_decoder_layers=2,
        semantic_dim=16,
        pixel_dim=8,
        semantic_weight=0.25,
        codebook_size=1024,
        pixel_encoder="cnn",
        patch_size=PATCH_SIZE,
        stem_stride=2,
        base_channels=32,
        channel_multipliers=[1, 2, 4],
        latent_channels=64,
        encoder_blocks=1,
        decoder_blocks=1,
        scale_schedules=SCHEDULES,
        levels=LEVELS,
    )
    return NextFlowVQModel(config)


def draw(rng: random.Random) -> dict:
    return {"pixel_values": picture_batch(rng, BATCH, PHOTO_SHARE).contiguous(memory_format=torch.channels_last)}


def train_stage(folder: Path, stage: str, model: NextFlowVQModel, steps: int, seed: int, teacher=None, **drop):
    """The model, trained through a stage."""
    model = prepare_vq_stage(model, stage).to(memory_format=torch.channels_last)
    values = settings(steps, PEAK) | {"save_strategy": "no", "warmup_steps": min(100, steps // 4), "seed": seed}
    values |= {"perceptual_weight": 0.0, "discriminator_weight": 0.0, "codebook_loss": "var"}
    arguments = NextFlowVQTrainingArguments(folder / "work", stage=stage, **values, **drop)
    trainer = ShapesVQTrainer(model, arguments, Drawn(f"{stage} {seed}", steps, draw), teacher=teacher)
    trainer.remove_callback(PrinterCallback)  # standard output is for the result
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has a slow backward at these lengths on a CPU
        trainer.train()
    return model


@torch.no_grad()
def measure(model: NextFlowVQModel, count: int) -> dict[str, float]:
    """Mean PSNR of `count` held-out pictures of each kind."""
    model.eval()
    rng = random.Random("paper, held-out scenes")
    scenes = to_pixel_values([render(sample_scene(rng, training=False)) for _ in range(count)])
    photographs = photo_pixels(count)
    masks = [[True] + [rng.random() < 0.5 for _ in SCHEDULES[0][1:]] for _ in range(MASKS)]

    def psnr(pixels: torch.Tensor, keep_scales: list[bool] | None = None) -> float:
        return fidelity(model(pixels, keep_scales=keep_scales).reconstruction.clamp(-1, 1), pixels)["psnr"]

    dropped = sum(psnr(scenes, keep_scales) for keep_scales in masks) / MASKS
    return {"scenes": psnr(scenes), "photographs": psnr(photographs), "scenes_dropped": round(dropped, 3)}


def run_arm(arm: str, seed: int, options: Namespace) -> dict:
    folder: Path = options.folder / "tokenizer_stages"
    teacher = train_teacher(options.run, NextFlowProcessor.from_pretrained(options.run / "start").tokenizer)
    torch.manual_seed(seed)
    model = new_tokenizer()
    encoder_state = {name: value for name, value in teacher.vision_model.state_dict().items() if "head." not in name}
    model.semantic_encoder.load_state_dict(encoder_state)
    drop = {"scale_drop": 0.0} if arm == "staged-without-drop" else {}
    common = {"seed": seed, **drop}
    stages, started = {}, time.process_time()
    first = 0 if arm == "joint" else options.steps // 2
    if first:
        model = train_stage(folder, "pixel", model, first, **common)
    model = train_stage(folder, "joint", model, options.steps - first, teacher=teacher.vision_model, **common)
    stages["codes"] = {"cpu_seconds": time.process_time() - started, "final": measure(model, options.held_out)}
    model = train_stage(folder, "decoder", model, options.steps // 2, **common)
    stages["decoder"] = {"cpu_seconds": time.process_time() - started, "final": measure(model, options.held_out)}
    return stages


def main() -> None:
    options = parse(__doc__, ("teacher/finished", "start"), steps=550)
    folder = begin("tokenizer_stages", options)
    arms = run_arms(folder, run_arm, ARMS, options)
    runs = {
        f"{arm}, {stage}": {seed: stages[stage] for seed, stages in by_seed.items()}
        for arm, by_seed in arms.items()
        for stage in ("codes", "decoder")
    }
    conclude("tokenizer_stages", CLAIMS, runs, options)


if __name__ == "__main__":
    main()
