"""The decoder pipelines, one for each family of backbones.

Each takes the components of the stock pipeline it extends, and two more: `conditioner` and `vq_model`. A stock
checkpoint loads with `vq_model=` given; without a conditioner a fresh one is made, and the pictures are the stock
ones. Both may be `None`, but have no default: where a component has one, `DiffusionPipeline.from_pretrained` ignores
what it is given.
"""

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxTransformer2DModel,
    QwenImageImg2ImgPipeline,
    QwenImageTransformer2DModel,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionXLImg2ImgPipeline,
    UNet2DConditionModel,
)
from diffusers.schedulers import KarrasDiffusionSchedulers
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    T5EncoderModel,
    T5TokenizerFast,
)

from transformers_nextflow import NextFlowVQModel

from .conditioning import NextFlowConditioner
from .decoding import NextFlowDecoderMixin


class UNetDecoderMixin(NextFlowDecoderMixin):
    """Of a backbone whose `conv_in` is widened (NextFlow's 1B decoder, trained as a whole)."""

    family, backbone = "unet", "unet"

    @property
    def stride(self) -> int:  # type: ignore[override]
        return self.vae_scale_factor

    def _size_arguments(self, size: tuple[int, int]) -> dict:
        return {}  # the stock loop reads it off the start

    def _noise(self, rows: int, size: tuple[int, int], generator, latents) -> dict:
        shape = (rows, self.vae.config.latent_channels, *(length // self.vae_scale_factor for length in size))
        return {"image": self._random(shape, generator, latents)}

    def prepare_latents(self, image: torch.Tensor, timestep, batch_size, num_images_per_prompt, dtype, device, *args):
        if image.shape[1] == self.vae.config.latent_channels:  # noise, as in text-to-image
            return image.to(device=device, dtype=dtype) * self.scheduler.init_noise_sigma
        return super().prepare_latents(image, timestep, batch_size, num_images_per_prompt, dtype, device, *args)


class TokenDecoderMixin(NextFlowDecoderMixin):
    """Of a transformer whose embedded latents the condition is added to (NextFlow's 12B and 18B, trained by LoRA)."""

    backbone = "transformer"

    @property
    def stride(self) -> int:  # type: ignore[override]
        return self.vae_scale_factor * 2  # latents are packed 2 x 2 to a token

    def _size_arguments(self, size: tuple[int, int]) -> dict:
        return {"height": size[0], "width": size[1]}

    def _noise(self, rows: int, size: tuple[int, int], generator, latents) -> dict:
        edges = [length // self.vae_scale_factor for length in size]
        # of these channels, the stock pipeline takes the image for latents already
        image = torch.zeros(rows, self.latent_channels, *edges)
        if latents is None:
            noise = self._random((rows, self.latent_channels, *edges), generator, None)
            latents = self._pack_latents(noise, rows, self.latent_channels, *edges)
        return {"image": image, "latents": latents}


class NextFlowDecoderPipeline(UNetDecoderMixin, StableDiffusionImg2ImgPipeline):
    """A UNet2DConditionModel with Stable Diffusion 1 or 2's text encoder: NextFlow's 1B decoder (sec. 3.3).

    Differs from the paper, which names no UNet: Stable Diffusion 2.1's has 0.87 B parameters.
    """

    model_cpu_offload_seq = "vq_model->conditioner->text_encoder->image_encoder->unet->vae"
    _optional_components = ["safety_checker", "feature_extractor", "image_encoder", "conditioner", "vq_model"]
    _exclude_from_cpu_offload = ["safety_checker", "vq_model"]

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        conditioner: NextFlowConditioner | None,
        vq_model: NextFlowVQModel | None,
        safety_checker=None,
        feature_extractor: CLIPImageProcessor | None = None,
        image_encoder: CLIPVisionModelWithProjection | None = None,
        requires_safety_checker: bool = False,
    ):
        super().__init__(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
            image_encoder=image_encoder,
            requires_safety_checker=requires_safety_checker,
        )
        self._add_condition(conditioner, vq_model)


class NextFlowXLDecoderPipeline(UNetDecoderMixin, StableDiffusionXLImg2ImgPipeline):
    """A UNet2DConditionModel with Stable Diffusion XL's two text encoders."""

    model_cpu_offload_seq = "vq_model->conditioner->text_encoder->text_encoder_2->image_encoder->unet->vae"
    _optional_components = [
        *StableDiffusionXLImg2ImgPipeline._optional_components,
        "conditioner",
        "vq_model",
    ]
    _exclude_from_cpu_offload = ["vq_model"]

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        text_encoder_2: CLIPTextModelWithProjection,
        tokenizer: CLIPTokenizer,
        tokenizer_2: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        conditioner: NextFlowConditioner | None,
        vq_model: NextFlowVQModel | None,
        image_encoder: CLIPVisionModelWithProjection | None = None,
        feature_extractor: CLIPImageProcessor | None = None,
        requires_aesthetics_score: bool = False,
        force_zeros_for_empty_prompt: bool = True,
        add_watermarker: bool | None = None,
    ):
        super().__init__(
            vae=vae,
            text_encoder=text_encoder,
            text_encoder_2=text_encoder_2,
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            unet=unet,
            scheduler=scheduler,
            image_encoder=image_encoder,
            feature_extractor=feature_extractor,
            requires_aesthetics_score=requires_aesthetics_score,
            force_zeros_for_empty_prompt=force_zeros_for_empty_prompt,
            add_watermarker=add_watermarker,
        )
        self._add_condition(conditioner, vq_model)


class NextFlowFluxDecoderPipeline(TokenDecoderMixin, FluxImg2ImgPipeline):
    """Flux.1's 12B transformer: NextFlow's 12B decoder (sec. 3.3)."""

    family = "flux"
    model_cpu_offload_seq = "vq_model->conditioner->text_encoder->text_encoder_2->image_encoder->transformer->vae"
    _optional_components = ["image_encoder", "feature_extractor", "conditioner", "vq_model"]
    _exclude_from_cpu_offload = ["vq_model"]

    def __init__(
        self,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        text_encoder_2: T5EncoderModel,
        tokenizer_2: T5TokenizerFast,
        transformer: FluxTransformer2DModel,
        conditioner: NextFlowConditioner | None,
        vq_model: NextFlowVQModel | None,
        image_encoder: CLIPVisionModelWithProjection | None = None,
        feature_extractor: CLIPImageProcessor | None = None,
    ):
        super().__init__(
            scheduler=scheduler,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            transformer=transformer,
            image_encoder=image_encoder,
            feature_extractor=feature_extractor,
        )
        self._add_condition(conditioner, vq_model)

    @property
    def _embedder(self):
        return self.transformer.x_embedder


class NextFlowQwenImageDecoderPipeline(TokenDecoderMixin, QwenImageImg2ImgPipeline):
    """Qwen-Image's 20B transformer, whose text branch is Qwen2.5-VL, NextFlow's own family.

    Differs from the paper, whose third decoder has 18B parameters and is not public.
    """

    family = "qwenimage"
    model_cpu_offload_seq = "vq_model->conditioner->text_encoder->transformer->vae"
    _optional_components = ["conditioner", "vq_model"]
    _exclude_from_cpu_offload = ["vq_model"]

    def __init__(
        self,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: AutoencoderKLQwenImage,
        text_encoder: Qwen2_5_VLForConditionalGeneration,
        tokenizer: Qwen2Tokenizer,
        transformer: QwenImageTransformer2DModel,
        conditioner: NextFlowConditioner | None,
        vq_model: NextFlowVQModel | None,
    ):
        super().__init__(
            scheduler=scheduler, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, transformer=transformer
        )
        self._add_condition(conditioner, vq_model)

    @property
    def _embedder(self):
        return self.transformer.img_in

    def encode_prompt(
        self,
        prompt: str | list[str],
        device: torch.device | None = None,
        num_images_per_prompt: int = 1,
        prompt_embeds: torch.Tensor | None = None,
        prompt_embeds_mask: torch.Tensor | None = None,
        max_sequence_length: int = 1024,
    ):
        # diffusers 0.42 repeats embeddings caption by caption, but their mask as a whole
        prompt_embeds, prompt_embeds_mask = super().encode_prompt(
            prompt, device, 1, prompt_embeds, prompt_embeds_mask, max_sequence_length
        )
        prompt_embeds = prompt_embeds.repeat_interleave(num_images_per_prompt, dim=0)
        if prompt_embeds_mask is not None:
            prompt_embeds_mask = prompt_embeds_mask.repeat_interleave(num_images_per_prompt, dim=0)
        return prompt_embeds, prompt_embeds_mask


DECODERS = (
    NextFlowDecoderPipeline,
    NextFlowXLDecoderPipeline,
    NextFlowFluxDecoderPipeline,
    NextFlowQwenImageDecoderPipeline,
)
