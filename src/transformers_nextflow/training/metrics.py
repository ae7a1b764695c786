"""How near pictures are to those they are made of: PSNR, SSIM, LPIPS. Pictures are (B, 3, H, W) in [-1, 1]."""

import torch
import torch.nn.functional as F
from torch import nn

RANGE = 2.0  # of pixels
WINDOW, DEVIATION = 11, 1.5  # of SSIM's Gaussian
K1, K2 = 0.01, 0.03  # of SSIM


def psnr(rebuilt: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
    """(B,) peak signal-to-noise ratios in dB."""
    errors_B = (rebuilt.double() - pixel_values).square().flatten(1).mean(1)
    return 10 * torch.log10(RANGE**2 / errors_B)


def ssim(rebuilt: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
    """(B,) structural similarities, as Wang et al. (2004) define them: a Gaussian window of 11 pixels and deviation
    1.5, wherever it fits whole, over intensities from 0, black, on; the mean over places and colours. In smaller
    pictures the window is as large as fits.
    """
    edge = min(WINDOW, *((length - 1) // 2 * 2 + 1 for length in pixel_values.shape[-2:]))
    places = torch.arange(edge, dtype=torch.float64, device=pixel_values.device) - edge // 2
    line = torch.exp(-((places / DEVIATION) ** 2) / 2)
    window = (line[:, None] * line / line.sum() ** 2).expand(3, 1, edge, edge)

    def mean(values: torch.Tensor) -> torch.Tensor:
        return F.conv2d(values, window, groups=3)

    a, b = rebuilt.double() + RANGE / 2, pixel_values.double() + RANGE / 2
    mean_a, mean_b = mean(a), mean(b)
    variance_a, variance_b = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2
    covariance = mean(a * b) - mean_a * mean_b
    c1, c2 = (K1 * RANGE) ** 2, (K2 * RANGE) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (variance_a + variance_b + c2)
    return (luminance * structure).flatten(1).mean(1)


def lpips() -> nn.Module:
    """The package's VGG, a network of two pictures whose output is their distance; its weights are downloaded.

    Raises:
        ImportError: without the package.
    """
    try:
        from lpips import LPIPS
    except ImportError as error:
        raise ImportError(
            "the perceptual loss needs the package lpips (`pip install 'transformers-nextflow[lpips]'`), a "
            "network given as `perceptual`, or perceptual_weight=0"
        ) from error
    return LPIPS(net="vgg", verbose=False)
