"""The wheel alone, in an environment of its own and outside of the repository: its command does all there is."""

import json
import shutil
import subprocess
import sys
import sysconfig
import venv
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
import json, sys
from transformers_nextflow import __file__ as file
from transformers_nextflow.cli import main
assert file.startswith(sys.prefix), file
for words in json.loads(sys.argv[1]):
    assert main(list(map(str, words))) == 0
    print(end="\f", flush=True)
"""
ONE = ("--max_steps", 1, "--use_cpu", "--report_to", "none", "--save_strategy", "no")


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Path:
    """With the wheel, and beside it the packages of this one but not what is installed of the repository."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder), str(source)]
    subprocess.run(build, check=True, capture_output=True)
    venv.create(folder / "environment", with_pip=False)
    (wheel,) = folder.glob("*.whl")
    python = folder / "environment" / "bin" / "python"
    packages = folder / "environment" / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    (packages / "beside.pth").write_text(sysconfig.get_path("purelib"))
    install = [*pip, "--python", str(python), "install", "--no-deps", "--no-index", "--ignore-installed", str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    return folder / "environment"


def run(environment: Path, folder: Path, *arguments) -> str:
    return fresh.run(*arguments, folder=folder, python=environment / "bin" / "python", PYTHONPATH="")


def photos(folder: Path) -> None:
    """Four with captions, of the size that the tiny tokenizer has."""
    folder.mkdir()
    lines = []
    for number in range(4):
        Image.new("RGB", (24, 24), (60 * number, 0, 0)).save(folder / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": f"red {number}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))


def test_pictures_become_a_model_that_is_exported(environment, tiny_checkpoint, tmp_path):
    photos(tmp_path / "photos")
    finetune = ("finetune", "photos", "--output", "tuned", "--steps", 2, "--batch-size", 2, "--evaluations", 1)
    finetune += ("--model", str(tiny_checkpoint))
    train = ("train", "transformer", "--packs", "tuned/data/training-packs", "--model", "tuned", "--output", "on")
    loss = ("evaluate", "loss", "tuned/data/held-out-packs", "--json", "--model")
    lines = [finetune, (*train, *ONE), ("merge", "on", "--output", "whole"), (*loss, "on"), (*loss, "whole")]
    lines.append(("export", "whole", "--to", "exported"))
    lines.append(("generate", "red", "--model", "exported", "--seed", 0))
    out = run(environment, tmp_path, "-c", IN_TURN, json.dumps(lines)).split("\f")
    losses = [json.loads(part) for part in out[3:5]]
    assert losses[0] == losses[1] and losses[0]["loss_vision"] > 0
    assert Image.open(tmp_path / "picture.png").size == (24, 24)


def test_every_command_is_in_it_and_every_training_runs(environment, tiny_model, tiny_checkpoint, tmp_path):
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
    pages = run(environment, tmp_path, "-c", IN_TURN, json.dumps(lines)).split("\f")
    for command, page in zip(COMMANDS, pages):
        assert f"transformers-nextflow {command}" in page
    rewards = ("--dataset_name", "prompts.jsonl", "--reward_funcs", "rewards.size", "--model", "converted")
    groups = ("--num_generations", 2, "--per_device_train_batch_size", 2)
    run(environment, tmp_path, environment / "bin" / "transformers-nextflow", *train("grpo", *rewards, *groups))
    for name in ("converted", "tokenizer", "grpo"):
        assert (tmp_path / name / "model.safetensors").is_file()
    assert (tmp_path / "decoder" / "model_index.json").is_file()
