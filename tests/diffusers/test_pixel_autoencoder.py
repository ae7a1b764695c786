"""The cosine transform that stands where a pipeline wants a VAE."""

import pytest
import scipy.fft
import torch

pytest.importorskip("diffusers", reason="the diffusion decoder needs diffusers")

from diffusers_nextflow import PixelAutoencoder


def test_pixel_autoencoder_is_the_cosine_transform_of_patches(tmp_path):
    scales = [0.5 + index for index in range(16)]
    vae = PixelAutoencoder(frequency_scales=scales)
    pixels = torch.rand(2, 3, 8, 16) * 2 - 1
    latents = vae.encode(pixels).latents
    patch = scipy.fft.dctn(pixels[1, 2, 4:8, 12:16].numpy(), norm="ortho").flatten() / scales
    torch.testing.assert_close(latents[1, 32:, 1, 3], torch.from_numpy(patch), check_dtype=False)
    torch.testing.assert_close(vae.decode(latents).sample, pixels)
    assert vae.decode(3 * latents).sample.abs().max() == 1
    assert not any(parameter.requires_grad for parameter in vae.parameters())
    torch.testing.assert_close(PixelAutoencoder().encode(pixels).latents.norm(), pixels.norm())
    assert PixelAutoencoder().config.scaling_factor == 1
    small = PixelAutoencoder(block_out_channels=(3, 12), latent_channels=12, frequency_scales=scales[:4])
    small.save_pretrained(tmp_path)
    loaded = PixelAutoencoder.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.decode(loaded.encode(pixels)[0], return_dict=False)[0], pixels)
    torch.testing.assert_close(loaded.encode(pixels).latents, small.encode(pixels).latents, rtol=0, atol=0)


def test_pixel_autoencoder_names_what_does_not_fit():
    for channels in (12, 50):
        with pytest.raises(ValueError, match=rf"must be \[3, 12, 48\].*got \[3, 12, 48\] and {channels}"):
            PixelAutoencoder(latent_channels=channels)
    for scales in ([1.0] * 4, [1.0] * 17, [1.0] * 15 + [0.0]):
        with pytest.raises(ValueError, match=r"frequency_scales must be 16 positive numbers, got \[1"):
            PixelAutoencoder(frequency_scales=scales)
