"""The teacher: a tiny SigLIP2, trained contrastively on the pictures and their names, then frozen."""

import random
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedTokenizerFast, Siglip2Config, Siglip2Model, Trainer, TrainingArguments

from transformers_nextflow.modeling_nextflow_vq import OneGridEmbeddings, patchify

from .sizes import PATCH_SIZE, TEACHER_TEXT, TEACHER_VISION, TEACHER_VOCABULARY
from .stages import Drawn, finish, is_finished, own_share, processes, settings
from .text import train_text_tokenizer
from .world import World, moved, resized, to_pixel_values

STEPS, PEAK, BATCH = 1_600, 1e-3, 256  # pairs of a step, over all processes
SMALL_SHARE = 0.15  # of batches at 32 pixels


def caption(name: str, style: str, tags: list[str], rng: random.Random) -> str:
    """Mostly the name, with or without the style, at times what emojibase says beside it."""
    kind = rng.random()
    if kind < 0.2 and tags:
        return " ".join(rng.sample(tags, min(len(tags), 6)))
    return f"{name}, {style}" if kind < 0.7 else name


def teacher_tokenizer(world: World) -> PreTrainedTokenizerFast:
    texts = [f"{world.names[row]}, {world.styles[row]} {' '.join(world.tags[row])}" for row in world.seen]
    return train_text_tokenizer(texts, TEACHER_VOCABULARY)


def new_teacher(tokenizer: PreTrainedTokenizerFast) -> Siglip2Model:
    text = {**TEACHER_TEXT, "vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    teacher = Siglip2Model(Siglip2Config(vision_config=TEACHER_VISION, text_config=text))
    teacher.vision_model.embeddings = OneGridEmbeddings(teacher.config.vision_config)
    teacher.set_attn_implementation("eager")  # the fastest backward at these lengths on a CPU
    nn.init.constant_(teacher.logit_scale, 2.3)
    nn.init.constant_(teacher.logit_bias, -10.0)
    return teacher


def image_embeddings(teacher: Siglip2Model, pixel_values: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) in [-1, 1] -> (B, D) of length 1."""
    grid = tuple(length // PATCH_SIZE for length in pixel_values.shape[-2:])
    patches = patchify(pixel_values, PATCH_SIZE)
    mask = torch.ones(patches.shape[:2], dtype=torch.long, device=patches.device)
    shapes = torch.tensor(grid, device=patches.device).expand(len(patches), 2)
    output = teacher.vision_model(pixel_values=patches, pixel_attention_mask=mask, spatial_shapes=shapes)
    return F.normalize(output.pooler_output.float(), dim=-1)


def text_embeddings(teacher: Siglip2Model, input_ids: torch.Tensor) -> torch.Tensor:
    """(B, L) ids, padded on the right to one length -> (B, D) of length 1."""
    return F.normalize(teacher.text_model(input_ids=input_ids).pooler_output.float(), dim=-1)


def tokenize(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    length = TEACHER_TEXT["max_position_embeddings"]
    return tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt").input_ids


class TeacherTrainer(Trainer):
    """SigLIP's pairwise loss on (pictures, texts) of one batch."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        teacher = self.accelerator.unwrap_model(model)
        with self.accelerator.autocast():
            image_NC = image_embeddings(teacher, inputs["pixel_values"])
            text_NC = text_embeddings(teacher, inputs["input_ids"])
        logits_NN = image_NC @ text_NC.T * teacher.logit_scale.exp() + teacher.logit_bias
        signs_NN = 2 * torch.eye(len(logits_NN), device=logits_NN.device) - 1
        return -F.logsigmoid(signs_NN * logits_NN).sum() / len(logits_NN)


def train_teacher(folder: Path, world: World) -> Siglip2Model:
    """Pictures of distinct names, a little moved, in some batches at half the size."""
    torch.manual_seed(0)
    tokenizer = teacher_tokenizer(world)
    teacher = new_teacher(tokenizer)
    rows_of: dict[str, list[int]] = {}
    for row in world.seen:
        rows_of.setdefault(world.names[row], []).append(row)
    names = sorted(rows_of)

    def draw(rng: random.Random) -> dict:
        rows = [rng.choice(rows_of[name]) for name in rng.sample(names, own_share(BATCH))]
        edge = 32 if rng.random() < SMALL_SHARE else 64
        pictures = [resized(moved(world.pictures[row], rng), edge) for row in rows]
        texts = [caption(world.names[row], world.styles[row], world.tags[row], rng) for row in rows]
        return {"pixel_values": to_pixel_values(pictures), "input_ids": tokenize(tokenizer, texts)}

    if not is_finished(folder / "teacher"):
        values = settings(STEPS, PEAK) | {"remove_unused_columns": False}
        arguments = TrainingArguments(folder / "teacher", per_device_train_batch_size=1, **values)
        batches = Drawn("teacher", STEPS * processes(), draw)
        trainer = TeacherTrainer(teacher, arguments, data_collator=lambda items: items[0], train_dataset=batches)
        finish(trainer)
    teacher.load_state_dict(load_file(folder / "teacher" / "model.safetensors"))
    return teacher.eval().requires_grad_(False)
