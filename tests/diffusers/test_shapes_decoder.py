"""The shapes world's decoder at a tiny size: recipe, training script, benchmark and console command."""

import argparse
import ast
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.fft
import torch

pytest.importorskip("diffusers", reason="the diffusion decoder needs diffusers")
pytest.importorskip("accelerate")

from accelerate.state import AcceleratorState
from diffusers import DiffusionPipeline
from PIL import Image

from benchmarks.diffusion_decoder import edge_error, held_out_scenes, measure, reduced, sheet
from diffusers_nextflow import NextFlowPipeline, PixelAutoencoder
from examples import train_diffusion_decoder
from examples.shapes.diffusion_decoder import CHECKPOINT, ShapesBatches, export, new_decoder
from examples.shapes.world import is_training_scene, render
from tests.diffusers.tiny_decoders import stock_components, stock_pipeline
from transformers_nextflow.loading import load_vq_model

ROOT = Path(__file__).parents[2]
SHAPES = ROOT / "checkpoints" / "nextflow-shapes"


@pytest.fixture(autouse=True, scope="module")
def precision_of_its_own():
    """accelerate keeps a process's first choice, of trainings in other modules too."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """By the training script, for two steps, and exported."""
    folder = tmp_path_factory.mktemp("decoder")
    new_decoder(load_vq_model(str(SHAPES)), widths=(8, 8, 8)).save_pretrained(folder / "new")
    options = {
        "--pretrained_model_name_or_path": folder / "new",
        "--output_dir": folder / "trained",
        "--stage": "x2",
        "--train_batch_size": 2,
        "--max_train_steps": 2,
        "--num_inference_steps": 1,
        "--num_validation_images": 2,
        "--proportion_empty_prompts": 0.5,
    }
    with pytest.MonkeyPatch.context() as patch:
        given = [str(word) for option in options.items() for word in option]
        patch.setattr(sys, "argv", ["train_diffusion_decoder", *given, "--shapes", "--use_ema"])
        train_diffusion_decoder.main()
    export(folder / "trained", folder / "exported")
    return folder


@pytest.fixture(scope="module")
def pipe(trained):
    pipe = DiffusionPipeline.from_pretrained(trained / "exported")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_script_trains_and_exports(trained, pipe):
    assert json.loads((trained / "trained" / "log.jsonl").read_text().splitlines()[-1])["step"] == 2
    sheet = Image.open(trained / "trained" / "validation" / "step-2.png")
    assert sheet.width in (2 * 128, 2 * 192) and sheet.height in (2 * 128, 2 * 192)
    parts = pipe.unet, pipe.vq_model, pipe.conditioner
    assert {parameter.dtype for part in parts for parameter in part.parameters()} == {torch.float32}
    whole = DiffusionPipeline.from_pretrained(trained / "trained")
    for name, weight in pipe.unet.state_dict().items():
        assert torch.equal(weight, whole.unet.state_dict()[name].half().float())
    for name, weight in pipe.vq_model.state_dict().items():  # the shipped ones, which are so already
        assert torch.equal(weight, whole.vq_model.state_dict()[name])
    new = DiffusionPipeline.from_pretrained(trained / "new")
    assert not torch.equal(new.conditioner.projection.weight, pipe.conditioner.projection.weight)
    assert pipe.conditioner.config.upscale == 2


def test_the_default_model_has_a_decoder_of_its_own(console, install):
    install()
    options = ("generate", "a red circle", "--seed", 3, "--decoder", "diffusion", "--decoder-steps", 4)
    for name, more in (("own.png", ()), ("named.png", ("--decoder-model", CHECKPOINT))):
        status, _, err = console(*options, *more, "--output", name, model=None)
        assert status == 0, err
    assert Image.open("own.png").tobytes() == Image.open("named.png").tobytes()
    red, green, blue = np.asarray(Image.open("own.png"), dtype=int).transpose(2, 0, 1)
    assert 100 < ((red > 180) & (green < 90) & (blue < 90)).sum() < 64 * 64  # of 128 x 128


def test_the_shipped_decoder_is_small():
    assert sum(path.stat().st_size for path in CHECKPOINT.rglob("*") if path.is_file()) < 25_000_000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--stage", "x4"], "--stage must be one of base, x2, got x4"),
        (["--shapes", "--dataset_name", "images"], "give either --dataset_name or --shapes"),
        ([], "give either --dataset_name or --shapes"),
        (["--shapes", "--shards", "packs"], "--shards hold codes alone"),
        (["--shapes", "--adapter", "runs/base"], "--adapter continues adapters: give their --rank"),
    ],
)
def test_script_refuses_options_that_contradict_each_other(options, message, capsys, monkeypatch):
    given = ["--pretrained_model_name_or_path", "x", "--output_dir", "y", *options]
    monkeypatch.setattr(sys, "argv", ["train_diffusion_decoder", *given])
    with pytest.raises(SystemExit):
        train_diffusion_decoder.main()
    assert message in " ".join(capsys.readouterr().err.split())


def test_batches_are_scenes_at_both_sizes_and_follow_from_their_number():
    batches = ShapesBatches(3, 2, seed=1)
    first, again, other = batches[0], batches[0], batches[1]
    assert torch.equal(first["pixel_values"], again["pixel_values"]) and first["captions"] == again["captions"]
    assert first["captions"] != other["captions"]
    means = torch.nn.functional.avg_pool2d(first["pixel_values"], 2)
    assert (means - first["coded_pixels"]).abs().mean() < 0.002  # edges are computed at each size
    assert set(ShapesBatches(3, 2, empty_share=1.0)[0]["captions"]) == {""}


def test_pixel_autoencoder_is_the_cosine_transform_of_patches(tmp_path):
    scales = [0.5 + index for index in range(16)]
    vae = PixelAutoencoder(frequency_scales=scales)
    pixels = torch.rand(2, 3, 8, 16) * 2 - 1
    latents = vae.encode(pixels).latents
    patch = scipy.fft.dctn(pixels[1, 2, 4:8, 12:16].numpy(), norm="ortho").flatten() / scales
    torch.testing.assert_close(latents[1, 32:, 1, 3], torch.from_numpy(patch), check_dtype=False)
    torch.testing.assert_close(vae.decode(latents).sample, pixels)
    assert vae.decode(3 * latents).sample.abs().max() == 1
    assert not any(parameter.requires_grad for parameter in vae.parameters())
    torch.testing.assert_close(PixelAutoencoder().encode(pixels).latents.norm(), pixels.norm())
    small = PixelAutoencoder(block_out_channels=(3, 12), latent_channels=12, frequency_scales=scales[:4])
    small.save_pretrained(tmp_path)
    loaded = PixelAutoencoder.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.decode(loaded.encode(pixels)[0], return_dict=False)[0], pixels)
    torch.testing.assert_close(loaded.encode(pixels).latents, small.encode(pixels).latents, rtol=0, atol=0)


def test_pixel_autoencoder_names_what_does_not_fit():
    with pytest.raises(ValueError, match=r"must be \[3, 12, 48\].*got \[3, 12, 48\] and 12"):
        PixelAutoencoder(latent_channels=12)
    for scales in ([1.0] * 4, [1.0] * 15 + [0.0]):
        with pytest.raises(ValueError, match=r"frequency_scales must be 16 positive numbers, got \[1"):
            PixelAutoencoder(frequency_scales=scales)


# The benchmark


def test_measures_are_what_they_say():
    scenes = held_out_scenes(7, 0, "test")
    assert len(scenes) == 7 and not all(is_training_scene(scene) for _, scene in scenes)
    assert not {request.text for request, _ in scenes} & {r.text for r, _ in held_out_scenes(7, 0, "dev")}
    truth = render(scenes[0][1], 2)
    assert edge_error(truth, truth) == 0
    step = np.zeros((4, 4, 3), np.uint8)
    step[:, 2:] = 120  # one of three differences along x, none along y
    assert edge_error(step, np.zeros_like(step)) == 20
    assert abs(reduced(truth).astype(int) - render(scenes[0][1])).max() <= 3


def test_benchmark(pipe):
    arguments = argparse.Namespace(pictures=6, dev=2, seed=0, steps=1, strength=1.0)
    figures, pictures, captions = measure(pipe, arguments)
    assert figures["truth"] == {"judge": 1.0}
    assert all(picture.shape == (128, 128, 3) for group in pictures.values() for picture in group)
    for name in ("vq_bicubic", "vq_unsharp", "diffusion"):
        assert figures[name]["edge_error"]["mean"] > 0 and 0 <= figures[name]["judge"] <= 1
        errors = [edge_error(p, truth) for p, truth in zip(pictures[name], pictures["truth"])]
        assert figures[name]["edge_error"]["mean"] == pytest.approx(np.mean(errors), abs=1e-4)
    # two steps of training are none
    assert figures["vq_bicubic"]["edge_error_above_diffusion"]["mean"] < 0
    assert sheet(pictures, captions).width == 6 * 192


# The console command


@pytest.fixture
def install(tmp_path_factory, monkeypatch):
    """The package's metadata, as an installation of this tree has them; `False`: those of one without entry points."""

    def install(entry_points: bool = True) -> None:
        tomllib = pytest.importorskip("tomllib", reason="Python before 3.11 reads no TOML")
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        folder = tmp_path_factory.mktemp("site-packages")
        metadata = folder / f"transformers_nextflow-{project['version']}.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Name: {project['name']}\nVersion: {project['version']}\n")
        groups = project["entry-points"] if entry_points else {}
        lines = [line for group, names in groups.items() for line in (f"[{group}]", *map(" = ".join, names.items()))]
        (metadata / "entry_points.txt").write_text("\n".join(lines))
        monkeypatch.syspath_prepend(folder)

    return install


def test_generate_ends_in_the_decoder(console, trained, pipe, install):
    install()
    options = ("--seed", 3, "--decoder", "diffusion", "--decoder-model", trained / "exported", "--decoder-steps", 2)
    status, out, err = console("generate", "a red circle", *options, "--num-images", 2, "--json", model=SHAPES)
    assert status == 0, err
    figures = json.loads(out)
    assert (figures["width"], figures["height"]) == (128, 128)
    whole = NextFlowPipeline.from_pretrained(SHAPES, decoder=pipe)
    steps = {"num_inference_steps": 2}
    expected = whole("a red circle", seed=3, num_images_per_prompt=2, decoder_kwargs=steps).images
    for number in (0, 1):
        assert Image.open(f"picture-{number}.png").tobytes() == expected[number].tobytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--decoder", "diffusion"], "needs --decoder-model"),
        (["--decoder-model", "x/y"], "belong to --decoder diffusion"),
        (["--decoder", "diffusion", "--decoder-model", "missing"], "there is no model directory missing"),
        (["--decoder", "diffusion", "--decoder-model", "x/y", "--decoder-steps", "0"], "must be positive, got 0"),
    ],
)
def test_decoder_options_that_contradict_each_other(console, options, message):
    status, _, err = console("generate", "a red circle", *options)
    assert status == 2 and message in err


def test_decoders_that_cannot_be(console, trained, tmp_path, install):
    install()
    stock_pipeline("unet", stock_components("unet")).save_pretrained(tmp_path / "stock")
    (tmp_path / "empty").mkdir()
    shutil.copytree(trained / "exported", tmp_path / "damaged")
    weights = tmp_path / "damaged" / "conditioner" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    for name, message in (
        # the tiny model's tokenizer is not the shapes world's
        (trained / "exported", "decodes another vision tokenizer's codes"),
        ("stock", "stock must hold a diffusion decoder (NextFlowDecoderPipeline, "),
        ("stock", "NextFlowQwenImageDecoderPipeline), got a StableDiffusionPipeline"),
        ("empty", "no file named model_index.json found in directory empty"),
        ("damaged", "damaged/conditioner/diffusion_pytorch_model.safetensors"),
    ):
        status, _, err = console("generate", "a red circle", "--decoder", "diffusion", "--decoder-model", name)
        assert status == 2 and message in err


def test_decoders_without_diffusers(console, trained, install, monkeypatch):
    options = ("--decoder", "diffusion", "--decoder-model", trained / "exported")
    install()
    for name in [name for name in sys.modules if name.split(".")[0] in ("diffusers", "diffusers_nextflow")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    status, _, err = console("generate", "a red circle", *options)
    assert status == 2 and "--decoder diffusion needs a package that is not installed (" in err
    assert err.rstrip().endswith("pip install 'transformers-nextflow[diffusers]'")
    install(entry_points=False)
    status, _, err = console("generate", "a red circle", *options)
    assert status == 2 and "no installed package loads decoders for --decoder diffusion" in err


def test_the_package_below_does_not_import_this_one():
    for path in (ROOT / "src" / "transformers_nextflow").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] == "diffusers_nextflow" for name in names), path
