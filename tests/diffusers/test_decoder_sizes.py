"""The paper's sizes, on the meta device: parameters and what the backbones read."""

import copy

import pytest
import torch

pytest.importorskip("diffusers", reason="the diffusion decoder needs diffusers")

from diffusers import FluxTransformer2DModel, QwenImageTransformer2DModel, UNet2DConditionModel

from diffusers_nextflow import NextFlowConditioner
from diffusers_nextflow.conditioning import read_condition, widen_conv_in
from transformers_nextflow import NextFlowVQConfig

VQ = NextFlowVQConfig()
CONDITION = 32 + 8 + 1152  # semantic entries, pixel entries, SigLIP2-so400m's features


def stable_diffusion_2_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=96,
        cross_attention_dim=1024,
        attention_head_dim=[5, 10, 20, 20],
        use_linear_projection=True,
    )


@pytest.fixture(scope="module", params=["unet", "flux", "qwenimage"])
def decoder(request):
    """Backbone and conditioner of a family."""
    with torch.device("meta"):
        backbone = {
            "unet": stable_diffusion_2_unet,
            "flux": lambda: FluxTransformer2DModel(guidance_embeds=True),
            "qwenimage": QwenImageTransformer2DModel,
        }[request.param]()
        return backbone, NextFlowConditioner.for_backbone(VQ, backbone)


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_parameters(decoder):
    backbone, conditioner = decoder
    stock, width, projection = {
        "unet": (865_910_724, 320, CONDITION * 320 + 320),
        "flux": (11_901_408_320, 3072, CONDITION * 3072 + 3072 + 3072 * 3072 + 3072),
        "qwenimage": (20_430_401_088, 3072, CONDITION * 3072 + 3072 + 3072 * 3072 + 3072),
    }[conditioner.config.backbone]
    assert count(backbone) == stock
    assert conditioner.config.width == width
    assert count(conditioner) == projection


def test_parameters_of_stable_diffusion_xl():
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=128,
            block_out_channels=[320, 640, 1280],
            down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            transformer_layers_per_block=[1, 2, 10],
            attention_head_dim=[5, 10, 20],
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
    assert count(unet) == 2_567_463_684
    assert NextFlowConditioner.for_backbone(VQ, unet).config.width == 320


@pytest.fixture(scope="module")
def first_layer(decoder):
    """What reads the condition, with the latents' channels that its stock layer reads."""
    backbone, conditioner = decoder
    if conditioner.config.backbone == "unet":
        unet = copy.deepcopy(backbone)
        widen_conv_in(unet, 4, 320)
        assert unet.config.in_channels == 324 and backbone.config.in_channels == 4
        with pytest.raises(ValueError, match="got 324"):
            widen_conv_in(unet, 4, 64)
        with pytest.raises(ValueError, match="conv_in must read 8 latent channels, or 328 once .* width 320, got 4"):
            widen_conv_in(backbone, 8, 320)
        return unet.conv_in, 4
    layer = copy.deepcopy(backbone.x_embedder if conditioner.config.backbone == "flux" else backbone.img_in)
    read_condition(layer)
    assert layer(torch.empty(1, 512, 64, device="meta")).shape == (1, 512, 3072)
    return layer, 64


@pytest.mark.parametrize("upscale", [1, 2])
@pytest.mark.parametrize("level", ["256", "512", "1024"])
def test_what_the_backbone_reads(decoder, first_layer, level, upscale):
    """At every grid of the level that is no square."""
    _, conditioner = decoder
    layer, channels = first_layer
    table = VQ.schedule_table()
    schedules = [s for s in table.of_level(level) if s.final_grid[0] != s.final_grid[1]]
    assert len(schedules) == 40
    for schedule in schedules:
        height, width = (length * upscale for length in table.image_size(schedule))
        features = torch.empty(2, CONDITION, *schedule.final_grid, device="meta")
        if conditioner.config.backbone == "unet":
            condition = conditioner(features, conditioner.cells(8, upscale))
            latents = torch.empty(2, channels, height // 8, width // 8, device="meta")
            read, tokens = torch.cat([latents, condition], dim=1), (2, 320, height // 8, width // 8)
            assert read.shape == (2, 4 + 320, height // 8, width // 8)
        else:
            condition = conditioner(features, conditioner.cells(16, upscale))
            latents = torch.empty(2, (height // 16) * (width // 16), channels, device="meta")
            read, tokens = torch.cat([latents, condition], dim=-1), (2, (height // 16) * (width // 16), 3072)
            assert read.shape == (*tokens[:2], 64 + 3072)
        assert layer(read).shape == tokens


@pytest.mark.parametrize("stride", [7, 12, 32])
def test_cells_of_no_whole_number_of_latents(stride):
    with pytest.raises(ValueError, match=f"16 pixels wide .* multiple of the {stride} pixels"):
        NextFlowConditioner(4, 4, patch_size=16).cells(stride)
    assert NextFlowConditioner(4, 4).cells(16) == 1
    if stride == 32:
        assert NextFlowConditioner(4, 4, patch_size=16).cells(stride, upscale=2) == 1


def test_rows_of_tokens_follow_the_grid():
    """Cell (row, column) reaches the tokens it covers, row-major."""
    conditioner = NextFlowConditioner(1, 2, "flux")
    with torch.no_grad():
        conditioner.projection[0].weight.fill_(1)
        conditioner.projection[0].bias.zero_()
        conditioner.projection[2].weight.copy_(torch.eye(2))
    features = torch.arange(6.0).view(1, 1, 2, 3) * 100  # far from zero, GELU is the identity
    tokens = conditioner(features, cells=2)
    expected = [row // 2 * 3 + column // 2 for row in range(4) for column in range(6)]
    assert tokens[0, :, 0].tolist() == [100 * cell for cell in expected]
    assert conditioner(features)[0, :, 0].tolist() == [100 * cell for cell in range(6)]
    for shape in ((2, 1, 3), (1, 1, 2, 3, 1), (1, 2, 2, 3)):
        with pytest.raises(ValueError, match=r"features must have the shape \(B, 1, h, w\)"):
            conditioner(torch.zeros(shape))
