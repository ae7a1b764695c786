"""A tiny checkpoint of the real classes, with random weights of a fixed seed, for tests of behaviour."""

import gc
from collections import Counter
from pathlib import Path

import pytest
import torch

from tests.tiny_tokenizer import tiny_text_tokenizer
from transformers_nextflow import (
    NextFlowConfig,
    NextFlowForConditionalGeneration,
    NextFlowImageProcessor,
    NextFlowProcessor,
)
from transformers_nextflow.cli import main

SCHEDULES = [
    [[1, 1], [2, 2], [3, 3]],
    [[1, 1], [2, 2], [2, 4]],
    [[1, 1], [2, 2], [4, 2]],
]
LEVELS = {"24": 3}
PATCH_SIZE = 8
# Workers of data that stay are ended with their loader, by a collection of garbage; their pipes are often collected
# before, and each is waited for as long as this
torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.5
LONG = ("test_wheel.py", "test_from_pictures_to_a_model.py", "test_sharding.py")  # of few tests


def pytest_collection_modifyitems(config, items):
    """Among workers, long files first, then those of most tests: in the end none waits long for another."""
    if hasattr(config, "workerinput"):
        tests = Counter(item.path for item in items)
        items.sort(key=lambda item: (item.path.name not in LONG, -tests[item.path]))


def pytest_collection_finish():
    """Every training begins by a collection of garbage, which would look through all that has been imported."""
    gc.freeze()


@pytest.fixture(scope="session")
def text_tokenizer():
    return tiny_text_tokenizer()


@pytest.fixture
def tiny_config(text_tokenizer) -> NextFlowConfig:
    """Two layers, 64 codes, pictures of 24x24, 16x32 and 32x16 pixels (height x width); a new object for each test."""
    return build_config(text_tokenizer)


@pytest.fixture(scope="session")
def tiny_model(text_tokenizer) -> NextFlowForConditionalGeneration:
    torch.manual_seed(2)
    return NextFlowForConditionalGeneration(build_config(text_tokenizer)).eval()


@pytest.fixture(scope="session")
def tiny_processor(text_tokenizer) -> NextFlowProcessor:
    image_processor = NextFlowImageProcessor(patch_size=PATCH_SIZE, scale_schedules=SCHEDULES, levels=LEVELS)
    return NextFlowProcessor(image_processor, text_tokenizer)


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_model, tiny_processor, tmp_path_factory) -> Path:
    """A folder as `from_pretrained` reads it."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_model.save_pretrained(folder)
    tiny_processor.save_pretrained(folder)
    return folder


@pytest.fixture
def console(capsys, tiny_checkpoint, tmp_path, monkeypatch):
    """Run a command in an empty folder: its status, standard output and standard error."""
    monkeypatch.chdir(tmp_path)

    def console(*arguments, model=tiny_checkpoint) -> tuple[int, str, str]:
        status = main([*map(str, arguments), *(() if model is None else ("--model", str(model)))])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return console


def build_config(tokenizer) -> NextFlowConfig:
    boi, eoi, image = tokenizer.convert_tokens_to_ids(["<|vision_start|>", "<|vision_end|>", "<|image_pad|>"])
    return NextFlowConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vq_config={
            "semantic_config": {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "patch_size": PATCH_SIZE,
                "num_patches": 9,
                "vision_use_head": False,
            },
            "semantic_decoder_layers": 1,
            "semantic_dim": 6,
            "pixel_dim": 4,
            "codebook_size": 64,
            "patch_size": PATCH_SIZE,
            "stem_stride": 4,
            "base_channels": 8,
            "channel_multipliers": [1, 2],
            "latent_channels": 8,
            "encoder_blocks": 1,
            "decoder_blocks": 1,
            "scale_schedules": SCHEDULES,
            "levels": LEVELS,
        },
        boi_token_id=boi,
        eoi_token_id=eoi,
        image_token_id=image,
        image_generation={"guidance_scale": 2.0},
    )
