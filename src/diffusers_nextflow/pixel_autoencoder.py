"""An autoencoder for diffusion on pixels, where diffusers' pipelines want one for latents."""

import math
from collections.abc import Sequence

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import nn


class PixelAutoencoder(ModelMixin, ConfigMixin):
    """Its latents are the cosine transforms (DCT-II) of square patches; invertible and never trained.

    In place of a pipeline's VAE it makes a small backbone a pixel diffusion model. Pictures are smooth nearly
    everywhere: as frequencies, most channels are near 0 there, where as pixels each would carry an error of its own.

    Args:
        block_out_channels: `(3, 12, 48, ...)`, four times as many at every halving of the edge; diffusers' pipelines
            read the size of a latent, `2 ** (len(block_out_channels) - 1)` pixels, off its length.
        latent_channels: the last of them: of red, green and blue each the frequencies, row by row.
        frequency_scales: what the coefficient of each frequency is divided by; `None` is 1 throughout, the orthonormal
            transform.
        scaling_factor: of latents, read by the pipelines.

    Raises:
        ValueError: for other channels, and for scales that are not as many as the frequencies, or not positive.
    """

    @register_to_config
    def __init__(
        self,
        block_out_channels: tuple[int, ...] = (3, 12, 48),
        latent_channels: int = 48,
        frequency_scales: Sequence[float] | None = None,
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
        scales = torch.ones(edge**2) if frequency_scales is None else torch.tensor(list(frequency_scales))
        if len(scales) != edge**2 or not (scales > 0).all():
            raise ValueError(f"frequency_scales must be {edge**2} positive numbers, got {frequency_scales}")
        patterns = cosines(edge)
        # with parameters, a device and a dtype are the library's own matter
        self.to_frequencies = self._of_colours(patterns / scales[:, None, None])
        self.to_pixels = self._of_colours(patterns * scales[:, None, None])

    @staticmethod
    def _of_colours(patterns: torch.Tensor) -> nn.Parameter:
        """(frequencies, edge, edge) -> (3 * frequencies, 1, edge, edge), a group of channels for each colour."""
        return nn.Parameter(patterns.repeat(3, 1, 1)[:, None], requires_grad=False)

    def encode(self, pixels: torch.Tensor, return_dict: bool = True) -> AutoencoderTinyOutput | tuple:
        """(B, 3, H, W) in [-1, 1] -> `latents` (B, latent_channels, H / edge, W / edge)."""
        latents = nn.functional.conv2d(pixels, self.to_frequencies, stride=self.to_frequencies.shape[-1], groups=3)
        return AutoencoderTinyOutput(latents) if return_dict else (latents,)

    def decode(self, latents: torch.Tensor, generator=None, return_dict: bool = True) -> DecoderOutput | tuple:
        """The inverse, clamped to [-1, 1]."""
        pixels = nn.functional.conv_transpose2d(latents, self.to_pixels, stride=self.to_pixels.shape[-1], groups=3)
        pixels = pixels.clamp(-1, 1)
        return DecoderOutput(pixels) if return_dict else (pixels,)


def cosines(edge: int) -> torch.Tensor:
    """(edge ** 2, edge, edge): the orthonormal patterns of the two-dimensional DCT-II, vertical frequency first."""
    places = torch.arange(edge, dtype=torch.float64)
    waves = torch.cos(math.pi / edge * places[:, None] * (places + 0.5)) * math.sqrt(2 / edge)
    waves[0] /= math.sqrt(2)
    return torch.einsum("uy, vx -> uvyx", waves, waves).flatten(0, 1).float()
