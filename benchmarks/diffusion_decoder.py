"""Is the small diffusion decoder sharper than the vision tokenizer's, enlarged?
`python -m benchmarks.diffusion_decoder --output benchmarks/results/diffusion_decoder.json --sheet docs/decoder.png`

Held-out pictures are coded at 64 x 64 pixels and drawn at 128 x 128 from their codes alone: by the diffusion decoder,
by the vision tokenizer's decoder enlarged bicubically, and by that under an unsharp mask, whose radius and amount are
those with the least edge error on pictures of the dev split. The truth is the same drawing rendered at 128 pixels. Of
each: edge error (mean absolute difference of the finite differences along both axes, in grey levels of 255), PSNR, and
R@1 among all pictures of the world. Differences from the diffusion decoder are paired, with 95% intervals.
"""

import argparse
import itertools
import random
import time
from pathlib import Path

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from PIL import Image, ImageFilter

import diffusers_nextflow  # noqa: F401, lets DiffusionPipeline load its pipelines
from examples.emoji.diffusion_decoder import SAMPLING_STEPS, UPSCALE, EmojiBatches, caption_of
from examples.emoji.judge import Judge
from examples.emoji.panels import in_rows
from examples.emoji.splits import PAIR
from examples.emoji.world import World, to_pixel_values

from .harness import interval, machine, report

BATCH = 25
RADII, AMOUNTS = (0.5, 0.75, 1.0, 1.5, 2.0, 3.0), (0, 25, 50, 75, 100, 150, 200, 300, 400)  # amounts in percent
COLUMNS = 8
ROWS = {"truth": "true", "vq_bicubic": "vq, bicubic", "vq_unsharp": "vq, unsharp", "diffusion": "diffusion"}


def edge_error(picture: np.ndarray, truth: np.ndarray) -> float:
    """Mean absolute difference of the finite differences of two (H, W, 3) uint8 pictures, in grey levels."""
    error = picture.astype(np.float64) - truth
    return float((abs(np.diff(error, axis=0)).mean() + abs(np.diff(error, axis=1)).mean()) / 2)


def psnr(picture: np.ndarray, truth: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(np.square(picture.astype(np.float64) - truth).mean(), 1e-10)))


def to_uint8(pixels: torch.Tensor) -> list[np.ndarray]:
    """(B, 3, H, W) in [-1, 1] -> uint8 (H, W, 3) each."""
    return list(((pixels + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy())


def enlarged(vq_model, codes: torch.Tensor, grid) -> list[np.ndarray]:
    pixels = vq_model.decode(codes, grid)
    return to_uint8(F.interpolate(pixels, scale_factor=UPSCALE, mode="bicubic", align_corners=False))


def unsharp(picture: np.ndarray, radius: float, amount: int) -> np.ndarray:
    return np.asarray(Image.fromarray(picture).filter(ImageFilter.UnsharpMask(radius, amount, threshold=0)))


def coded(pipe, pictures: np.ndarray):
    """Codes of pictures in batches, with their places and their grid."""
    for start in range(0, len(pictures), BATCH):
        pixels = to_pixel_values(list(pictures[start : start + BATCH]))
        grid = pipe.vq_model.schedules.by_size(*pixels.shape[-2:]).final_grid
        yield slice(start, start + BATCH), pipe.vq_model.encode(pixels), grid


def tune(pipe, pictures: np.ndarray, truths: np.ndarray) -> tuple[float, int]:
    """Radius and amount of the unsharp mask with the least edge error."""
    drawn = [picture for _, codes, grid in coded(pipe, pictures) for picture in enlarged(pipe.vq_model, codes, grid)]

    def error(setting: tuple[float, int]) -> float:
        return float(np.mean([edge_error(unsharp(each, *setting), truth) for each, truth in zip(drawn, truths)]))

    return min(itertools.product(RADII, AMOUNTS), key=error)


def draw_all(pipe, pictures: np.ndarray, captions: list[str], mask: tuple[float, int], arguments) -> tuple[dict, dict]:
    """What every way to draw makes of the pictures, and the seconds of the two that are no filter."""
    drawn: dict[str, list[np.ndarray]] = {name: [] for name in ROWS}
    seconds = {"vq_bicubic": 0.0, "diffusion": 0.0}
    for at, codes, grid in coded(pipe, pictures):
        began = time.process_time()
        drawn["vq_bicubic"] += enlarged(pipe.vq_model, codes, grid)
        decoded = time.process_time()
        images = pipe(
            captions[at],
            codes=codes,
            grid=grid,
            num_inference_steps=arguments.steps,
            strength=arguments.strength,
            generator=torch.Generator().manual_seed(arguments.seed + at.start),
            output_type="pt",
        ).images
        drawn["diffusion"] += to_uint8(images * 2 - 1)
        seconds["vq_bicubic"] += decoded - began
        seconds["diffusion"] += time.process_time() - decoded
    drawn["vq_unsharp"] = [unsharp(picture, *mask) for picture in drawn["vq_bicubic"]]
    return drawn, seconds


def measure(pipe, arguments) -> tuple[dict, dict[str, list[np.ndarray]], list[str]]:
    """All figures, and the pictures with their captions."""
    batches = EmojiBatches(World(arguments.data), World(arguments.large), BATCH)
    world, large = batches.world, batches.large
    dev = world.rows(PAIR, "dev")[: arguments.dev]
    mask = tune(pipe, world.pictures[dev], large.pictures[dev])
    rows = world.rows(PAIR, "test")
    rows = random.Random(arguments.seed).sample(rows, min(arguments.pictures, len(rows)))
    captions = [caption_of(world, [row]) for row in rows]
    drawn, seconds = draw_all(pipe, world.pictures[rows], captions, mask, arguments)
    truths = drawn["truth"] = list(large.pictures[rows])
    judge, errors = Judge(world), {}
    figures: dict = {"unsharp_mask": {"radius": mask[0], "percent": mask[1]}}
    for name, group in drawn.items():
        errors[name] = [edge_error(picture, truth) for picture, truth in zip(group, truths)]
        figures[name] = {"right": round(float(judge.right(group, rows)["picture"].mean()), 4)}
        if name != "truth":
            figures[name]["edge_error"] = over_pictures(errors[name])
            figures[name]["psnr"] = over_pictures([psnr(picture, truth) for picture, truth in zip(group, truths)])
    for name in ("vq_bicubic", "vq_unsharp"):
        gained = [other - ours for other, ours in zip(errors[name], errors["diffusion"])]
        figures[name]["edge_error_above_diffusion"] = over_pictures(gained)
    for name, total in seconds.items():
        figures[name]["cpu_seconds_per_picture"] = round(total / len(rows), 5)
    return figures, drawn, captions


def over_pictures(values: list[float]) -> dict:
    """Mean and half of its 95% interval."""
    return {name: value for name, value in interval(values).items() if name != "seeds"}


def sheet(drawn: dict[str, list[np.ndarray]], captions: list[str]) -> Image.Image:
    """The first pictures, one row for each way to draw; nothing is picked by hand."""
    strips = {text: Image.fromarray(np.concatenate(drawn[name][:COLUMNS], axis=1)) for name, text in ROWS.items()}
    return in_rows(strips, captions[:COLUMNS], edge=128)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decoder", default="runs/emoji-decoder/decoder", metavar="NAME", help="default: %(default)s")
    parser.add_argument("--data", type=Path, default=Path("runs/emoji/data"), help="default: %(default)s")
    parser.add_argument("--large", type=Path, default=Path("runs/emoji/data-128"), help="default: %(default)s")
    parser.add_argument("--pictures", type=int, default=200, metavar="N", help="default: %(default)s")
    parser.add_argument("--dev", type=int, default=50, metavar="N", help="to tune the mask (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=SAMPLING_STEPS, metavar="N", help="default: %(default)s")
    parser.add_argument("--strength", type=float, default=1.0, help="below 1 from the enlarged picture")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    parser.add_argument("--sheet", type=Path, metavar="PNG", help="also draw a contact sheet")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the JSON to a file")
    arguments = parser.parse_args()
    pipe = DiffusionPipeline.from_pretrained(arguments.decoder)
    pipe.set_progress_bar_config(disable=True)
    figures, drawn, captions = measure(pipe, arguments)
    figures["settings"] = {name: getattr(arguments, name) for name in ("pictures", "dev", "steps", "strength", "seed")}
    figures["machine"] = machine(torch.device("cpu")) | {"diffusers": diffusers.__version__}
    report(figures, arguments.json, arguments.output)
    if arguments.sheet is not None:
        arguments.sheet.parent.mkdir(parents=True, exist_ok=True)
        sheet(drawn, captions).save(arguments.sheet, optimize=True)


if __name__ == "__main__":
    main()
