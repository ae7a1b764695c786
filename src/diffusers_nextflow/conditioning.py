"""How codes reach a diffusion backbone: the conditioner, and what each backbone's first layer needs to read it.

The condition is concat(semantic entries, pixel entries, semantic decoder's features), (B, C, h, w) on the codes' final
grid (NextFlow sec. 2.3). All that is trained anew lives in the conditioner or in the widened columns of a UNet's
`conv_in`, and exactly one factor of it starts at zero: a fresh conditioner leaves the stock backbone as it is, and the
gradient reaches it from the first step on.

Shape suffixes: B batch, C condition channels, D width of the projected condition, h w grid, H W the backbone's own.
"""

from functools import cache

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from torch import nn

from transformers_nextflow import NextFlowVQConfig

BACKBONES = ("unet", "flux", "qwenimage")


class NextFlowConditioner(ModelMixin, ConfigMixin):
    """Projects the condition to what the backbone reads (NextFlow sec. 2.3 and 3.3).

    - `"unet"`: a linear projection to `width` channels on the grid of the latents, for a widened `conv_in`.
    - `"flux"`, `"qwenimage"`: an MLP into the tokens' width, added to embedded latents; its last layer starts at 0.

    A cell of the codes' grid covers several latents or tokens where it has more pixels: each gets the cell's
    projection. Open in the paper: the MLP's depth and activation, here Linear-GELU-Linear.

    Args:
        condition_dim: C, see [`condition_dim`].
        width: D; for a token backbone its own width.
        backbone: `"unet"`, `"flux"` or `"qwenimage"`.
        patch_size: pixels along the edge of one cell of the codes' grid.
        upscale: edge of the output as a multiple of the pictures that were coded: 1, or 2 for the second stage.
    """

    @register_to_config
    def __init__(self, condition_dim: int, width: int, backbone: str = "unet", patch_size: int = 16, upscale: int = 1):
        super().__init__()
        if backbone not in BACKBONES:
            raise ValueError(f"backbone must be one of {', '.join(BACKBONES)}, got {backbone!r}")
        if backbone == "unet":
            self.projection = nn.Linear(condition_dim, width)
        else:
            self.projection = nn.Sequential(
                nn.Linear(condition_dim, width), nn.GELU(approximate="tanh"), nn.Linear(width, width)
            )
            nn.init.zeros_(self.projection[-1].weight)
            nn.init.zeros_(self.projection[-1].bias)

    @classmethod
    def for_backbone(cls, vq_config: NextFlowVQConfig, backbone: nn.Module, upscale: int = 1) -> "NextFlowConditioner":
        """A fresh conditioner between a vision tokenizer and a UNet2DConditionModel, FluxTransformer2DModel or
        QwenImageTransformer2DModel."""
        name = backbone_name(backbone)
        width = backbone.config.block_out_channels[0] if name == "unet" else backbone.inner_dim
        return cls(condition_dim(vq_config), width, name, vq_config.patch_size, upscale)

    def cells(self, stride: int, upscale: int | None = None) -> int:
        """Latents or tokens along the edge of one cell.

        Args:
            stride: pixels along the edge of a latent or token.
            upscale: other than the configuration's.

        Raises:
            ValueError: if a cell is no whole number of them.
        """
        upscale = self.config.upscale if upscale is None else upscale
        if not isinstance(upscale, int) or upscale < 1:
            raise ValueError(f"upscale must be a positive whole number, got {upscale!r}")
        edge = self.config.patch_size * upscale
        if edge % stride:
            raise ValueError(
                f"a cell of the codes' grid is {edge} pixels wide in the output (patch_size {self.config.patch_size}, "
                f"upscale {upscale}), which must be a multiple of the {stride} pixels of a latent or token of "
                f"the {self.config.backbone} backbone"
            )
        return edge // stride

    def forward(self, features: torch.Tensor, cells: int = 1) -> torch.Tensor:
        """
        Args:
            features: (B, C, h, w).
            cells: latents or tokens along the edge of one cell, see [`cells`].

        Returns:
            With H = h * cells and W = w * cells: (B, D, H, W) for a UNet, (B, H * W, D), row-major, for tokens.
        """
        if features.ndim != 4 or features.shape[1] != self.config.condition_dim:
            raise ValueError(
                f"features must have the shape (B, {self.config.condition_dim}, h, w), got {tuple(features.shape)}"
            )
        hidden = self.projection(features.movedim(1, -1)).movedim(-1, 1)
        hidden = F.interpolate(hidden, scale_factor=cells, mode="nearest") if cells > 1 else hidden
        return hidden if self.config.backbone == "unet" else hidden.flatten(2).transpose(1, 2)


def condition_dim(vq_config: NextFlowVQConfig) -> int:
    """Channels of `torch.cat(vq_model.condition_features(codes, grid), dim=1)`."""
    return vq_config.code_dim + (vq_config.teacher_dim or vq_config.semantic_config.hidden_size)


def backbone_name(backbone: nn.Module) -> str:
    """Which of `BACKBONES` a diffusers model is."""
    if isinstance(backbone, UNet2DConditionModel):
        return "unet"
    for layer, name in (("x_embedder", "flux"), ("img_in", "qwenimage")):
        if isinstance(getattr(backbone, layer, None), nn.Module):
            return name
    raise ValueError(f"a decoder's backbone is a UNet, Flux or Qwen-Image, got {type(backbone).__name__}")


def widen_conv_in(unet: UNet2DConditionModel, latent_channels: int, width: int) -> None:
    """Let a stock UNet's `conv_in` read `width` more channels, in place; their weights start at zero.

    Does nothing to a UNet that was widened before.

    Raises:
        ValueError: if `conv_in` reads neither `latent_channels` nor `latent_channels + width` channels.
    """
    conv, found = unet.conv_in, unet.config.in_channels
    if found == latent_channels + width:
        return
    if found != latent_channels:
        raise ValueError(
            f"conv_in must read {latent_channels} latent channels, or {latent_channels + width} once it is widened "
            f"for a conditioner of width {width}, got {found}"
        )
    weight = conv.weight.new_zeros(len(conv.weight), latent_channels + width, *conv.kernel_size)
    weight[:, :latent_channels] = conv.weight.detach()
    conv.weight = nn.Parameter(weight, requires_grad=conv.weight.requires_grad)
    conv.in_channels = latent_channels + width
    unet.register_to_config(in_channels=latent_channels + width)


class ReadsCondition:
    """Of a linear layer: input channels beyond its own are added to its output.

    In `__call__`, as hooks that a backbone has already (layerwise casting, offload) hold its `forward`.
    """

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        if hidden.shape[-1] == self.in_features:
            return super().__call__(hidden)
        latents, condition = hidden.split([self.in_features, self.out_features], dim=-1)
        return super().__call__(latents) + condition


@cache
def _reading(layer_class: type) -> type:
    return type(f"{layer_class.__name__}ReadingCondition", (ReadsCondition, layer_class), {})


def read_condition(layer: nn.Linear) -> None:
    """Make a linear layer, quantised or not, a [`ReadsCondition`], in place.

    It gets no parameters and keeps their names, so that stock checkpoints and adapters load into it, and what it saves
    loads into the stock class.
    """
    if not isinstance(layer, ReadsCondition):
        layer.__class__ = _reading(type(layer))  # type: ignore[arg-type]
