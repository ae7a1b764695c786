"""A decoder by the training script at a tiny size, and the console command that draws with it."""

import ast
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", reason="the diffusion decoder needs diffusers")
pytest.importorskip("accelerate")

from accelerate.state import AcceleratorState
from diffusers import DiffusionPipeline
from PIL import Image

from diffusers_nextflow import NextFlowPipeline, training_command
from tests.diffusers.tiny_decoders import decoder, stock_components, stock_pipeline, tiny_vq_model
from transformers_nextflow import cli

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True, scope="module")
def precision_of_its_own():
    """accelerate keeps a process's first choice, of trainings in other modules too."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def folder(tiny_model, tmp_path_factory) -> Path:
    """`new`, and `trained` by the script for two steps, on the tiny model's codes, at twice their size."""
    folder = tmp_path_factory.mktemp("decoder")
    decoder("unet", trained=True, vq_model=tiny_model.model.vq_model).save_pretrained(folder / "new")
    rng, lines = np.random.default_rng(0), []
    for number in range(4):
        Image.fromarray(rng.integers(0, 256, (48, 48, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        lines.append(json.dumps({"key": str(number), "text": f"a cat {number}", "image": f"{number}.png"}))
    (folder / "rows.jsonl").write_text("\n".join(lines))
    options = {
        "--pretrained_model_name_or_path": folder / "new",
        "--dataset_name": folder / "rows.jsonl",
        "--output_dir": folder / "trained",
        "--stage": "x2",
        "--train_batch_size": 2,
        "--max_steps": 2,
        "--sample_steps": 2,
        "--num_inference_steps": 1,
        "--num_samples": 2,
        "--proportion_empty_prompts": 0.5,
    }
    training_command.main([*(str(word) for option in options.items() for word in option), "--use_ema", "--use_cpu"])
    return folder


@pytest.fixture(scope="module")
def pipe(folder):
    pipe = DiffusionPipeline.from_pretrained(folder / "trained")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_script_trains_the_second_stage(folder, pipe):
    drawn = sorted((folder / "trained" / "samples" / "step-2").iterdir())
    assert len(drawn) == 2 and Image.open(drawn[0]).size == (48, 2 * 48)
    new = DiffusionPipeline.from_pretrained(folder / "new")
    for name, weight in pipe.vq_model.state_dict().items():
        assert torch.equal(weight, new.vq_model.state_dict()[name]), name
    assert not torch.equal(new.conditioner.projection.weight, pipe.conditioner.projection.weight)
    assert not torch.equal(new.unet.conv_in.weight, pipe.unet.conv_in.weight)
    assert (new.conditioner.config.upscale, pipe.conditioner.config.upscale) == (1, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--stage", "x4"], "--stage must be one of base, x2, got x4"),
        (["--adapter", "runs/base"], "--adapter continues adapters: give their --rank"),
    ],
)
def test_script_refuses_options_that_contradict_each_other(options, message, capsys, install):
    install()
    status = cli.main(["train", "decoder", "--model", "x", "--dataset_name", "images", "--output", "y", *options])
    assert status == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_help_is_the_scripts_own(capsys, install):
    install()
    assert cli.main(["train", "decoder", "--help"]) == 0
    assert "--train_batch_size" in capsys.readouterr().out


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


def test_generate_ends_in_the_decoder(console, folder, pipe, tiny_checkpoint, install):
    install()
    options = ("--seed", 3, "--decoder", "diffusion", "--decoder-model", folder / "trained", "--decoder-steps", 2)
    status, out, err = console("generate", "a red circle", *options, "--num-images", 2, "--json")
    assert status == 0, err
    figures = json.loads(out)
    assert (figures["width"], figures["height"]) == (48, 48)
    whole = NextFlowPipeline.from_pretrained(tiny_checkpoint, decoder=pipe)
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
        (["--decoder", "diffusion", "--decoder-model", "x/y", "--decoder-steps", "0"], "must be at least 1, got 0"),
    ],
)
def test_decoder_options_that_contradict_each_other(console, options, message):
    status, _, err = console("generate", "a red circle", *options)
    assert status == 2 and message in err


def test_decoders_that_cannot_be(console, folder, tmp_path, install):
    install()
    stock_pipeline("unet", stock_components("unet")).save_pretrained(tmp_path / "stock")
    (tmp_path / "empty").mkdir()
    shutil.copytree(folder / "trained", tmp_path / "damaged")
    decoder("unet", vq_model=tiny_vq_model()).save_pretrained(tmp_path / "another")
    weights = tmp_path / "damaged" / "conditioner" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    for name, message in (
        ("another", "decodes another vision tokenizer's codes"),
        ("stock", "stock must hold a diffusion decoder (NextFlowDecoderPipeline, "),
        ("stock", "NextFlowQwenImageDecoderPipeline), got a StableDiffusionPipeline"),
        ("empty", "no file named model_index.json found in directory empty"),
        ("damaged", "damaged/conditioner/diffusion_pytorch_model.safetensors"),
    ):
        status, _, err = console("generate", "a red circle", "--decoder", "diffusion", "--decoder-model", name)
        assert status == 2 and message in err


def test_decoders_without_diffusers(console, folder, install, monkeypatch):
    options = ("--decoder", "diffusion", "--decoder-model", folder / "trained")
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
