"""What a decoder is trained for: to tell the noise in a picture's latents from the picture, its codes given.

The plain loss of each backbone's own family and nothing beside it (NextFlow sec. 3.3: no pixel losses): the target is
the scheduler's `prediction_type` for diffusion, noise minus latents for flow matching.

Shape suffixes: B pictures, C condition channels, h w the codes' grid, H W pixels.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch import nn

from .decoding import NextFlowDecoderMixin
from .pipelines import (
    NextFlowDecoderPipeline,
    NextFlowFluxDecoderPipeline,
    NextFlowQwenImageDecoderPipeline,
    NextFlowXLDecoderPipeline,
)

LORA_TARGETS = {  # a UNet reads the condition in conv_in, other backbones in the conditioner alone
    "unet": r"(.*\.)?(to_q|to_k|to_v|to_out\.0)|conv_in",
    "flux": r".*\.attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)",
    "qwenimage": r".*\.attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)",
}


class DecoderLoss(nn.Module):
    """A decoder's backbone and conditioner as one module, whose forward is the loss.

    Args:
        pipe: the decoder.
        guidance_scale: what a guidance-distilled backbone (FLUX.1-dev) is told.
    """

    def __init__(self, pipe: NextFlowDecoderMixin, guidance_scale: float = 3.5):
        super().__init__()
        self.backbone, self.conditioner = getattr(pipe, pipe.backbone), pipe.conditioner
        self.scheduler = training_scheduler(pipe.scheduler)
        self.guidance_scale = guidance_scale
        object.__setattr__(self, "pipe", pipe)  # its other parts are not this module's

    def activation_checkpointing_enable(self, **kwargs) -> None:
        """As of the library's models; diffusers' have no arguments for it."""
        self.backbone.enable_gradient_checkpointing()

    def forward(
        self, latents: torch.Tensor, features: torch.Tensor, captions: Sequence[str], generator: torch.Generator
    ) -> torch.Tensor:
        """
        Args:
            latents: what [`encode_pixels`] gives.
            features: (B, C, h, w), `torch.cat(vq_model.condition_features(codes, grid), dim=1)`.
            captions: B; `""` for none.
            generator: of noise and timesteps.

        Returns:
            the mean squared error, float32.

        Raises:
            ValueError: if they are not of as many pictures, or see [`disturb`].
        """
        if not len(latents) == len(features) == len(captions):
            raise ValueError(
                f"latents, features and captions must be of as many pictures, got {len(latents)}, {len(features)} and "
                f"{len(captions)}"
            )
        size = self.pipe.output_size(features.shape[-2:])
        noisy, timesteps, target = disturb(self.scheduler, latents, generator)
        with torch.no_grad():
            text = encode_captions(self.pipe, captions, size)
        with self.pipe._reading(features, self.pipe.conditioner.cells(self.pipe.stride)):
            predicted = predict(self.pipe, noisy, timesteps, text, size, self.guidance_scale)
        return F.mse_loss(predicted.float(), target.float())


def training_scheduler(scheduler) -> DDPMScheduler | FlowMatchEulerDiscreteScheduler:
    """The noise that a sampler's scheduler undoes.

    Raises:
        ValueError: for a scheduler that undoes another kind, as of EDM.
    """
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
    if not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(
            "a decoder is trained with the noise of DDPM and its like, or of FlowMatchEulerDiscreteScheduler, got "
            f"{type(scheduler).__name__}"
        )
    return DDPMScheduler.from_config(scheduler.config)


def disturb(
    scheduler: DDPMScheduler | FlowMatchEulerDiscreteScheduler, latents: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents with noise, the timesteps (B,), uniform over the scheduler's, and what is to be predicted.

    Raises:
        ValueError: for an unknown `prediction_type`.
    """
    noise = randn_tensor(latents.shape, generator, latents.device, latents.dtype)
    steps = scheduler.config.num_train_timesteps
    indices = torch.randint(steps, (len(latents),), generator=generator, device=generator.device)
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        timesteps = scheduler.timesteps[indices].to(latents.device)
        sigmas = scheduler.sigmas[indices].to(latents).view(-1, *[1] * (latents.ndim - 1))
        return (1 - sigmas) * latents + sigmas * noise, timesteps, noise - latents
    timesteps, kind = indices.to(latents.device), scheduler.config.prediction_type
    noisy = scheduler.add_noise(latents, noise, timesteps)
    if kind == "epsilon":
        return noisy, timesteps, noise
    if kind == "v_prediction":
        return noisy, timesteps, scheduler.get_velocity(latents, noise, timesteps)
    if kind == "sample":
        return noisy, timesteps, latents
    raise ValueError(f"the scheduler's prediction_type must be epsilon, v_prediction or sample, got {kind!r}")


@torch.no_grad()
def encode_pixels(pipe: NextFlowDecoderMixin, pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Latents of (B, 3, H, W) pixels in [-1, 1], normalised, in the form that the backbone reads: maps for a UNet,
    else tokens, packed 2 x 2."""
    pixels = pixels.to(device=pipe.vae.device, dtype=pipe.vae.dtype)
    if pipe.family == "unet":
        encoded = pipe.vae.encode(pixels)
        latents = encoded.latent_dist.sample(generator) if "latent_dist" in encoded else encoded.latents
        return latents * pipe.vae.config.scaling_factor
    latents = pipe._encode_vae_image(pixels if pipe.family == "flux" else pixels.unsqueeze(2), generator)
    latents = latents if pipe.family == "flux" else latents.squeeze(2)
    return pipe._pack_latents(latents, *latents.shape)


def encode_captions(pipe: NextFlowDecoderMixin, captions: Sequence[str], size: tuple[int, int]) -> dict:
    """The backbone's arguments that say the captions."""
    captions, device = list(captions), getattr(pipe, pipe.backbone).device
    if isinstance(pipe, NextFlowDecoderPipeline):
        return {"encoder_hidden_states": pipe.encode_prompt(captions, device, 1, False)[0]}
    if isinstance(pipe, NextFlowXLDecoderPipeline):
        embeds, _, pooled, _ = pipe.encode_prompt(captions, None, device, 1, False)
        ids, _ = pipe._get_add_time_ids(
            size, (0, 0), size, 6.0, 2.5, size, (0, 0), size, embeds.dtype, pooled.shape[-1]
        )  # the scores are those the stock call takes where none is given
        added = {"text_embeds": pooled, "time_ids": ids.to(device).expand(len(captions), -1)}
        return {"encoder_hidden_states": embeds, "added_cond_kwargs": added}
    if isinstance(pipe, NextFlowFluxDecoderPipeline):
        embeds, pooled, ids = pipe.encode_prompt(captions, None, device)
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled, "txt_ids": ids}
    if isinstance(pipe, NextFlowQwenImageDecoderPipeline):
        embeds, mask = pipe.encode_prompt(captions, device)
        return {"encoder_hidden_states": embeds, "encoder_hidden_states_mask": mask}
    raise ValueError(f"a decoder is one of the package's pipelines, got {type(pipe).__name__}")


def predict(
    pipe: NextFlowDecoderMixin,
    noisy: torch.Tensor,
    timesteps: torch.Tensor,
    text: dict,
    size: tuple[int, int],
    guidance_scale: float,
) -> torch.Tensor:
    """One pass of the backbone, as the pipeline's loop calls it."""
    backbone = getattr(pipe, pipe.backbone)
    if pipe.family == "unet":
        return backbone(noisy, timesteps, return_dict=False, **text)[0]
    rows, columns = (length // pipe.stride for length in size)
    extra: dict = {"guidance": None}
    if backbone.config.guidance_embeds:
        extra["guidance"] = torch.full((len(noisy),), guidance_scale, device=noisy.device)
    if pipe.family == "flux":
        extra["img_ids"] = pipe._prepare_latent_image_ids(len(noisy), rows, columns, noisy.device, noisy.dtype)
    else:
        extra["img_shapes"] = [[(1, rows, columns)]] * len(noisy)
    timesteps = timesteps / pipe.scheduler.config.num_train_timesteps
    return backbone(hidden_states=noisy, timestep=timesteps, return_dict=False, **text, **extra)[0]
