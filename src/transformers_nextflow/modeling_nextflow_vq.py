"""The vision tokenizer: semantic branch, pixel branch, dual codebook, two decoders (NextFlow sec. 2.1).

- The semantic branch is transformers' own SigLIP2-naflex encoder, which reads any grid, or one of TokenFlow's of a
  fixed size (`fixed_size.py`).
- The pixel branch is a convolutional autoencoder.
- Both meet on one grid; their concatenated channels are quantised together (`quantizer.py`).
- The pixel decoder reads the pixel half alone, the semantic decoder the semantic half (TokenFlow).

Shape suffixes: B batch, C channels, L codes of an image, h w final grid, H W pixels.
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.siglip2.configuration_siglip2 import Siglip2VisionConfig
from transformers.models.siglip2.modeling_siglip2 import Siglip2VisionEmbeddings, Siglip2VisionModel
from transformers.utils import ModelOutput, can_return_tuple

from .configuration_nextflow import NextFlowVQConfig
from .fixed_size import CLIPEncoder, HiddenStates, SiglipEncoder, ViTDecoder
from .layout import check_integers, check_range
from .quantizer import (
    DualCodebookQuantizer,
    QuantizerOutput,
    SelfCorrection,
    resize_features,
    to_map,
    to_sequence,
)
from .remote_code import LibraryModel
from .scales import Grid, ScaleSchedule
from .utils.precision import Float32, without_autocast

PIXELS_AT_ONCE = 2**21  # that are encoded or decoded at once: two pictures of 1024 x 1024


def pictures_at_once(size: tuple[int, int]) -> int:
    """How many pictures of (height, width) are encoded or decoded at once."""
    return max(1, PIXELS_AT_ONCE // (size[0] * size[1]))


def patchify(pixel_values: torch.Tensor, patch_size: int) -> torch.Tensor:
    """(B, 3, H, W) -> (B, h*w, p*p*3): patches row-major, each in (row, column, channel) order, as SigLIP2 reads."""
    B, C, H, W = pixel_values.shape
    patches = pixel_values.view(B, C, H // patch_size, patch_size, W // patch_size, patch_size)
    return patches.permute(0, 2, 4, 3, 5, 1).reshape(B, -1, patch_size * patch_size * C)


def unpatchify(patches: torch.Tensor, grid: Grid, patch_size: int) -> torch.Tensor:
    """(B, h*w, p*p*3) -> (B, 3, H, W), the inverse of [`patchify`]."""
    B, (h, w) = patches.shape[0], grid
    pixels = patches.view(B, h, w, patch_size, patch_size, -1)
    return pixels.permute(0, 5, 1, 3, 2, 4).reshape(B, -1, h * patch_size, w * patch_size)


class ResidualBlock(GradientCheckpointingLayer):
    """GroupNorm-SiLU-Conv twice, beside a shortcut."""

    def __init__(self, config: NextFlowVQConfig, in_channels: int, out_channels: int):
        super().__init__()
        self.norm1 = _norm(config, in_channels)
        self.conv1 = _conv(in_channels, out_channels)
        self.norm2 = _norm(config, out_channels)
        self.conv2 = _conv(out_channels, out_channels)
        self.shortcut = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        update = self.conv1(F.silu(self.norm1(hidden)))
        update = self.conv2(F.silu(self.norm2(update)))
        return self.shortcut(hidden) + update


class AttnBlock(GradientCheckpointingLayer):
    """Single-head self-attention over all positions of the coarsest resolution."""

    def __init__(self, config: NextFlowVQConfig, channels: int):
        super().__init__()
        self.norm = _norm(config, channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj_out = nn.Linear(channels, channels)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        query, key, value = self.qkv(to_sequence(self.norm(hidden))).chunk(3, dim=-1)
        update = F.scaled_dot_product_attention(query, key, value)
        return hidden + to_map(self.proj_out(update), hidden.shape[-2:])


def _norm(config: NextFlowVQConfig, channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(config.norm_groups or min(32, channels // 4), channels, eps=1e-6)


def _conv(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, padding=1)


def _resolutions(config: NextFlowVQConfig, widths: list[int], blocks: int, coarsest: int) -> list[list[nn.Module]]:
    """Residual blocks of each resolution, with attention at the coarsest: after each, or after the first alone."""
    resolutions = []
    for resolution, (before, width) in enumerate(zip([widths[0], *widths], widths)):
        layers: list[nn.Module] = []
        for block in range(blocks):
            layers.append(ResidualBlock(config, width if block else before, width))
            if resolution == coarsest and (config.attention == "dense" or block == 0):
                layers.append(AttnBlock(config, width))
        resolutions.append(layers)
    return resolutions


def _middle(config: NextFlowVQConfig, channels: int) -> list[nn.Module]:
    """What stands between the coarsest resolution and the codes with dense attention."""
    if config.attention != "dense":
        return []
    first, last = (ResidualBlock(config, channels, channels) for _ in range(2))
    return [first, AttnBlock(config, channels), last]


class PixelEncoder(nn.Module):
    """(B, 3, H, W) -> (B, pixel_dim, h, w): convolutions, halving the resolution between `channel_multipliers`."""

    def __init__(self, config: NextFlowVQConfig):
        super().__init__()
        widths = [config.base_channels * m for m in config.channel_multipliers]
        self.stem_stride = config.stem_stride
        self.conv_in = _conv(3 * config.stem_stride**2, widths[0])
        resolutions = _resolutions(config, widths, config.encoder_blocks, coarsest=len(widths) - 1)
        resolutions[-1] += _middle(config, widths[-1])
        self.resolutions = nn.ModuleList(nn.Sequential(*layers) for layers in resolutions)
        self.downsamples = nn.ModuleList(nn.Conv2d(width, width, 3, stride=2) for width in widths[:-1])
        self.norm_out = _norm(config, widths[-1])
        self.conv_out = _conv(widths[-1], config.latent_channels)
        self.to_code = nn.Conv2d(config.latent_channels, config.pixel_dim, 1)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        hidden = self.conv_in(F.pixel_unshuffle(pixel_values, self.stem_stride))
        for i, resolution in enumerate(self.resolutions):
            hidden = resolution(hidden)
            if i < len(self.downsamples):
                hidden = self.downsamples[i](F.pad(hidden, (0, 1, 0, 1)))
        return self.to_code(self.conv_out(F.silu(self.norm_out(hidden))))


class PixelDecoder(nn.Module):
    """(B, pixel_dim, h, w) -> (B, 3, H, W), the mirror of [`PixelEncoder`] with `decoder_blocks` per resolution."""

    def __init__(self, config: NextFlowVQConfig):
        super().__init__()
        base_channels = config.decoder_base_channels or config.base_channels
        widths = [base_channels * m for m in reversed(config.channel_multipliers)]
        self.from_code = nn.Conv2d(config.pixel_dim, config.latent_channels, 1)
        self.conv_in = _conv(config.latent_channels, widths[0])
        resolutions = _resolutions(config, widths, config.decoder_blocks, coarsest=0)
        resolutions[0] = _middle(config, widths[0]) + resolutions[0]
        self.resolutions = nn.ModuleList(nn.Sequential(*layers) for layers in resolutions)
        self.upsamples = nn.ModuleList(_conv(width, width) for width in widths[:-1])
        self.norm_out = _norm(config, widths[-1])
        self.conv_out = _conv(widths[-1], 3 * config.stem_stride**2)
        self.stem_stride = config.stem_stride

    def forward(self, quantized: torch.Tensor) -> torch.Tensor:
        hidden = self.conv_in(self.from_code(quantized))
        for i, resolution in enumerate(self.resolutions):
            hidden = resolution(hidden)
            if i < len(self.upsamples):
                hidden = self.upsamples[i](F.interpolate(hidden, scale_factor=2.0, mode="nearest"))
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(hidden))), self.stem_stride)


class OneGridEmbeddings(Siglip2VisionEmbeddings):
    """SigLIP2's embeddings for a batch of one grid: the positions are resized once, not once per image."""

    def forward(self, pixel_values: torch.Tensor, spatial_shapes: torch.Tensor) -> torch.Tensor:
        patches_BLD = self.patch_embedding(pixel_values)
        edge = self.position_embedding_size
        positions_ND = self.position_embedding(torch.arange(edge**2, device=pixel_values.device))
        positions_1Dhw = to_map(positions_ND[None].float(), (edge, edge))
        grid = spatial_shapes[0].tolist()
        resized_1Dhw = F.interpolate(positions_1Dhw, grid, mode="bilinear", antialias=True)
        return patches_BLD + to_sequence(resized_1Dhw).to(patches_BLD.dtype)


class NaflexEncoder(HiddenStates, Siglip2VisionModel):
    """transformers' SigLIP2-naflex, for batches of one grid."""

    def __init__(self, config: Siglip2VisionConfig):
        super().__init__(config)
        self.embeddings = OneGridEmbeddings(config)

    def embed(self, pixel_values: torch.Tensor) -> torch.Tensor:
        size = self.config.patch_size
        grid = torch.tensor([[length // size for length in pixel_values.shape[-2:]]], device="cpu")
        return self.embeddings(patchify(pixel_values, size), grid)


ENCODERS = {
    "siglip2_vision_model": NaflexEncoder,
    "siglip_vision_model": SiglipEncoder,
    "clip_vision_model": CLIPEncoder,
}


class SemanticDecoder(nn.Module):
    """(B, semantic_dim, h, w) -> (B, h*w, teacher width): a transformer over the quantised semantic entries.

    SigLIP2-naflex's own model with one "pixel patch" per cell, so it reads any grid as the encoder does, or
    TokenFlow's.
    """

    def __init__(self, config: NextFlowVQConfig):
        super().__init__()
        teacher = config.semantic_config
        if config.semantic_decoder_config is None:
            self.layers = NaflexEncoder(
                Siglip2VisionConfig(
                    hidden_size=teacher.hidden_size,
                    intermediate_size=teacher.intermediate_size,
                    num_hidden_layers=config.semantic_decoder_layers,
                    num_attention_heads=teacher.num_attention_heads,
                    num_channels=config.semantic_dim,
                    patch_size=1,
                    num_patches=teacher.num_patches,
                    vision_use_head=False,
                    attn_implementation=teacher._attn_implementation,
                )
            )
        else:
            self.layers = ViTDecoder(config.semantic_decoder_config)
        width = self.layers.config.hidden_size
        self.to_features = nn.Sequential(
            nn.Linear(width, width), nn.Tanh(), nn.Linear(width, config.teacher_dim or teacher.hidden_size)
        )

    def forward(self, quantized: torch.Tensor) -> torch.Tensor:
        return self.to_features(self.layers(quantized))


@dataclass
class NextFlowVQOutput(ModelOutput):
    """Output of [`NextFlowVQModel`], everything its training losses need.

    Attributes:
        reconstruction: (B, 3, H, W) in about [-1, 1], not clamped.
        semantic_features: (B, h*w, D), the semantic decoder's estimate of the teacher's features.
        features: (B, C, h, w) float32, what was quantised.
        quantization: the quantizer's codes, pairs for its losses and residual norms.
    """

    reconstruction: torch.Tensor | None = None
    semantic_features: torch.Tensor | None = None
    features: torch.Tensor | None = None
    quantization: QuantizerOutput | None = None


class NextFlowVQModel(Float32, LibraryModel):
    """Images to multi-scale codes and back. Works on batches of one grid; callers group by grid.

    What comes out is on the device of what goes in, wherever the parts are.

    Float32 whatever it is loaded in or cast to, since codes must be those that shards hold.
    """

    config_class = NextFlowVQConfig
    config: NextFlowVQConfig
    base_model_prefix = "vq_model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _no_split_modules = [
        *("OneGridEmbeddings", "StretchedCLIPEmbeddings", "StretchedViTEmbeddings", "ResidualBlock", "AttnBlock")
    ]
    _keep_in_fp32_modules_strict = [
        *("semantic_encoder", "semantic_to_code", "pixel_encoder", "quantizer", "semantic_decoder", "pixel_decoder")
    ]
    _supports_sdpa = True
    supports_gradient_checkpointing = True

    def __init__(self, config: NextFlowVQConfig):
        super().__init__(config)
        self.schedules = config.schedule_table()
        width = config.semantic_config.hidden_size
        self.semantic_encoder = ENCODERS[config.semantic_config.model_type](config.semantic_config)
        self.semantic_to_code = nn.Sequential(
            nn.Linear(width, width), nn.Tanh(), nn.Linear(width, config.semantic_dim)
        )
        self.pixel_encoder = PixelEncoder(config)
        self.quantizer = DualCodebookQuantizer(config)
        self.semantic_decoder = SemanticDecoder(config)
        self.pixel_decoder = PixelDecoder(config)
        self.float()  # where it is built under another default
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, DualCodebookQuantizer):
            # of about unit length, as they are looked up; what ZeRO-3 shards has no shape of its own
            init.normal_(module.semantic_codebook, std=self.config.semantic_dim**-0.5)
            init.normal_(module.pixel_codebook, std=self.config.pixel_dim**-0.5)
        elif isinstance(module, nn.Conv2d):
            init.kaiming_uniform_(module.weight, a=5**0.5)
            init.zeros_(module.bias)
        else:
            super()._init_weights(module)

    def semantic_features(self, pixel_values: torch.Tensor, encoder: nn.Module | None = None) -> torch.Tensor:
        """(B, 3, H, W) -> (B, h*w, D): the semantic encoder's hidden state that is quantised.

        Args:
            encoder: another model of the semantic encoder's kind, as the teacher it is distilled from.
        """
        self._schedule_of(pixel_values)
        if self.config.semantic_mean is not None:
            shift, scale = (
                torch.tensor(values, dtype=torch.float32, device=pixel_values.device)[:, None, None]
                for values in (self.config.semantic_mean, self.config.semantic_deviation)
            )
            pixel_values = (((pixel_values + 1) * 127.5).clamp(0, 255) / 255 - shift) / scale
        encoder = self.semantic_encoder if encoder is None else encoder
        if not isinstance(encoder, HiddenStates):  # the library's own, seen as ours
            encoder = copy(encoder)
            encoder.__class__ = type(self.semantic_encoder)
        return encoder(pixel_values.to(self.dtype), self.config.semantic_feature_layer)

    def features(self, pixel_values: torch.Tensor, pixel_only: bool = False) -> torch.Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, C, h, w) float32, semantic channels first: what is quantised.

        With `pixel_only` the semantic channels are 0.
        """
        grid = self._schedule_of(pixel_values).final_grid
        height, width = (length * self.config.patch_size for length in grid)
        pixel = self.pixel_encoder(resize_features(pixel_values.to(self.dtype), (height, width)))
        pixel = pixel.to(pixel_values.device, torch.float32)
        if pixel_only:
            return F.pad(pixel, (0, 0, 0, 0, self.config.semantic_dim, 0))
        semantic = to_map(self.semantic_to_code(self.semantic_features(pixel_values)), grid)
        return torch.cat([semantic.to(pixel), pixel], dim=1)

    @torch.compiler.disable  # another order of sums would give other codes than shards hold
    @torch.no_grad()
    def encode(
        self,
        pixel_values: torch.Tensor,
        correction: SelfCorrection | None = None,
        seed: int = 0,
        keys: Sequence[str | int] | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Images of one size to codes, in float32 whatever the autocast.

        Args:
            pixel_values: (B, 3, H, W) in [-1, 1]; (H, W) must belong to a scale schedule.
            correction, seed, keys: self-correction; one key per image makes its draws independent of the batch.

        Returns:
            (B, L) int64 codes, scale by scale; with `correction` the pair (input codes, target codes).
        """
        schedule = self._schedule_of(pixel_values)
        if not pixel_values.isfinite().all():
            raise ValueError("pixel_values are not finite")
        inputs, targets, count = [], [], pictures_at_once(pixel_values.shape[-2:])
        for number, part in enumerate(pixel_values.split(count)):
            own_keys = keys if keys is None else keys[number * count : (number + 1) * count]
            with without_autocast(part.device):
                output = self.quantizer.quantize(self.features(part), schedule, correction, seed, own_keys)
            inputs.append(output.input_codes)
            targets.append(output.target_codes)
        return torch.cat(targets) if correction is None else (torch.cat(inputs), torch.cat(targets))

    @torch.no_grad()
    def decode(self, codes: torch.Tensor, grid: Grid) -> torch.Tensor:
        """(B, L) codes of the schedule that ends in `grid` -> (B, 3, H, W) float32 in [-1, 1]."""
        return self.decode_prefix(codes, grid, len(self.schedules.by_grid(grid)))

    @torch.no_grad()
    def decode_prefix(self, codes: torch.Tensor, grid: Grid, num_scales: int) -> torch.Tensor:
        """The picture of the first `num_scales` scales alone, at full size: a preview."""
        schedule = self.schedules.by_grid(grid)
        length = schedule.prefix(num_scales).num_codes
        self._check_codes(codes, schedule)
        parts = codes[:, :length].split(pictures_at_once(self.schedules.image_size(schedule)))
        pictures = [self._reconstruct(self.quantizer.decode(part, schedule), schedule) for part in parts]
        return torch.cat(pictures).float().clamp(-1, 1)

    @torch.no_grad()
    def condition_features(self, codes: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What conditions the diffusion decoder (NextFlow sec. 2.3).

        Returns:
            quantised semantic entries (B, semantic_dim, h, w), quantised pixel entries (B, pixel_dim, h, w), and the
            semantic decoder's features (B, D, h, w).
        """
        schedule = self.schedules.by_grid(grid)
        self._check_codes(codes, schedule)
        quantized = self.quantizer.decode(codes, schedule)
        semantic, pixel = quantized.split(self.quantizer.dims, dim=1)
        decoded = self.semantic_decoder(semantic)
        return semantic, pixel, to_map(decoded, schedule.final_grid).to(codes.device)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        correction: SelfCorrection | None = None,
        seed: int = 0,
        keys: Sequence[str | int] | None = None,
        keep_scales: Sequence[bool] | None = None,
        pixel_only: bool = False,
        codebook_loss: str = "tokenflow",
        **kwargs,
    ) -> NextFlowVQOutput:
        """Encode, quantise with a straight-through gradient, decode both branches.

        Args:
            pixel_values: (B, 3, H, W) in [-1, 1].
            keep_scales: which scales take part (random scale drop in training, NextFlow sec. 3.1).
            pixel_only: leave the semantic branch out, `semantic_features` too (the first stage of training).
            codebook_loss: `"tokenflow"` or `"var"`, which gradients and pairs the quantizer gives, see
                [`DualCodebookQuantizer.forward`].
        """
        schedule = self._schedule_of(pixel_values)
        features = self.features(pixel_values, pixel_only)
        quantization = self.quantizer.quantize(
            features, schedule, correction, seed, keys, keep_scales, pixel_only, codebook_loss
        )
        semantic, _ = quantization.quantized.split(self.quantizer.dims, dim=1)
        return NextFlowVQOutput(
            reconstruction=self._reconstruct(quantization.quantized, schedule),
            semantic_features=None if pixel_only else self.semantic_decoder(semantic).to(pixel_values.device),
            features=features,
            quantization=quantization,
        )

    def _reconstruct(self, quantized: torch.Tensor, schedule: ScaleSchedule) -> torch.Tensor:
        """(B, C, h, w) -> (B, 3, H, W), from the pixel half alone."""
        pixel = quantized[:, self.config.semantic_dim :]
        picture = resize_features(self.pixel_decoder(pixel), self.schedules.image_size(schedule))
        return picture.to(quantized.device)

    def _schedule_of(self, pixel_values: torch.Tensor) -> ScaleSchedule:
        if pixel_values.ndim != 4 or pixel_values.shape[1] != 3 or not len(pixel_values):
            raise ValueError(f"pixel_values must have the shape (B, 3, H, W), got {tuple(pixel_values.shape)}")
        if not pixel_values.is_floating_point():
            raise ValueError(f"pixel_values must be floats in [-1, 1], got {pixel_values.dtype}")
        return self.schedules.by_size(*pixel_values.shape[-2:])

    def _check_codes(self, codes: torch.Tensor, schedule: ScaleSchedule) -> None:
        check_integers("codes", codes, 2)
        if codes.shape[1] != schedule.num_codes:
            raise ValueError(
                f"codes of the grid {schedule.final_grid} must have the shape (B, {schedule.num_codes}), "
                f"got {tuple(codes.shape)}"
            )
        if not torch.compiler.is_exporting():  # a graph knows no values
            check_range("codes", codes, self.config.codebook_size)
