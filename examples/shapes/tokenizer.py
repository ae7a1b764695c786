"""Training of the vision tokenizer: the teacher, then NextFlow's three stages (sec. 3.1) at small size."""

import random
from collections.abc import Callable
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
from transformers_nextflow.quantizer import (
    DualCodebookQuantizer,
    QuantizerOutput,
    resize_features,
    to_map,
    to_sequence,
)
from transformers_nextflow.scales import ScaleSchedule

from .data import picture_batch, sample_canvas, to_pixel_values
from .grammar import describe_scene
from .loop import Run
from .sizes import PATCH_SIZE, TEACHER_TEXT, TEACHER_VISION, vq_config
from .world import render, sample_scene

STEPS = {"teacher": 500, "pixel": 2400, "joint": 1600, "decoder": 800}
UNQUANTISED = 1800  # first steps of the pixel stage, in which the decoder sees the features themselves
TEACHER_BATCH = 64  # pairs of a step
BATCH = 32  # pictures of a step, over all processes
CODEBOOK_PICTURES, KMEANS_ITERATIONS = 768, 4
CODEBOOK_FITS = (0, 300, 600, 900, 1200)  # steps of the joint stage
PHOTO_SHARE = 0.12
COMMITMENT = 0.25
DROP_PROBABILITY = 0.2  # of batches in which half of the scales are dropped


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


def codebook_loss(features: torch.Tensor, quantization: QuantizerOutput) -> torch.Tensor:
    """Codebook term, averaged over the running sums of the scales (VAR), and commitment to the last of them.

    Differs from VAR, which commits features to every running sum: the coarse ones would flatten the features.
    """
    codebook = torch.stack([F.mse_loss(total, features.detach()) for total in quantization.partial_sums]).mean()
    return codebook + COMMITMENT * F.mse_loss(quantization.partial_sums[-1].detach(), features)


@torch.no_grad()
def fit_codebook(quantizer: DualCodebookQuantizer, features: torch.Tensor, schedule: ScaleSchedule) -> None:
    """Set the entries to means of residuals that occur: each scale in turn gets k-means of what earlier ones leave.

    Gradients alone move entries too slowly to follow the features; k-means leaves about half of the error.
    """
    shares = torch.tensor(schedule.lengths).float().sqrt()
    counts = (shares / shares.sum() * len(quantizer.pixel_codebook)).int().tolist()
    counts = [min(count, len(features) * length) for count, length in zip(counts, schedule.lengths)]
    counts[-1] += len(quantizer.pixel_codebook) - sum(counts)
    residual, done = features.float(), 0
    for grid, count in zip(schedule, counts):
        pooled = to_sequence(F.interpolate(residual, size=grid, mode="area")).flatten(0, 1)
        entries = pooled[torch.randperm(len(pooled))[:count]]
        for _ in range(KMEANS_ITERATIONS):
            nearest = _nearest(quantizer, pooled, entries)
            members = torch.bincount(nearest, minlength=count)[:, None]
            means = torch.zeros_like(entries).index_add_(0, nearest, pooled) / members.clamp(min=1)
            entries = torch.where(members > 0, means, entries)
        semantic, pixel = entries.split(quantizer.dims, dim=-1)
        quantizer.semantic_codebook[done : done + count] = semantic
        quantizer.pixel_codebook[done : done + count] = pixel
        chosen = entries[_nearest(quantizer, pooled, entries)].unflatten(0, (len(features), -1))
        residual = residual - resize_features(to_map(chosen, grid), features.shape[-2:])
        done += count


def _nearest(quantizer: DualCodebookQuantizer, queries: torch.Tensor, entries: torch.Tensor) -> torch.Tensor:
    return torch.cat([quantizer.distances(chunk, entries).argmin(-1) for chunk in queries.split(4096)])


@torch.no_grad()
def fit_to_pictures(
    model: NextFlowVQModel, features_of: Callable[[torch.Tensor], torch.Tensor], name: str, seed: int
) -> None:
    """Fit the codebook to the features of pictures drawn by `name`; every process does the same."""
    torch.manual_seed(seed)
    pixels = picture_batch(random.Random(name), CODEBOOK_PICTURES, PHOTO_SHARE)
    features = torch.cat([features_of(chunk) for chunk in pixels.split(64)])
    fit_codebook(model.quantizer, features, model.schedules.by_grid(features.shape[-2:]))


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
    """Stage 1: the pixel branch, first as a plain autoencoder, then with its half of the codebook alone in the lookup.

    The codebook is drawn from features that have already learned to tell pictures apart; from the start, the
    commitment to an untrained codebook holds them together.
    """
    torch.manual_seed(1)
    model = NextFlowVQModel(vq_config(decoder_blocks=1)).to(memory_format=torch.channels_last)
    parts = nn.ModuleList([model.pixel_encoder, model.pixel_decoder, model.quantizer])
    model.quantizer.semantic_codebook.requires_grad_(False)
    model.quantizer.weights = (0.0, model.config.pixel_weight)
    run = Run(folder, "pixel", parts, STEPS["pixel"], peak=3e-3)

    def with_semantic(pixel_features: torch.Tensor) -> torch.Tensor:
        return F.pad(pixel_features, (0, 0, 0, 0, model.config.semantic_dim, 0))  # the half that is not there yet

    def step_fn(step: int) -> dict[str, float]:
        if step == UNQUANTISED:
            fit_to_pictures(model, lambda pixels: with_semantic(model.pixel_encoder(pixels)), "pixel codebook", seed=1)
        rng = random.Random(f"pixel {step} {run.rank}")
        pixels = picture_batch(rng, BATCH // run.processes, PHOTO_SHARE).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            features = model.pixel_encoder(pixels).float()
            if step < UNQUANTISED:
                reconstruction, quantization = model.pixel_decoder(features), None
            else:
                schedule = model.schedules.by_grid(features.shape[-2:])
                dropped = keep_scales(rng, len(schedule))
                quantization = model.quantizer(with_semantic(features), schedule, keep_scales=dropped)
                sums = [total[:, model.config.semantic_dim :] for total in quantization.partial_sums]
                quantization.partial_sums = sums
                reconstruction = model.pixel_decoder(features + (sums[-1] - features).detach())
        loss, row = picture_loss(reconstruction, pixels), {"psnr": psnr(reconstruction, pixels)}
        if quantization is not None:
            loss, row = loss + codebook_loss(features, quantization), row | norms(quantization)
        run.update(loss)
        return {"loss": loss.item()} | row

    run.train(step_fn)
    model.quantizer.weights = (model.config.semantic_weight, model.config.pixel_weight)
    return model.requires_grad_(True)


def norms(quantization: QuantizerOutput) -> dict[str, float]:
    used = len(quantization.target_codes.unique())
    return {"used": used, "first_norm": float(quantization.residual_norms[0])}


def train_joint(folder: Path, model: NextFlowVQModel, teacher: Siglip2Model) -> NextFlowVQModel:
    """Stage 2: both branches, both decoders and the whole codebook, from stage 1 and the teacher."""
    encoder_state = {name: value for name, value in teacher.vision_model.state_dict().items() if "head." not in name}
    model.semantic_encoder.load_state_dict(encoder_state)
    torch.manual_seed(2)
    run = Run(folder, "joint", model, STEPS["joint"], peak=1e-3)
    layer = model.config.semantic_feature_layer

    def step_fn(step: int) -> dict[str, float]:
        if step in CODEBOOK_FITS:
            fit_to_pictures(model, model.features, f"joint codebook {step}", seed=step)
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
        quantization = codebook_loss(output.features, output.quantization)
        loss = picture_loss(output.reconstruction, pixels) + quantization + 0.2 * distillation
        run.update(loss)
        row = {"loss": loss.item(), "psnr": psnr(output.reconstruction, pixels)}
        row |= {"distillation": distillation.item(), "quantization": quantization.item()}
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
