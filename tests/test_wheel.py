"""The wheel, installed into a folder of its own and outside of the repository: its command does all there is."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests import fresh
from tests.conversion.text_models import qwen2_5_vl, save
from tests.tiny_tokenizer import tiny_text_tokenizer

pytest.importorskip("peft")
pytest.importorskip("trl")
pytest.importorskip("datasets")

ROOT = Path(__file__).parents[1]
COMMANDS = [
    *("generate", "edit", "describe", "interleave", "reconstruct", "flops", "doctor", "export", "evaluate", "merge"),
    *("finetune", "data extract", "data pack", "data verify", "data inspect", "train transformer", "train tokenizer"),
    *("train grpo", "train decoder", "convert language-model", "convert tokenflow"),
]
IN_TURN = r"""
import json, os, sys
import diffusers_nextflow, transformers_nextflow
from transformers_nextflow.cli import main
for package in (diffusers_nextflow, transformers_nextflow):
    assert package.__file__.startswith(os.environ["PYTHONPATH"]), package
for words in json.loads(sys.argv[1]):
    assert main(list(map(str, words))) == 0
    print(end="\f", flush=True)
"""
ONE = ("--max_steps", 1, "--use_cpu", "--report_to", "none", "--save_strategy", "no")


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The folder that holds the wheel's packages and what they say of themselves, and its command."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder), str(source)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    install = [*pip, "install", "--no-deps", "--no-index", "--target", str(folder / "installed"), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    return folder / "installed"


def run(installed: Path, folder: Path, *arguments) -> str:
    return fresh.run(*arguments, folder=folder, PYTHONPATH=str(installed))


def photos(folder: Path) -> None:
    """Four with captions, of the size that the tiny tokenizer has."""
    folder.mkdir()
    lines = []
    for number in range(4):
        Image.new("RGB", (24, 24), (60 * number, 0, 0)).save(folder / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": f"red {number}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))


def test_pictures_become_a_model_that_is_exported(installed, tiny_checkpoint, tmp_path):
    photos(tmp_path / "photos")
    finetune = ("finetune", "photos", "--output", "tuned", "--steps", 2, "--batch-size", 2, "--evaluations", 1)
    finetune += ("--model", str(tiny_checkpoint))
    train = ("train", "transformer", "--packs", "tuned/data/training-packs", "--model", "tuned", "--output", "on")
    loss = ("evaluate", "loss", "tuned/data/held-out-packs", "--json", "--model")
    lines = [finetune, (*train, *ONE), ("merge", "on", "--output", "whole"), (*loss, "on"), (*loss, "whole")]
    lines.append(("export", "whole", "--to", "exported"))
    lines.append(("generate", "red", "--model", "exported", "--seed", 0))
    out = run(installed, tmp_path, "-c", IN_TURN, json.dumps(lines)).split("\f")
    losses = [json.loads(part) for part in out[3:5]]
    assert losses[0] == losses[1] and losses[0]["loss_vision"] > 0
    assert Image.open(tmp_path / "picture.png").size == (24, 24)


def test_every_command_is_in_it_and_every_training_runs(installed, tiny_model, tiny_checkpoint, tmp_path):
    """A text model gets a vision tokenizer, which is trained, as are what it draws and its decoder."""
    pytest.importorskip("diffusers")
    from tests.diffusers.tiny_decoders import decoder

    photos(tmp_path / "photos")
    tokenizer = tiny_text_tokenizer()
    save(qwen2_5_vl(tokenizer), tokenizer, tmp_path / "qwen", torch.bfloat16, "hub")
    vq_model = tiny_model.model.vq_model
    vq_model.save_pretrained(tmp_path / "vq")
    decoder("unet", vq_model=vq_model).save_pretrained(tmp_path / "new")
    (tmp_path / "rewards.py").write_text("def size(images, **columns):\n    return [i.width for i in images]\n")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "red"}\n')

    def train(name: str, *words) -> tuple:
        return "train", name, "--output", name, *words, *ONE

    without = ("--perceptual_weight", 0, "--discriminator_weight", 0)
    small = ("--train_batch_size", 2, "--num_samples", 0)
    lines = [
        *((*command.split(), "--help") for command in COMMANDS),
        ("convert", "language-model", "qwen", "vq", "converted"),
        train("tokenizer", "--model", "vq", "--images", "photos", "--stage", "pixel", *without),
        train("decoder", "--model", "new", "--dataset_name", "photos", *small),
    ]
    pages = run(installed, tmp_path, "-c", IN_TURN, json.dumps(lines)).split("\f")
    for command, page in zip(COMMANDS, pages):
        assert f"transformers-nextflow {command}" in page
    rewards = ("--dataset_name", "prompts.jsonl", "--reward_funcs", "rewards.size", "--model", "converted")
    groups = ("--num_generations", 2, "--per_device_train_batch_size", 2)
    run(installed, tmp_path, installed / "bin" / "transformers-nextflow", *train("grpo", *rewards, *groups))
    for name in ("converted", "tokenizer", "grpo"):
        assert (tmp_path / name / "model.safetensors").is_file()
    assert (tmp_path / "decoder" / "model_index.json").is_file()
