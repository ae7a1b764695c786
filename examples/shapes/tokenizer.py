"""Training of the vision tokenizer: the teacher, then NextFlow's three stages (sec. 3.1) at small size."""

import random
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from transformers import (
    PreTrainedTokenizerFast,
    Siglip2Config,
    Siglip2Model,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from transformers_nextflow.modeling_nextflow_vq import NextFlowVQModel, OneGridEmbeddings, patchify, run_siglip
from transformers_nextflow.quantizer import resize_features, to_map, to_sequence
from transformers_nextflow.training import NextFlowVQTrainer, NextFlowVQTrainingArguments, prepare_vq_stage

from .data import picture_batch, sample_canvas, to_pixel_values
from .grammar import describe_scene
from .sizes import PATCH_SIZE, SCALE_ENTRIES, TEACHER_TEXT, TEACHER_VISION, vq_config
from .stages import Drawn, finish, is_finished, processes, settings
from .world import render, sample_scene

STEPS = {"teacher": 500, "pixel": 800, "joint": 600, "decoder": 1000}
TEACHER_BATCH = 64  # pairs of a step
BATCH = 32  # pictures of a step, over all processes
CODEBOOK_BATCHES, CODEBOOK_BATCH, KMEANS_ITERATIONS = 60, 96, 6
LEAST_DISTANCE = 0.1  # between entries at first; rows that differ by less differ by rounding alone
SEMANTIC_FITS = (0, 150, 300, 450)  # steps of the joint stage
PHOTO_SHARE = 0.12


def new_teacher(text_tokenizer: PreTrainedTokenizerFast) -> Siglip2Model:
    text = {**TEACHER_TEXT, "vocab_size": len(text_tokenizer), "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    teacher = Siglip2Model(Siglip2Config(vision_config=TEACHER_VISION, text_config=text))
    teacher.vision_model.embeddings = OneGridEmbeddings(teacher.config.vision_config)
    return teacher


class TeacherTrainer(Trainer):
    """SigLIP's pairwise loss on (pictures, texts) of one batch."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        teacher = self.accelerator.unwrap_model(model)
        grid = [length // PATCH_SIZE for length in inputs["pixel_values"].shape[-2:]]
        with self.accelerator.autocast():
            patches = patchify(inputs["pixel_values"], PATCH_SIZE)
            vision = run_siglip(teacher.vision_model, patches, tuple(grid)).pooler_output
            text = teacher.text_model(input_ids=inputs["input_ids"]).pooler_output
        image_NC, text_NC = F.normalize(vision.float(), dim=-1), F.normalize(text.float(), dim=-1)
        logits_NN = image_NC @ text_NC.T * teacher.logit_scale.exp() + teacher.logit_bias
        signs_NN = 2 * torch.eye(len(logits_NN)) - 1
        return -F.logsigmoid(signs_NN * logits_NN).sum() / len(logits_NN)


def train_teacher(folder: Path, text_tokenizer: PreTrainedTokenizerFast) -> Siglip2Model:
    """A tiny SigLIP2, trained contrastively on scenes and full descriptions of them."""
    torch.manual_seed(0)
    teacher = new_teacher(text_tokenizer)
    nn.init.constant_(teacher.logit_scale, 2.3)
    nn.init.constant_(teacher.logit_bias, -10.0)

    def draw(rng: random.Random) -> dict:
        canvas = sample_canvas(rng)
        scenes = [sample_scene(rng, *canvas) for _ in range(TEACHER_BATCH // processes())]
        texts = [describe_scene(rng, scene).text for scene in scenes]
        tokens = text_tokenizer(texts, padding="max_length", truncation=True, max_length=48, return_tensors="pt")
        return {"pixel_values": to_pixel_values([render(scene) for scene in scenes]), "input_ids": tokens.input_ids}

    if not is_finished(folder / "teacher"):
        values = settings(STEPS["teacher"], peak=1e-3) | {"remove_unused_columns": False}
        arguments = TrainingArguments(folder / "teacher", per_device_train_batch_size=1, **values)
        batches = Drawn("teacher", STEPS["teacher"] * processes(), draw)
        finish(TeacherTrainer(teacher, arguments, data_collator=lambda items: items[0], train_dataset=batches))
    teacher.load_state_dict(load_file(folder / "teacher" / "model.safetensors"))
    return teacher.eval().requires_grad_(False)


def codebook_pictures() -> list[torch.Tensor]:
    """The pictures to which the codebook is fitted, (B, 3, H, W) batches of one canvas each."""
    rng = random.Random("codebook")
    return [picture_batch(rng, CODEBOOK_BATCH, PHOTO_SHARE) for _ in range(CODEBOOK_BATCHES)]


def components(rows: list[torch.Tensor], count: int) -> torch.Tensor:
    """(count, C): the principal components of several sets of (N, C) rows, each set counting the same.

    They are scaled to the root of their deviation, between the error of rows and equal say in the lookup.
    """
    moment = sum(each.T @ each / len(each) for each in rows) / len(rows)
    energies, vectors = torch.linalg.eigh(moment)
    return vectors.T[-count:] / energies[-count:, None].clamp(min=1e-6) ** 0.25


@torch.no_grad()
def fit_projections(model: NextFlowVQModel) -> None:
    """Project arrangements and patterns on their principal components, and patterns back."""
    encoder, arrangements, patterns = model.pixel_encoder, [], []
    for pixels in codebook_pictures():
        schedule = model.schedules.by_size(*pixels.shape[-2:])
        colours = [encoder.colours(pixels, windows) for windows in schedule.grids[2::2]]
        arrangements.append(encoder.arrangement(colours[0]).flatten(0, 1))
        for windows, cells in zip(colours, schedule.grids[3::2]):
            patterns.append(encoder.patterns(pixels, windows, cells).flatten(0, 1))
    encoder.arrangement_to_code.weight.copy_(components(arrangements, len(encoder.arrangement_to_code.weight)))
    encoder.to_code.weight.copy_(components(patterns, len(encoder.to_code.weight)))
    model.pixel_decoder.from_code_to_pattern.weight.copy_(torch.linalg.pinv(encoder.to_code.weight))
    nn.init.zeros_(model.pixel_decoder.conv_out.weight)  # at first the picture is what colours and patterns say


def kmeans(rows: torch.Tensor, count: int) -> torch.Tensor:
    """`count` means of (N, C) rows, beginning with the most frequent rows that lie `LEAST_DISTANCE` apart: exact where
    few different rows occur."""
    rows, weights = rows.mul(1000).round().div(1000).unique(dim=0, return_counts=True)
    order = weights.argsort(descending=True, stable=True)
    rows, weights = rows[order], weights[order].float()
    first, free = [], torch.ones(len(rows), dtype=torch.bool)
    while len(first) < count and free.any():
        first.append(int(free.int().argmax()))
        free &= (rows - rows[first[-1]]).square().sum(-1) > LEAST_DISTANCE**2
    means = rows[first]
    for _ in range(KMEANS_ITERATIONS):
        nearest = _nearest(rows, means)
        members = torch.zeros(len(means)).index_add_(0, nearest, weights)[:, None]
        sums = torch.zeros_like(means).index_add_(0, nearest, rows * weights[:, None])
        means = torch.where(members > 0, sums / members.clamp(min=1), means)
    return means


def _nearest(queries: torch.Tensor, entries: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.cdist(chunk, entries).argmin(-1) for chunk in queries.split(8192)])


@torch.no_grad()
def fit_codebook(model: NextFlowVQModel) -> None:
    """Set each scale's entries to means of its own channels, and zero elsewhere.

    Gradients alone move entries too slowly; means leave about half of their error.
    """
    quantizer, pattern_dim = model.quantizer, len(model.pixel_encoder.to_code.weight)
    features = [model.pixel_encoder(pixels) for pixels in codebook_pictures()]
    quantizer.pixel_codebook.zero_()
    first = 0
    for scale in range(model.schedules.max_scales):
        channels = slice(first, first + (pattern_dim if scale % 2 else 6))
        grids = [model.schedules.by_grid(batch.shape[-2:])[scale] for batch in features]
        pooled = [F.interpolate(batch[:, channels], size=grid, mode="area") for batch, grid in zip(features, grids)]
        entries = kmeans(torch.cat([to_sequence(batch).flatten(0, 1) for batch in pooled]), SCALE_ENTRIES[scale])
        start = quantizer.entries_of(scale).start
        quantizer.pixel_codebook[start : start + len(entries), channels] = entries
        first = channels.stop


@torch.no_grad()
def fit_semantic_entries(model: NextFlowVQModel) -> None:
    """Set each entry's semantic half to the mean of the residuals that the pixel half has chosen it for."""
    quantizer = model.quantizer
    quantizer.semantic_codebook.zero_()
    batches = [(model.features(pixels), pixels.shape[-2:]) for pixels in codebook_pictures()]
    residuals = [features[:, : model.config.semantic_dim] for features, _ in batches]
    codes = [quantizer(features, model.schedules.by_size(*size)).target_codes for features, size in batches]
    schedules = [model.schedules.by_size(*size) for _, size in batches]
    for scale in range(model.schedules.max_scales):
        sums, counts = torch.zeros_like(quantizer.semantic_codebook), torch.zeros(len(quantizer.semantic_codebook), 1)
        for residual, code, schedule in zip(residuals, codes, schedules):
            rows = to_sequence(F.interpolate(residual, size=schedule[scale], mode="area")).flatten(0, 1)
            chosen = code[:, schedule.slice(scale)].flatten()
            sums.index_add_(0, chosen, rows)
            counts.index_add_(0, chosen, torch.ones(len(rows), 1))
        at = quantizer.entries_of(scale)
        quantizer.semantic_codebook[at] = (sums / counts.clamp(min=1))[at]
        for index, (code, schedule) in enumerate(zip(codes, schedules)):
            entries = F.embedding(code[:, schedule.slice(scale)], quantizer.semantic_codebook)
            residuals[index] = residuals[index] - resize_features(
                to_map(entries, schedule[scale]), schedule.final_grid
            )


class ShapesVQTrainer(NextFlowVQTrainer):
    """Differs from the paper: no perceptual network and no discriminator; the world has no texture for them."""

    def reconstruction_loss(self, reconstruction: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
        """Absolute and squared error, and absolute error of the finite differences, which carry the edges."""
        error = reconstruction - pixel_values
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        return error.abs().mean() + error.square().mean() + 0.5 * edges


def train_stage(folder: Path, stage: str, model: NextFlowVQModel, peak: float, **kwargs) -> NextFlowVQModel:
    """Train a prepared model through one stage, unless it is finished; returns the model as it was saved."""
    if not is_finished(folder / stage):
        values = settings(STEPS[stage], peak) | {"perceptual_weight": 0.0, "discriminator_weight": 0.0}
        arguments = NextFlowVQTrainingArguments(
            folder / stage, stage=stage, codebook_loss="var", commitment_weight=1.25, distillation_weight=0.2, **values
        )

        def draw(rng: random.Random) -> dict:
            pixels = picture_batch(rng, BATCH // processes(), PHOTO_SHARE)
            return {"pixel_values": pixels.contiguous(memory_format=torch.channels_last)}

        batches = Drawn(stage, STEPS[stage] * processes(), draw)
        model = model.to(memory_format=torch.channels_last)
        finish(ShapesVQTrainer(model, arguments, batches, **kwargs))
    return NextFlowVQModel.from_pretrained(folder / stage).to(memory_format=torch.channels_last)


def train_pixel(folder: Path) -> NextFlowVQModel:
    """Stage 1: the pixel half of the codebook, fitted in closed form, and the pixel decoder."""
    torch.manual_seed(1)
    model = NextFlowVQModel(vq_config(decoder_blocks=1))
    if not is_finished(folder / "pixel"):
        fit_projections(model)
        fit_codebook(model)
    prepare_vq_stage(model, "pixel")
    model.pixel_encoder.requires_grad_(False)
    model.quantizer.requires_grad_(False)
    return train_stage(folder, "pixel", model, peak=1e-3)


class SemanticFits(TrainerCallback):
    """Fits the semantic entries anew at given steps, while what they stand for is still moving."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step in SEMANTIC_FITS:
            fit_semantic_entries(model.vq_model)


def train_joint(folder: Path, model: NextFlowVQModel, teacher: Siglip2Model) -> NextFlowVQModel:
    """Stage 2: the semantic branch from the teacher, its half of the codebook, and both decoders."""
    encoder_state = {name: value for name, value in teacher.vision_model.state_dict().items() if "head." not in name}
    model.semantic_encoder.load_state_dict(encoder_state)
    prepare_vq_stage(model, "joint")
    model.pixel_encoder.requires_grad_(False)
    model.quantizer.requires_grad_(False)
    return train_stage(folder, "joint", model, peak=1e-3, teacher=teacher.vision_model, callbacks=[SemanticFits()])


def train_decoder(folder: Path, model: NextFlowVQModel) -> NextFlowVQModel:
    """Stage 3: the enlarged pixel decoder alone; the codes stay what they are."""
    torch.manual_seed(3)
    return train_stage(folder, "decoder", prepare_vq_stage(model, "decoder"), peak=8e-4)
