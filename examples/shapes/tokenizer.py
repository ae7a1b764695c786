"""Training of the vision tokenizer: the teacher, then NextFlow's three stages (sec. 3.1) at small size."""

import random
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedTokenizerFast, Siglip2Config, Siglip2Model

from transformers_nextflow.modeling_nextflow_vq import (
    NextFlowVQModel,
    OneGridEmbeddings,
    ResidualBlock,
    patchify,
    run_siglip,
)
from transformers_nextflow.quantizer import QuantizerOutput, resize_features, to_map, to_sequence

from .data import picture_batch, sample_canvas, to_pixel_values
from .grammar import describe_scene
from .loop import Run
from .sizes import PATCH_SIZE, SCALE_ENTRIES, TEACHER_TEXT, TEACHER_VISION, vq_config
from .world import render, sample_scene

STEPS = {"teacher": 500, "pixel": 800, "joint": 600, "decoder": 1000}
TEACHER_BATCH = 64  # pairs of a step
BATCH = 32  # pictures of a step, over all processes
CODEBOOK_BATCHES, CODEBOOK_BATCH, KMEANS_ITERATIONS = 60, 96, 6
LEAST_DISTANCE = 0.1  # between entries at first; rows that differ by less differ by rounding alone
SEMANTIC_FITS = (0, 150, 300, 450)  # steps of the joint stage
PHOTO_SHARE = 0.12
COMMITMENT = 0.25
DROP_PROBABILITY = 0.1  # of batches in which half of the scales are dropped


def new_teacher(text_tokenizer: PreTrainedTokenizerFast) -> Siglip2Model:
    text = {**TEACHER_TEXT, "vocab_size": len(text_tokenizer), "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    teacher = Siglip2Model(Siglip2Config(vision_config=TEACHER_VISION, text_config=text))
    teacher.vision_model.embeddings = OneGridEmbeddings(teacher.config.vision_config)
    return teacher


def train_teacher(folder: Path, text_tokenizer: PreTrainedTokenizerFast) -> Siglip2Model:
    """A tiny SigLIP2, trained contrastively on scenes and full descriptions of them."""
    torch.manual_seed(0)
    teacher = new_teacher(text_tokenizer)
    run = Run(folder, "teacher", teacher, STEPS["teacher"], peak=1e-3)

    def step_fn(step: int) -> dict[str, float]:
        rng = random.Random(f"teacher {step} {run.rank}")
        canvas = sample_canvas(rng)
        scenes = [sample_scene(rng, *canvas) for _ in range(TEACHER_BATCH // run.processes)]
        texts = [describe_scene(rng, scene).text for scene in scenes]
        tokens = text_tokenizer(texts, padding="max_length", truncation=True, max_length=48, return_tensors="pt")
        pixels = to_pixel_values([render(scene) for scene in scenes])
        grid = (canvas[0] // PATCH_SIZE, canvas[1] // PATCH_SIZE)
        with torch.autocast("cpu", torch.bfloat16):
            vision = run_siglip(teacher.vision_model, patchify(pixels, PATCH_SIZE), grid).pooler_output
            text = teacher.text_model(input_ids=tokens.input_ids).pooler_output
        image_NC, text_NC = F.normalize(vision.float(), dim=-1), F.normalize(text.float(), dim=-1)
        logits_NN = image_NC @ text_NC.T * teacher.logit_scale.exp() + teacher.logit_bias
        signs_NN = 2 * torch.eye(len(scenes)) - 1
        loss = -F.logsigmoid(signs_NN * logits_NN).sum() / len(scenes)
        accuracy = (logits_NN.argmax(1) == torch.arange(len(scenes))).float().mean()
        run.update(loss)
        return {"loss": loss.item(), "accuracy": float(accuracy)}

    if run.step == 0:
        nn.init.constant_(teacher.logit_scale, 2.3)
        nn.init.constant_(teacher.logit_bias, -10.0)
    run.train(step_fn)
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


def picture_loss(reconstruction: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
    """Absolute and squared error, and absolute error of the finite differences, which carry the edges.

    Differs from the paper: no perceptual network and no discriminator; the world has no texture for them to judge.
    """
    error = reconstruction.float() - pixel_values
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + error.square().mean() + 0.5 * edges


def keep_scales(rng: random.Random, num_scales: int) -> list[bool] | None:
    """Random drop of half of the scales, never the first (NextFlow sec. 3.1)."""
    if rng.random() >= DROP_PROBABILITY:
        return None
    return [True] + [rng.random() < 0.5 for _ in range(num_scales - 1)]


def psnr(reconstruction: torch.Tensor, pixel_values: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures in [-1, 1]."""
    return float(-10 * torch.log10((reconstruction.detach().float().clamp(-1, 1) - pixel_values).square().mean() / 4))


def train_pixel(folder: Path) -> NextFlowVQModel:
    """Stage 1: the pixel half of the codebook, fitted in closed form, and the pixel decoder."""
    torch.manual_seed(1)
    model = NextFlowVQModel(vq_config(decoder_blocks=1)).to(memory_format=torch.channels_last)
    parts = nn.ModuleList([model.pixel_encoder, model.pixel_decoder, model.quantizer])
    model.quantizer.requires_grad_(False)
    model.pixel_encoder.requires_grad_(False)
    run = Run(folder, "pixel", parts, STEPS["pixel"], peak=1e-3)
    if run.step == 0:
        fit_projections(model)
        fit_codebook(model)
        model.quantizer.semantic_codebook.zero_()  # the half that is not there yet

    def step_fn(step: int) -> dict[str, float]:
        rng = random.Random(f"pixel {step} {run.rank}")
        pixels = picture_batch(rng, BATCH // run.processes, PHOTO_SHARE).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                features = F.pad(model.pixel_encoder(pixels), (0, 0, 0, 0, model.config.semantic_dim, 0))
                schedule = model.schedules.by_grid(features.shape[-2:])
                quantization = model.quantizer(features, schedule, keep_scales=keep_scales(rng, len(schedule)))
            reconstruction = model.pixel_decoder(quantization.quantized[:, model.config.semantic_dim :])
        loss = picture_loss(reconstruction, pixels)
        run.update(loss)
        return {"loss": loss.item(), "psnr": psnr(reconstruction, pixels)} | norms(quantization)

    run.train(step_fn)
    return model.requires_grad_(True)


def norms(quantization: QuantizerOutput) -> dict[str, float]:
    used = len(quantization.target_codes.unique())
    return {"used": used, "first_norm": float(quantization.residual_norms[0])}


def train_joint(folder: Path, model: NextFlowVQModel, teacher: Siglip2Model) -> NextFlowVQModel:
    """Stage 2: the semantic branch from the teacher, its half of the codebook, and both decoders."""
    encoder_state = {name: value for name, value in teacher.vision_model.state_dict().items() if "head." not in name}
    model.semantic_encoder.load_state_dict(encoder_state)
    model.pixel_encoder.requires_grad_(False)
    model.quantizer.requires_grad_(False)
    torch.manual_seed(2)
    run = Run(folder, "joint", model, STEPS["joint"], peak=1e-3)
    layer = model.config.semantic_feature_layer

    def step_fn(step: int) -> dict[str, float]:
        if step in SEMANTIC_FITS:
            fit_semantic_entries(model)
        rng = random.Random(f"joint {step} {run.rank}")
        pixels = picture_batch(rng, BATCH // run.processes, PHOTO_SHARE).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            schedule = model.schedules.by_size(*pixels.shape[-2:])
            with torch.no_grad():
                patches = patchify(pixels, PATCH_SIZE)
                output = run_siglip(teacher.vision_model, patches, schedule.final_grid, output_hidden_states=True)
            target = output.hidden_states[layer]
            output = model(pixels, keep_scales=keep_scales(rng, len(schedule)))
        distillation = 1 - F.cosine_similarity(output.semantic_features.float(), target.float(), dim=-1).mean()
        semantic = slice(model.config.semantic_dim)
        commitment = F.mse_loss(output.features[:, semantic], output.quantization.quantized[:, semantic])
        loss = picture_loss(output.reconstruction, pixels) + COMMITMENT * commitment + 0.2 * distillation
        run.update(loss)
        row = {"loss": loss.item(), "psnr": psnr(output.reconstruction, pixels)}
        row |= {"distillation": distillation.item(), "commitment": commitment.item()}
        return row | norms(output.quantization)

    run.train(step_fn)
    return model


def enlarge_decoder(model: NextFlowVQModel) -> NextFlowVQModel:
    """A copy with twice the residual blocks in the pixel decoder; the new ones begin as the identity."""
    torch.manual_seed(3)
    larger = NextFlowVQModel(vq_config(decoder_blocks=2))
    state = model.state_dict()
    for resolution in larger.pixel_decoder.resolutions:
        blocks = [layer for layer in resolution if isinstance(layer, ResidualBlock)]
        nn.init.zeros_(blocks[-1].conv2.weight)
        nn.init.zeros_(blocks[-1].conv2.bias)
    missing = larger.load_state_dict(state, strict=False)
    if missing.unexpected_keys:
        raise ValueError(f"the larger decoder has no place for {missing.unexpected_keys}")
    return larger.to(memory_format=torch.channels_last)


def train_decoder(folder: Path, model: NextFlowVQModel) -> NextFlowVQModel:
    """Stage 3: the enlarged pixel decoder alone; the codes stay what they are."""
    larger = enlarge_decoder(model).requires_grad_(False)
    larger.pixel_decoder.requires_grad_(True)
    run = Run(folder, "decoder", larger.pixel_decoder, STEPS["decoder"], peak=8e-4)

    def step_fn(step: int) -> dict[str, float]:
        rng = random.Random(f"decoder {step} {run.rank}")
        pixels = picture_batch(rng, BATCH // run.processes, PHOTO_SHARE).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                features = larger.features(pixels)
                quantized = larger.quantizer(features, larger.schedules.by_size(*pixels.shape[-2:])).quantized
            reconstruction = larger.pixel_decoder(quantized[:, larger.config.semantic_dim :])
        loss = picture_loss(reconstruction, pixels)
        run.update(loss)
        return {"loss": loss.item(), "psnr": psnr(reconstruction, pixels)}

    run.train(step_fn)
    return larger.requires_grad_(False)
