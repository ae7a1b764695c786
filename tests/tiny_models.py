"""Tiny models with random weights large enough to matter, and batches for them."""

import json
from pathlib import Path
from typing import NamedTuple

import torch

from transformers_nextflow import NextFlowConfig, NextFlowForConditionalGeneration
from transformers_nextflow.stored_tokenizer import vision_tokenizer_hash

TEXT_ROWS, CODES = 48, 24
PAD, EOS, BOI, EOI, IMAGE = 0, 44, 45, 46, 47
SQUARE, WIDE = (3, 3), (2, 4)  # final grids
SCHEDULES = [[[1, 1], [2, 2], [3, 3]], [[1, 1], [1, 2], [2, 4]]]
PATCH = 4


class Picture(NamedTuple):
    """A whole image of a sequence, with random codes of its own seed unless `codes` are given."""

    grid: tuple[int, int]
    seed: int = 0
    last_scale: bool = False
    codes: torch.Tensor | None = None


def shown(grid: tuple[int, int], seed: int = 0) -> Picture:
    """A picture as a prompt holds it for a model with `condition_last_scale`."""
    return Picture(grid, seed, last_scale=True)


def tiny_config(text: dict | None = None, vq: dict | None = None, **overrides) -> NextFlowConfig:
    text_config = {
        "vocab_size": TEXT_ROWS,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 1024,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
    }
    vq_config = {
        "semantic_config": {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "patch_size": PATCH,
            "num_patches": 9,
            "vision_use_head": False,
        },
        "semantic_decoder_layers": 1,
        "semantic_dim": 6,
        "pixel_dim": 4,
        "codebook_size": CODES,
        "patch_size": PATCH,
        "stem_stride": 2,
        "base_channels": 8,
        "channel_multipliers": [1, 1],
        "latent_channels": 8,
        "encoder_blocks": 1,
        "decoder_blocks": 1,
        "scale_schedules": SCHEDULES,
        "levels": {"12": 3},
    }
    text_config |= {"bos_token_id": None, "eos_token_id": EOS, "pad_token_id": PAD}
    ids = {"boi_token_id": BOI, "eoi_token_id": EOI, "image_token_id": IMAGE}
    return NextFlowConfig(text_config=text_config | (text or {}), vq_config=vq_config | (vq or {}), **ids | overrides)


def tiny_model(config: NextFlowConfig | None = None, seed: int = 0) -> NextFlowForConditionalGeneration:
    """At the usual initialisation logits are nearly uniform and scale embeddings zero, which would hide mistakes."""
    torch.manual_seed(seed)
    model = enlarge_(NextFlowForConditionalGeneration(config or tiny_config()).eval())
    with torch.no_grad():
        for name, parameter in model.model.language_model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = EOS
    return model


@torch.no_grad()
def enlarge_(model: NextFlowForConditionalGeneration) -> NextFlowForConditionalGeneration:
    for name, parameter in model.named_parameters():
        if not name.startswith("model.vq_model") and parameter.ndim > 1:
            parameter.normal_(std=1.5 * parameter.shape[-1] ** -0.5)
    model.model.code_embeddings.weight.normal_()
    model.model.scale_embedding.index.weight.normal_()
    # at initialisation features are so small that every picture gets the same codes
    model.model.vq_model.semantic_to_code[-1].weight.mul_(50)
    model.model.vq_model.pixel_encoder.to_code.weight.mul_(50)
    return model


def refer_to(name: str, model: NextFlowForConditionalGeneration, folder: Path) -> None:
    """Save `model` as a training does, whose checkpoints have the vision tokenizer of the model `name`."""
    model.save_pretrained(folder)
    tensors = sorted(model.model.vq_model.state_dict().items())
    reference = {"model": name, "sha256": vision_tokenizer_hash(tensors, model.config.vq_config)}
    config = json.loads((folder / "config.json").read_text()) | {"vision_tokenizer": reference}
    (folder / "config.json").write_text(json.dumps(config))


def codes_of(model, picture: Picture) -> torch.Tensor:
    if picture.codes is not None:
        return picture.codes
    generator = torch.Generator().manual_seed(picture.seed)
    return torch.randint(CODES, (model.model.schedules.by_grid(picture.grid).num_codes,), generator=generator)


def batch_of(model, *rows) -> dict:
    """Rows of text ids and pictures to the model's inputs, padded on the left. A row may end in `BOI`."""
    pictures = [part for row in rows for part in row if isinstance(part, Picture)]
    ids = []
    for row in rows:
        ids.append([])
        for part in row:
            if isinstance(part, Picture):
                schedule = model.model.schedules.by_grid(part.grid)
                slots = schedule.num_codes - 1 + (schedule.lengths[-1] if part.last_scale else 0)
                ids[-1] += [BOI, *[IMAGE] * slots, EOI]
            else:
                ids[-1].append(part)
    length = max(map(len, ids))
    batch = {
        "input_ids": torch.tensor([[PAD] * (length - len(row)) + row for row in ids]),
        "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in ids]),
    }
    if pictures:
        batch["image_grid_hw"] = torch.tensor([picture.grid for picture in pictures])
        batch["image_codes"] = torch.cat([codes_of(model, picture) for picture in pictures])
    return batch


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """max|a - b| / max|b|."""
    return ((a - b).abs().max() / b.abs().max()).item()
