"""Tiny backbones of every family, with random weights of a fixed seed, as stock diffusers pipelines."""

from functools import cache

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImageImg2ImgPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from diffusers_nextflow import (
    NextFlowDecoderPipeline,
    NextFlowFluxDecoderPipeline,
    NextFlowQwenImageDecoderPipeline,
    NextFlowXLDecoderPipeline,
    PixelAutoencoder,
)
from tests.tiny_models import tiny_config
from transformers_nextflow import NextFlowVQModel
from transformers_nextflow.scales import Grid

FAMILIES = {  # ours, text to image, image to image
    "unet": (NextFlowDecoderPipeline, StableDiffusionPipeline, StableDiffusionImg2ImgPipeline),
    "xl": (NextFlowXLDecoderPipeline, StableDiffusionXLPipeline, StableDiffusionXLImg2ImgPipeline),
    "flux": (NextFlowFluxDecoderPipeline, FluxPipeline, FluxImg2ImgPipeline),
    "qwenimage": (NextFlowQwenImageDecoderPipeline, QwenImagePipeline, QwenImageImg2ImgPipeline),
}
WIDE: Grid = (2, 4)
PATCH_SIZE = 16
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@cache
def tiny_vq_model(patch_size: int = PATCH_SIZE) -> NextFlowVQModel:
    """Pictures of 48x48 and 32x64 pixels (height x width)."""
    torch.manual_seed(0)
    sizes = {"patch_size": patch_size, "stem_stride": patch_size // 2}
    semantic = tiny_config().vq_config.semantic_config.to_dict() | {"patch_size": patch_size}
    model = NextFlowVQModel(tiny_config(vq=sizes | {"semantic_config": semantic}).vq_config).eval()
    with torch.no_grad():  # at initialisation features are so small that every picture gets the same codes
        model.semantic_to_code[-1].weight.mul_(50)
        model.pixel_encoder.to_code.weight.mul_(50)
    return model


def random_codes(batch: int, grid: Grid = WIDE, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    length = tiny_vq_model().schedules.by_grid(grid).num_codes
    return torch.randint(tiny_vq_model().config.codebook_size, (batch, length), generator=generator)


def clip_tokenizer() -> CLIPTokenizer:
    words = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(letter + "</w>" for letter in LETTERS)]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=16)


def clip_text_config(width: int = 16) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=64,
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=width,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )


def qwen_tokenizer() -> Qwen2Tokenizer:
    from tokenizers.pre_tokenizers import ByteLevel

    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet())]
    return Qwen2Tokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])


def stock_components(family: str) -> dict:
    """Of the stock pipelines."""
    torch.manual_seed(0)
    components = {"unet": _unet, "xl": _xl, "flux": _flux, "qwenimage": _qwenimage}[family]()
    for component in components.values():
        if isinstance(component, torch.nn.Module):
            component.eval()
    return components


def _vae(**kwargs) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=[4, 4, 4],
        norm_num_groups=2,
        latent_channels=4,
        **kwargs,
    )


def _unet(**kwargs) -> dict:
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=[4, 8],
        layers_per_block=1,
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"],
        cross_attention_dim=16 if not kwargs else 32,
        attention_head_dim=2,
        norm_num_groups=2,
        **kwargs,
    )
    return {
        "vae": _vae(),
        "text_encoder": CLIPTextModel(clip_text_config()),
        "tokenizer": clip_tokenizer(),
        "unet": unet,
        "scheduler": DDIMScheduler(
            beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1
        ),
    }


def _xl() -> dict:
    components = _unet(
        addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=6 * 4 + 16
    )
    return components | {
        "scheduler": EulerDiscreteScheduler(beta_schedule="scaled_linear", steps_offset=1),
        "text_encoder_2": CLIPTextModelWithProjection(clip_text_config()),
        "tokenizer_2": clip_tokenizer(),
    }


def _flux() -> dict:
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=[2, 2, 4],
    )
    t5 = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -1.0), *((letter, -2.0) for letter in LETTERS)]
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(),
        "vae": _vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1, scaling_factor=0.4),
        "text_encoder": CLIPTextModel(clip_text_config()),
        "tokenizer": clip_tokenizer(),
        "text_encoder_2": T5EncoderModel(t5),
        "tokenizer_2": T5TokenizerFast(vocab=pieces, extra_ids=0),
        "transformer": transformer,
    }


def _qwenimage() -> dict:
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(2, 2, 4),
    )
    vae = AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.1] * 4,
        latents_std=[0.9] * 4,
    )
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 16}
    config = Qwen2_5_VLConfig(
        text_config=layers
        | {
            "vocab_size": 300,
            "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [1, 1, 2]},
        },
        vision_config={"depth": 1, "num_heads": 2, "hidden_size": 16, "intermediate_size": 16, "out_hidden_size": 16},
    )
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(),
        "vae": vae,
        "text_encoder": Qwen2_5_VLForConditionalGeneration(config),
        "tokenizer": qwen_tokenizer(),
        "transformer": transformer,
    }


def stock_pipeline(family: str, components: dict, from_image: bool = False):
    stock = FAMILIES[family][2 if from_image else 1]
    extra = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipe = stock(**components, **(extra if family == "unet" else {}))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def decoder(family: str, trained: bool = False, **components):
    """Ours, over the stock components; `trained`: the condition says something."""
    pipe = FAMILIES[family][0](
        **{"vq_model": tiny_vq_model(), "conditioner": None} | stock_components(family) | components
    )
    pipe.set_progress_bar_config(disable=True)
    if trained:
        let_condition_speak(pipe)
    return pipe


def pixel_decoder(vq_model: NextFlowVQModel) -> NextFlowDecoderPipeline:
    """On 4 x 4 pixels' frequencies in place of a VAE's latents, by a UNet that reads no caption."""
    vae = PixelAutoencoder()
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=vae.config.latent_channels,
        out_channels=vae.config.latent_channels,
        block_out_channels=[8, 8],
        layers_per_block=1,
        down_block_types=["DownBlock2D"] * 2,
        mid_block_type="UNetMidBlock2D",
        up_block_types=["UpBlock2D"] * 2,
        cross_attention_dim=16,
        norm_num_groups=2,
    )
    return decoder("unet", vae=vae, unet=unet, vq_model=vq_model)


@torch.no_grad()
def let_condition_speak(pipe, std: float = 2.0) -> None:
    """Weights where a fresh conditioner has zeros."""
    generator = torch.Generator().manual_seed(1)
    if pipe.family == "unet":
        pipe.unet.conv_in.weight[:, 4:].normal_(std=std, generator=generator)
    else:
        pipe.conditioner.projection[-1].weight.normal_(std=std, generator=generator)


def guidance(family: str) -> dict:
    """Arguments of two steps with guidance by text."""
    scale = {"guidance_scale": 3.0} if family in ("unet", "xl") else {"true_cfg_scale": 3.0}
    return {"num_inference_steps": 2, "output_type": "pt", "negative_prompt": ["x", "y"]} | scale
