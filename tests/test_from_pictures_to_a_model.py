"""The documented way from raw files to a picture, each step by its command and at its default rate.

A Qwen2.5-VL in bfloat16 -> convert -> alignment -> fine-tuning by LoRA -> GRPO from those adapters -> merge -> export
-> another process. Whatever one step writes is all that the next one gets.
"""

import functools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests import fresh
from tests.conftest import build_config
from tests.conversion.text_models import qwen2_5_vl, save
from tests.tiny_tokenizer import tiny_text_tokenizer
from transformers_nextflow import NextFlowVQConfig, NextFlowVQModel
from transformers_nextflow.cli import main
from transformers_nextflow.utils.loading import load_model

pytest.importorskip("datasets")
pytest.importorskip("peft")
pytest.importorskip("trl")
from transformers_nextflow.training.grpo import NextFlowGRPOConfig, NextFlowGRPOTrainer  # noqa: E402

LEVELS = {"256": 2, "1024": 3}  # the paper's names, so that its stages are what is trained
CAPTIONS = {"a red circle": (220, 40, 40), "a blue square": (40, 40, 220), "a green star": (40, 200, 40)}
QUIET = ("--report_to", "none", "--use_cpu", "--disable_tqdm", "True")
REWARD = """\
def redness(images, **columns):
    return [image.resize((1, 1)).getpixel((0, 0))[0] / 255 for image in images]
"""
FRESH = """\
import sys
import torch
from transformers import AutoModelForMultimodalLM, AutoProcessor
import transformers_nextflow

model = AutoModelForMultimodalLM.from_pretrained(sys.argv[1]).eval()
processor = AutoProcessor.from_pretrained(sys.argv[1])
chats = [[{"role": "user", "content": caption}] for caption in sys.argv[3:]]
inputs = processor.apply_chat_template(chats, generation_mode="image")
torch.save(model.generate(**inputs, generation_mode="image", seed=3), sys.argv[2])
"""


def run(*words) -> None:
    assert main(list(map(str, words))) == 0


def photos(folder: Path, first: int, count: int) -> None:
    """Noise around a colour that the caption names; every code occurs."""
    folder.mkdir()
    lines = []
    for number in range(first, first + count):
        text, color = list(CAPTIONS.items())[number % len(CAPTIONS)]
        noise = np.random.default_rng(number).normal(0, 60, (24, 24, 3))
        Image.fromarray((color + noise).clip(0, 255).astype(np.uint8)).save(folder / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": text}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))


def tokenizer_folder(folder: Path) -> None:
    torch.manual_seed(2)
    config = build_config(tiny_text_tokenizer()).vq_config.to_dict()
    config |= {"codebook_size": 32, "scale_schedules": [[[1, 1], [2, 2], [3, 3]]], "levels": LEVELS}
    model = NextFlowVQModel(NextFlowVQConfig(**config))
    with torch.no_grad():  # at initialisation every picture has the same codes
        model.semantic_to_code[-1].weight.mul_(50)
        model.pixel_encoder.to_code.weight.mul_(50)
    model.save_pretrained(folder)


def packs(model: str, level: str, photos: str) -> str:
    """Both directions, as the stages mix them."""
    name, parts = f"{photos}-{level}", []
    for task in ("text-to-image", "captioning"):
        parts.append(f"{name}-{task}")
        run("data", "extract", photos, "--output", parts[-1], "--task", task, "--level", level, "--model", model)
    run("data", "pack", *parts, "--output", f"{name}-packs", "--length", 128, "--multiple-of", 4, "--model", model)
    return f"{name}-packs"


@pytest.fixture(scope="module", autouse=True)
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("way")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
        yield folder


def weights(name: str) -> dict[str, torch.Tensor]:
    return {key: tensor.float() for key, tensor in load_model(name)[0].state_dict().items()}


def share_moved(before: dict, after: dict, names) -> float:
    """Of the numbers in the tensors of these names."""
    names = list(names)
    changed = sum(int((before[name] != after[name]).sum()) for name in names)
    return changed / sum(before[name].numel() for name in names)


def train(model: str, output: str, level: str, *words) -> str:
    arguments = ("--packs", packs(model, level, "training"), "--max_steps", 20, "--per_device_train_batch_size", 4)
    averaged = ("--ema_decay", "0.5", "--save_steps", 10)
    run("train", "transformer", "--model", model, "--output", output, *arguments, *averaged, *QUIET, *words)
    packs(model, level, "held_out")
    return output


@pytest.fixture(scope="module")
def start(here) -> str:
    """What conversion writes, and the pictures."""
    tokenizer = tiny_text_tokenizer()
    save(qwen2_5_vl(tokenizer), tokenizer, Path("qwen"), torch.bfloat16, "hub")
    tokenizer_folder(Path("vq"))
    photos(Path("training"), 0, 24)
    photos(Path("held_out"), 24, 6)
    run("convert", "language-model", "qwen", "vq", "start")
    return "start"


@pytest.fixture(scope="module")
def aligned(start) -> str:
    return train(start, "aligned", "256", "--stage", "alignment")


@pytest.fixture(scope="module")
def tuned(aligned) -> str:
    return train(aligned, "tuned", "1024", "--stage", "sft", "--use_lora")


@pytest.fixture(scope="module")
def untuned(tuned) -> str:
    """The adapters that tuning begins with."""
    words = ("--stage", "sft", "--use_lora", "--max_steps", 1, "--learning_rate", 0)
    arguments = ("--packs", "training-1024-packs", "--model", "aligned", "--per_device_train_batch_size", 4)
    run("train", "transformer", "--output", "untuned", *arguments, *QUIET, *words)
    return "untuned"


def reinforce(model: str, output: str, *words) -> str:
    Path("own_rewards.py").write_text(REWARD)
    Path("prompts").mkdir(exist_ok=True)
    Path("prompts/rows.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in CAPTIONS))
    run(
        *("train", "grpo", "--dataset_name", "prompts", "--reward_funcs", "own_rewards.redness", "--model", model),
        *("--output", output, "--num_generations", 8, "--per_device_train_batch_size", 24, "--ema_decay", "0.5"),
        *(*QUIET, *words),
    )
    return output


@pytest.fixture(scope="module")
def reinforced(tuned) -> str:
    return reinforce(tuned, "reinforced", "--max_steps", 60)


def loss(model: str, level: str, capsys) -> float:
    capsys.readouterr()
    run("evaluate", "loss", f"held_out-{level}-packs", "--model", model, "--dtype", "float32", "--json")
    return json.loads(capsys.readouterr().out)["loss"]


@functools.cache
def reward(model: str) -> float:
    """Of many pictures, drawn with the same random numbers whatever the model."""
    sys.path.insert(0, str(Path.cwd()))
    from own_rewards import redness

    sizes = dict.fromkeys(("num_generations", "per_device_train_batch_size", "per_device_eval_batch_size"), 64)
    arguments = NextFlowGRPOConfig("judged", report_to="none", use_cpu=True, **sizes)
    prompts = [{"prompt": text} for text in CAPTIONS]
    return NextFlowGRPOTrainer(model, redness, arguments, eval_dataset=prompts).evaluate()["eval_reward"]


def codes_of_another_process(model: str, output: str) -> torch.Tensor:
    fresh.run("-c", FRESH, model, output, *CAPTIONS)
    return torch.load(output, weights_only=True)


@pytest.mark.parametrize("average", ["", "/ema"], ids=["weights", "average"])
def test_alignment_trains_connector_and_heads(start, aligned, average, capsys):
    before, after = weights(start), weights(aligned + average)
    trained = [name for name in before if name.startswith(("model.connector", "lm_head", "code_head"))]
    assert share_moved(before, after, trained) >= 0.99
    assert not share_moved(before, after, before.keys() - set(trained))
    assert loss(aligned + average, "256", capsys) < loss(start, "256", capsys)


@pytest.mark.parametrize("average", ["", "/ema"], ids=["weights", "average"])
def test_tuning_trains_adapters(aligned, untuned, tuned, average, capsys):
    before, after = (load_file(f"{name}/adapter_model.safetensors") for name in (untuned, tuned + average))
    assert len(after) > 2 * 7 * 2 and all(not before[name].any() for name in before if "lora_B" in name)
    assert share_moved(before, after, after) >= 0.99
    assert loss(tuned + average, "1024", capsys) < loss(aligned, "1024", capsys)


@pytest.mark.parametrize("average", ["", "/ema"], ids=["weights", "average"])
def test_reinforcement_goes_on_from_the_adapters(tuned, reinforced, average):
    before, after = (load_file(f"{name}/adapter_model.safetensors") for name in (tuned, reinforced + average))
    assert share_moved(before, after, after) >= 0.99
    assert reward(reinforced + average) > reward(tuned)


@pytest.mark.parametrize("average", ["", pytest.param("/ema", marks=pytest.mark.slow)], ids=["weights", "average"])
def test_codes_are_the_same_merged_and_exported(reinforced, average, tmp_path):
    adapters, (merged, exported) = reinforced + average, (str(tmp_path / name) for name in ("merged", "exported"))
    run("merge", adapters, "--output", merged)
    run("export", merged, "--to", exported)
    model, processor = load_model(adapters)
    chats = [[{"role": "user", "content": caption}] for caption in CAPTIONS]
    inputs = processor.apply_chat_template(chats, generation_mode="image")
    expected = model.generate(**inputs, generation_mode="image", seed=3)
    assert torch.equal(load_model(merged)[0].generate(**inputs, generation_mode="image", seed=3), expected)
    assert torch.equal(codes_of_another_process(exported, str(tmp_path / "codes.pt")), expected)
    run("generate", "a red circle", "--model", exported, "--seed", 3, "--output", tmp_path / "picture.png")
    assert Image.open(tmp_path / "picture.png").size == (24, 24)


def test_a_stage_is_held_out_by_packs_of_its_level(tuned, capsys):
    packs = ("--packs", "training-1024-packs", "--eval_packs", "held_out-256-packs")
    arguments = ("train", "transformer", "--model", "aligned", "--output", "other", "--stage", "sft", *packs, *QUIET)
    assert main(list(arguments)) == 2
    assert "stage sft is of level 1024, the packs hold pictures of level 256" in capsys.readouterr().err
    assert not Path("other").exists()
