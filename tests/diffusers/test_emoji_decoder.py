"""The recipe and the benchmark of the emoji world's decoder at a tiny size, on hand-made pictures."""

import argparse
import io
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", reason="the diffusion decoder needs diffusers")
pytest.importorskip("accelerate")

from accelerate.state import AcceleratorState
from diffusers import DiffusionPipeline
from PIL import Image, ImageDraw

from benchmarks.diffusion_decoder import edge_error, measure, sheet
from examples.emoji import diffusion_decoder
from examples.emoji.data import FEATURES
from examples.emoji.diffusion_decoder import EmojiBatches, frequency_scales_of, new_decoder
from examples.emoji.sizes import vq_config
from examples.emoji.splits import PAIR, SEEN
from examples.emoji.world import World
from transformers_nextflow import NextFlowVQModel

PARTS = [(SEEN, "train")] * 6 + [(PAIR, "dev")] * 2 + [(PAIR, "test")] * 4


def write_world(folder: Path, edge: int, count: int = len(PARTS)) -> Path:
    """A disc of its own place and colour for each name, drawn at any size."""
    rows = []
    for number, (part, split) in enumerate(PARTS[:count]):
        image = Image.new("RGB", (edge, edge), "white")
        left, top = edge * (number % 4) / 8, edge * (number // 4) / 8
        disc = (left, top, left + edge / 2, top + edge / 2)
        ImageDraw.Draw(image).ellipse(disc, (20 * number, 250 - 20 * number, 90))
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        row = {"name": f"disc {number}", "style": "noto", "label": "disc", "tags": ["disc"], "part": part}
        rows.append(row | {"split": split, "twin": number, "image": {"bytes": buffer.getvalue(), "path": None}})
    datasets.Dataset.from_list(rows, features=FEATURES).save_to_disk(folder)
    return folder


@pytest.fixture(autouse=True, scope="module")
def precision_of_its_own():
    """accelerate keeps a process's first choice, of trainings in other modules too."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("worlds")
    return {name: write_world(folder / name, edge) for name, edge in (("data", 64), ("large", 128))}


@pytest.fixture(scope="module")
def batches(folders) -> EmojiBatches:
    return EmojiBatches(World(folders["data"]), World(folders["large"]), 3, seed=1)


@pytest.fixture(scope="module")
def trained(folders, tmp_path_factory) -> Path:
    """By the recipe's command, for two steps of two pictures."""
    folder = tmp_path_factory.mktemp("decoder")
    torch.manual_seed(0)
    NextFlowVQModel(vq_config()).save_pretrained(folder / "vq")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diffusion_decoder, "BATCH", 2)
        patch.setattr(diffusion_decoder.new_decoder, "__defaults__", ((8, 8, 8), 0))
        given = [word for name, path in folders.items() for word in (f"--{name}", str(path))]
        given += ["--model", str(folder / "vq"), "--output", str(folder / "run"), "--steps", "2"]
        patch.setattr(sys, "argv", ["diffusion_decoder", *given])
        diffusion_decoder.main()
    return folder / "run" / "decoder"


def test_batches_are_the_same_seen_pictures_at_both_sizes(batches):
    shapes = set()
    for number in range(12):
        batch, again = batches[number], batches[number]
        assert all(torch.equal(batch[name], again[name]) for name in ("coded_pixels", "pixel_values"))
        height, width = batch["coded_pixels"].shape[-2:]
        assert batch["pixel_values"].shape == (3, 3, 2 * height, 2 * width)
        halved = torch.nn.functional.avg_pool2d(batch["pixel_values"], 2)
        assert (halved - batch["coded_pixels"]).abs().mean() < 0.1  # drawn anew at each size
        shapes.add((height, width))
        for caption in batch["captions"]:
            numbers = [int(part.split()[1]) for part in caption.replace(", noto", "").split(", ")]
            assert all(PARTS[number][1] == "train" for number in numbers)
            assert len(numbers) == max(height, width) // min(height, width)
    assert (64, 64) in shapes and len(shapes) > 1


def test_pictures_of_another_size_or_world_are_refused(folders, tmp_path):
    world = World(folders["data"])
    with pytest.raises(ValueError, match="must be the 12 of the data set at 128 pixels, got 12 of 64"):
        EmojiBatches(world, world, 2)
    with pytest.raises(ValueError, match="got 5 of 128"):
        EmojiBatches(world, World(write_world(tmp_path / "fewer", 128, 5)), 2)


def test_frequencies_are_scaled_by_the_roots_of_their_deviations(batches):
    scales = frequency_scales_of(batches, 2)
    assert len(scales) == 16 and scales[0] == max(scales) and min(scales) > 0
    pipe = new_decoder(NextFlowVQModel(vq_config()), scales, widths=(8, 8, 8))
    assert pipe.vae.config.frequency_scales == scales and pipe.conditioner.config.upscale == 2


def test_the_recipe_trains_exports_and_goes_on(trained):
    pipe = DiffusionPipeline.from_pretrained(trained)
    assert {parameter.dtype for parameter in pipe.unet.parameters()} == {torch.float32}
    assert all(torch.equal(weight, weight.half().float()) for weight in pipe.unet.state_dict().values())
    assert "_name_or_path" not in (trained / "unet" / "config.json").read_text()


def test_edge_error_is_of_the_finite_differences():
    step = np.zeros((4, 4, 3), np.uint8)
    step[:, 2:] = 120  # one of three differences along x, none along y
    assert edge_error(step, step) == 0
    assert edge_error(step, np.zeros_like(step)) == 20


def test_benchmark(trained, folders):
    pipe = DiffusionPipeline.from_pretrained(trained)
    pipe.set_progress_bar_config(disable=True)
    figures, drawn, captions = measure(
        pipe, argparse.Namespace(**folders, pictures=3, dev=2, seed=0, steps=1, strength=1.0)
    )
    assert figures["truth"] == {"right": 1.0}
    assert len(captions) == 3 and all(picture.shape == (128, 128, 3) for group in drawn.values() for picture in group)
    for name in ("vq_bicubic", "vq_unsharp", "diffusion"):
        errors = [edge_error(picture, truth) for picture, truth in zip(drawn[name], drawn["truth"])]
        assert figures[name]["edge_error"]["mean"] == pytest.approx(np.mean(errors), abs=1e-4)
        assert 0 <= figures[name]["right"] <= 1
    last = np.asarray(sheet(drawn, captions))[-128 - 8 : -8, -128 - 8 : -8]  # beside two margins of 4
    assert np.array_equal(last, drawn["diffusion"][-1])
