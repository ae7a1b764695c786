"""An autoencoder for diffusion on pixels, where diffusers' pipelines want one for latents."""

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import nn


class PixelAutoencoder(ModelMixin, ConfigMixin):
    """Its latents are the pixels, those of a square patch as the channels of one latent; exact and never trained.

    In place of a pipeline's VAE it makes a small backbone a pixel diffusion model.

    Args:
        block_out_channels: `(3, 12, 48, ...)`, four times as many at every halving of the edge; diffusers' pipelines
            read the size of a latent, `2 ** (len(block_out_channels) - 1)` pixels, off its length.
        latent_channels: the last of them.
        scaling_factor: of latents, read by the pipelines.

    Raises:
        ValueError: for other channels.
    """

    @register_to_config
    def __init__(
        self,
        block_out_channels: tuple[int, ...] = (3, 12, 48),
        latent_channels: int = 48,
        scaling_factor: float = 1.0,
    ):
        super().__init__()
        expected = [3 * 4**level for level in range(len(block_out_channels))]
        if list(block_out_channels) != expected or latent_channels != expected[-1]:
            raise ValueError(
                f"block_out_channels must be {expected} and latent_channels their last, got "
                f"{list(block_out_channels)} and {latent_channels}"
            )
        edge = 2 ** (len(block_out_channels) - 1)
        # with a parameter, a device and a dtype are the library's own matter
        weight = torch.eye(latent_channels).view(latent_channels, 3, edge, edge)
        self.patches = nn.Conv2d(3, latent_channels, edge, edge, bias=False)
        self.patches.weight = nn.Parameter(weight, requires_grad=False)

    def encode(self, pixels: torch.Tensor, return_dict: bool = True) -> AutoencoderTinyOutput | tuple:
        """(B, 3, H, W) in [-1, 1] -> `latents` (B, latent_channels, H / edge, W / edge)."""
        latents = self.patches(pixels)
        return AutoencoderTinyOutput(latents) if return_dict else (latents,)

    def decode(self, latents: torch.Tensor, generator=None, return_dict: bool = True) -> DecoderOutput | tuple:
        """The inverse, clamped to [-1, 1]."""
        edge = self.patches.stride
        pixels = nn.functional.conv_transpose2d(latents, self.patches.weight, stride=edge).clamp(-1, 1)
        return DecoderOutput(pixels) if return_dict else (pixels,)
