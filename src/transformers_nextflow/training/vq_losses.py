"""Losses of the vision tokenizer (NextFlow sec. 3.1; forms are TokenFlow's, commit 9812da0 of its repository)."""

import torch
import torch.nn.functional as F
from torch import nn

from ..quantizer import QuantizerOutput


def codebook_losses(quantization: QuantizerOutput, channels: slice = slice(None)) -> tuple[torch.Tensor, torch.Tensor]:
    """How far entries are from what they stand for: mean over the scales that took part of the mean square.

    Args:
        channels: which channels count.

    Returns:
        The codebook's loss, whose gradient moves entries alone, and the commitment, which moves features alone.
    """
    pairs = [(given[:, channels], meant[:, channels]) for given, meant in quantization.pairs]
    codebook = sum(F.mse_loss(given, meant.detach()) for given, meant in pairs)
    commitment = sum(F.mse_loss(meant, given.detach()) for given, meant in pairs)
    return codebook / len(pairs), commitment / len(pairs)


def distillation_loss(estimate: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """One minus the cosine between (B, N, D) features and the teacher's."""
    return 1 - F.cosine_similarity(estimate.float(), target.float(), dim=-1).mean()


def adversarial_loss(fake: torch.Tensor) -> torch.Tensor:
    """The tokenizer's side of the hinge loss: patch scores of its pictures should be high."""
    return -fake.float().mean()


def discriminator_loss(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """Hinge loss of patch scores: real ones above 1, fake ones below -1."""
    return 0.5 * (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean())


def adaptive_weight(reconstruction: torch.Tensor, adversarial: torch.Tensor, last_layer: torch.Tensor) -> torch.Tensor:
    """VQGAN's weight of the adversarial loss: the two losses then move the decoder's last layer equally far.

    Args:
        reconstruction, adversarial: scalar losses whose graphs are kept.
        last_layer: parameter of the decoder.
    """
    (of_reconstruction,) = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
    (of_adversarial,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    return (of_reconstruction.norm() / (of_adversarial.norm() + 1e-4)).clamp(max=1e4)


class PatchDiscriminator(nn.Module):
    """PatchGAN: (B, 3, H, W) -> (B, 1, about H/8, about W/8), a score for each patch; begins as pix2pix' does.

    Differs from pix2pix' and TokenFlow's: group norm in place of batch norm, so that a score depends neither on the
    other pictures of a batch nor on the number of devices.
    """

    def __init__(self, channels: int = 64, layers: int = 3):
        super().__init__()
        widths = [channels * min(2**layer, 8) for layer in range(layers + 1)]
        blocks = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for layer, (narrow, wide) in enumerate(zip(widths, widths[1:]), start=1):
            stride = 2 if layer < layers else 1
            blocks += [nn.Conv2d(narrow, wide, 4, stride, padding=1, bias=False), nn.GroupNorm(min(32, wide), wide)]
            blocks.append(nn.LeakyReLU(0.2))
        self.layers = nn.Sequential(*blocks, nn.Conv2d(widths[-1], 1, 4, padding=1))
        for layer in self.layers:
            if isinstance(layer, (nn.Conv2d, nn.GroupNorm)):
                nn.init.normal_(layer.weight, mean=float(isinstance(layer, nn.GroupNorm)), std=0.02)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.layers(pixel_values)
