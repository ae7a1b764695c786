"""Two processes that share a model by FSDP2 train as one does; the committed settings of accelerate are understood."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from PIL import Image
from safetensors.torch import load_file
from sharded import run

from tests import fresh
from tests.ranks import SETTINGS, launched

ROOT = Path(__file__).parents[2]


def logged(folder: Path) -> list[list[float]]:
    """Of every step."""
    names = ("loss", "grad_norm", "loss_text", "loss_vision")
    return [[row[name] for name in names] for row in json.loads((folder / "log.json").read_text()) if "loss" in row]


def held_out(folder: Path) -> list[float]:
    """Losses of all evaluations."""
    return [row["eval_loss"] for row in json.loads((folder / "log.json").read_text()) if "eval_loss" in row]


def assert_same_weights(one: Path, other: Path) -> None:
    expected, got = load_file(one), load_file(other)
    assert got.keys() == expected.keys()
    assert max(float((got[name] - expected[name]).abs().max()) for name in expected) < 1e-5, one.name


def test_two_processes_under_fsdp2_train_as_one(packs, data_model, tiny_processor, tmp_path):
    """Weights, average, pictures, diagnoses and held-out losses too, over a resume, and with adapters."""
    data_model.save_pretrained(tmp_path / "model")
    tiny_processor.save_pretrained(tmp_path / "model")
    _, environment = launched("fsdp2", "--mixed_precision", "no")
    fresh.run(ROOT / "tests" / "data" / "sharded.py", packs, tmp_path, **environment)

    alone = run(packs, tmp_path, "plain")
    assert alone.state.global_step == 4 and len(logged(tmp_path / "plain-1")) == 4
    assert len(held_out(tmp_path / "plain-1")) == 2 and alone.state.best_global_step == 4
    for sharded in ("plain-2", "resumed-2"):
        assert np.allclose(logged(tmp_path / sharded), logged(tmp_path / "plain-1"), rtol=1e-5, atol=0)
        assert held_out(tmp_path / sharded) == pytest.approx(held_out(tmp_path / "plain-1"), rel=1e-5)
        for file in ("model", "ema"):
            file = Path("checkpoint-4", f"{file}.safetensors")
            assert_same_weights(tmp_path / "plain-1" / file, tmp_path / sharded / file)
        for picture in ("00.png", "01.png"):
            ones, others = (tmp_path / name / "samples" / "step-4" / picture for name in ("plain-1", sharded))
            assert np.array_equal(np.asarray(Image.open(ones)), np.asarray(Image.open(others)))
    expected, found = (diagnosed(tmp_path / name) for name in ("plain-1", "plain-2"))
    assert found == expected and list(expected) == ["4"]
    assert "the code raises" not in str(expected)
    run(packs, tmp_path, "lora", max_steps=2)
    assert np.allclose(logged(tmp_path / "lora-2"), logged(tmp_path / "lora-1"), rtol=1e-5, atol=0)
    for file in ("adapter_model", "ema"):
        file = Path("checkpoint-2", f"{file}.safetensors")
        assert_same_weights(tmp_path / "lora-1" / file, tmp_path / "lora-2" / file)


def diagnosed(folder: Path) -> dict[str, list]:
    """What every check found, by step."""
    diagnoses = json.loads((folder / "diagnoses.json").read_text())
    return {
        step: [(row["check"], row["severity"], row["fault"]) for row in diagnosis["findings"]]
        for step, diagnosis in diagnoses.items()
    }


@pytest.fixture
def environment(monkeypatch):
    """Of a launched process."""

    def set_environment(values: dict[str, str]) -> None:
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return set_environment


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "deepspeed_zero2", "deepspeed_zero3"])
def test_committed_settings_are_what_accelerate_reads(name, environment):
    arguments, values = launched(name)
    used = {"ddp": arguments.multi_gpu, "fsdp2": arguments.use_fsdp}.get(name, arguments.use_deepspeed)
    assert used and values["ACCELERATE_MIXED_PRECISION"] == "bf16" and arguments.num_processes == 8
    environment(values)
    if name == "fsdp2":
        plugin = FullyShardedDataParallelPlugin()
        assert plugin.fsdp_version == 2 and plugin.state_dict_type.name == "FULL_STATE_DICT"
        units = ["Qwen2_5_VLDecoderLayer", "CodeEmbeddings"]
        assert plugin.transformer_cls_names_to_wrap == units and plugin.reshard_after_forward
    elif name != "ddp":
        config = DeepSpeedPlugin().deepspeed_config
        assert config["zero_optimization"]["stage"] == int(name[-1])
        assert config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is (name[-1] == "3")
        # left to the training arguments
        assert config["gradient_accumulation_steps"] == config["gradient_clipping"] == "auto"


def test_one_device_keeps_the_weights_precision():
    arguments, values = launched("single_gpu")
    assert arguments.num_processes == 1 and values["ACCELERATE_MIXED_PRECISION"] == "no"
    assert not (arguments.multi_gpu or arguments.use_fsdp or arguments.use_deepspeed)


def test_all_committed_settings_are_tested():
    tested = {"single_gpu", "ddp", "fsdp2", "deepspeed_zero2", "deepspeed_zero3"}
    assert {path.stem for path in SETTINGS.iterdir()} == tested


def test_weights_have_gradients_in_a_batch_without_pictures(data_model):
    """Or else devices that share a step would wait for each other."""
    model = data_model.train()
    model.zero_grad()
    ids = torch.arange(10, 20)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    gradients = {name: value.grad for name, value in model.named_parameters() if value.requires_grad}
    model.zero_grad()
    model.eval()
    assert not [name for name, gradient in gradients.items() if gradient is None]
    assert not gradients["model.connector.0.weight"].any() and gradients["lm_head.weight"].any()
