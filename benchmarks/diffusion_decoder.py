"""Is the small diffusion decoder sharper than the vision tokenizer's, enlarged?
`python -m benchmarks.diffusion_decoder --output benchmarks/results/diffusion_decoder.json --sheet docs/decoder.png`

Held-out scenes of the shapes world are coded at 64 x 64 pixels and drawn at 128 x 128 from their codes alone: by the
diffusion decoder, by the vision tokenizer's decoder enlarged bicubically, and by that under an unsharp mask, whose
radius and amount are those with the least edge error on pictures of the "dev" split. The truth is the world's own
rendering at twice the size. Of each: edge error (mean absolute difference of the finite differences along both axes,
in grey levels of 255), PSNR, and the judge's score of the picture, brought back to the world's resolution by the
means of 2 x 2 pixels. Differences from the diffusion decoder are paired, with 95% intervals of a t distribution.
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
from examples.shapes.data import to_pixel_values
from examples.shapes.diffusion_decoder import CHECKPOINT, SAMPLING_STEPS, UPSCALE
from examples.shapes.grammar import CATEGORIES, Request, held_out_prompts
from examples.shapes.judge import judge_request
from examples.shapes.sheet import cell
from examples.shapes.world import Scene, render

from .harness import interval, machine, report

BATCH = 25
RADII, AMOUNTS = (0.5, 0.75, 1.0, 1.5, 2.0, 3.0), (0, 25, 50, 75, 100, 150, 200, 300, 400)  # amounts in percent
COLUMNS = 8
ROWS = {"truth": "true", "vq_bicubic": "vq, bicubic", "vq_unsharp": "vq, unsharp mask", "diffusion": "diffusion"}


def held_out_scenes(count: int, seed: int, split: str) -> list[tuple[Request, Scene]]:
    """Requests of all categories in turn, each with a scene that satisfies it."""
    each = -(-count // len(CATEGORIES))
    groups = [held_out_prompts(category, each, seed, split) for category in CATEGORIES]
    requests = [request for together in zip(*groups) for request in together][:count]
    return [(request, request.reference_scene(random.Random(f"{seed} {request.text}"))) for request in requests]


def edge_error(picture: np.ndarray, truth: np.ndarray) -> float:
    """Mean absolute difference of the finite differences of two (H, W, 3) uint8 pictures, in grey levels."""
    error = picture.astype(np.float64) - truth
    return float((abs(np.diff(error, axis=0)).mean() + abs(np.diff(error, axis=1)).mean()) / 2)


def psnr(picture: np.ndarray, truth: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(np.square(picture.astype(np.float64) - truth).mean(), 1e-10)))


def reduced(picture: np.ndarray) -> np.ndarray:
    """The means of 2 x 2 pixels, uint8."""
    height, width, _ = picture.shape
    blocks = picture.reshape(height // UPSCALE, UPSCALE, width // UPSCALE, UPSCALE, 3)
    return np.round(blocks.mean(axis=(1, 3))).astype(np.uint8)


def to_uint8(pixels: torch.Tensor) -> list[np.ndarray]:
    """(B, 3, H, W) in [-1, 1] -> uint8 (H, W, 3) each."""
    return list(((pixels + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy())


def enlarged(vq_model, codes: torch.Tensor, grid) -> list[np.ndarray]:
    pixels = vq_model.decode(codes, grid)
    return to_uint8(F.interpolate(pixels, scale_factor=UPSCALE, mode="bicubic", align_corners=False))


def unsharp(picture: np.ndarray, radius: float, amount: int) -> np.ndarray:
    return np.asarray(Image.fromarray(picture).filter(ImageFilter.UnsharpMask(radius, amount, threshold=0)))


def batches_of(pipe, scenes: list[Scene]):
    """Codes of scenes in batches, with their grid."""
    for start in range(0, len(scenes), BATCH):
        pixels = to_pixel_values([render(scene) for scene in scenes[start : start + BATCH]])
        grid = pipe.vq_model.schedules.by_size(*pixels.shape[-2:]).final_grid
        yield start, pipe.vq_model.encode(pixels), grid


def tune(pipe, scenes: list[Scene]) -> tuple[float, int]:
    """Radius and amount of the unsharp mask with the least edge error."""
    pictures = [
        picture for _, codes, grid in batches_of(pipe, scenes) for picture in enlarged(pipe.vq_model, codes, grid)
    ]
    truths = [render(scene, UPSCALE) for scene in scenes]

    def error(setting: tuple[float, int]) -> float:
        return float(np.mean([edge_error(unsharp(p, *setting), truth) for p, truth in zip(pictures, truths)]))

    return min(itertools.product(RADII, AMOUNTS), key=error)


def draw_all(pipe, scenes: list[Scene], captions: list[str], mask: tuple[float, int], arguments) -> dict:
    """Pictures of every way to draw, and the seconds of the diffusion decoder and of the vision tokenizer's."""
    pictures: dict[str, list[np.ndarray]] = {name: [] for name in ROWS}
    pictures["truth"] = [render(scene, UPSCALE) for scene in scenes]
    seconds = {"vq_bicubic": 0.0, "diffusion": 0.0}
    for start, codes, grid in batches_of(pipe, scenes):
        began = time.process_time()
        pictures["vq_bicubic"] += enlarged(pipe.vq_model, codes, grid)
        decoded = time.process_time()
        drawn = pipe(
            captions[start : start + BATCH],
            codes=codes,
            grid=grid,
            num_inference_steps=arguments.steps,
            strength=arguments.strength,
            generator=torch.Generator().manual_seed(arguments.seed + start),
            output_type="pt",
        ).images
        pictures["diffusion"] += to_uint8(drawn * 2 - 1)
        seconds["vq_bicubic"] += decoded - began
        seconds["diffusion"] += time.process_time() - decoded
    pictures["vq_unsharp"] = [unsharp(picture, *mask) for picture in pictures["vq_bicubic"]]
    return {"pictures": pictures, "seconds": seconds}


def measure(pipe, arguments) -> tuple[dict, dict[str, list[np.ndarray]], list[str]]:
    """All figures, and the pictures with their captions."""
    mask = tune(pipe, [scene for _, scene in held_out_scenes(arguments.dev, arguments.seed, "dev")])
    drawn = held_out_scenes(arguments.pictures, arguments.seed, "test")
    captions = [request.text for request, _ in drawn]
    result = draw_all(pipe, [scene for _, scene in drawn], captions, mask, arguments)
    pictures, truths = result["pictures"], result["pictures"]["truth"]
    figures: dict = {"unsharp_mask": {"radius": mask[0], "percent": mask[1]}}
    errors = {}
    for name, group in pictures.items():
        errors[name] = [edge_error(picture, truth) for picture, truth in zip(group, truths)]
        scores = [judge_request(reduced(picture), request) for picture, (request, _) in zip(group, drawn)]
        figures[name] = {"judge": round(float(np.mean(scores)), 4)}
        if name != "truth":
            figures[name]["edge_error"] = summary(errors[name])
            figures[name]["psnr"] = summary([psnr(picture, truth) for picture, truth in zip(group, truths)])
    for name in ("vq_bicubic", "vq_unsharp"):
        gained = [other - ours for other, ours in zip(errors[name], errors["diffusion"])]
        figures[name]["edge_error_above_diffusion"] = summary(gained)
    for name, seconds in result["seconds"].items():
        figures[name]["cpu_seconds_per_picture"] = round(seconds / len(drawn), 5)
    return figures, pictures, captions


def summary(values: list[float]) -> dict:
    """Mean and half of its 95% interval over pictures."""
    return {name: value for name, value in interval(values).items() if name != "seeds"}


def sheet(pictures: dict[str, list[np.ndarray]], captions: list[str]) -> Image.Image:
    """The first pictures, one row for each way to draw; nothing is picked by hand."""
    rows = [
        [cell(picture, label if column else f"{label}: {captions[column]}") for column, picture in enumerate(group)]
        for label, group in ((text, pictures[name][:COLUMNS]) for name, text in ROWS.items())
    ]
    width, height = rows[0][0].size
    result = Image.new("RGB", (width * len(rows[0]), height * len(rows)), "white")
    for top, row in enumerate(rows):
        for left, image in enumerate(row):
            result.paste(image, (left * width, top * height))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decoder", default=str(CHECKPOINT), metavar="NAME", help="default: %(default)s")
    parser.add_argument("--pictures", type=int, default=100, metavar="N", help="default: %(default)s")
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
    figures, pictures, captions = measure(pipe, arguments)
    names = ("pictures", "dev", "steps", "strength", "seed")
    figures["settings"] = {name: getattr(arguments, name) for name in names}
    figures["machine"] = machine(torch.device("cpu")) | {"diffusers": diffusers.__version__}
    report(figures, arguments.json, arguments.output)
    if arguments.sheet is not None:
        arguments.sheet.parent.mkdir(parents=True, exist_ok=True)
        sheet(pictures, captions).save(arguments.sheet, optimize=True)


if __name__ == "__main__":
    main()
