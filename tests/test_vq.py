"""The vision tokenizer: shapes, agreement between its paths, gradients, saving, and errors."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil, convert_image_to_patches

from transformers_nextflow.configuration_nextflow import NextFlowVQConfig
from transformers_nextflow.modeling_nextflow_vq import NextFlowVQModel, patchify, unpatchify
from transformers_nextflow.quantizer import SelfCorrection

PATCH = 8
SQUARE, WIDE = (4, 4), (3, 6)  # final grids
GRIDS = pytest.mark.parametrize("grid", [SQUARE, WIDE], ids=["square", "wide"])


def tiny_config(**overrides) -> NextFlowVQConfig:
    values = {
        "semantic_config": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "patch_size": PATCH,
            "num_patches": 16,
            "vision_use_head": False,
        },
        "semantic_decoder_layers": 1,
        "semantic_dim": 8,
        "pixel_dim": 4,
        "codebook_size": 64,
        "patch_size": PATCH,
        "stem_stride": 2,
        "base_channels": 8,
        "channel_multipliers": [1, 2, 2],
        "latent_channels": 16,
        "encoder_blocks": 1,
        "decoder_blocks": 2,
        "scale_schedules": [[[1, 1], [2, 2], [4, 4]], [[1, 1], [1, 2], [3, 6]]],
        "levels": {"32": 3},
    }
    return NextFlowVQConfig(**{**values, **overrides})


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = NextFlowVQModel(tiny_config()).eval()
    with torch.no_grad():  # at initialisation features are so small that every picture gets the same codes
        model.semantic_to_code[-1].weight.mul_(50)
        model.pixel_encoder.to_code.weight.mul_(50)
    return model


def pictures(grid, batch: int = 3, seed: int = 0) -> torch.Tensor:
    """(B, 3, H, W) in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.rand(batch, 3, PATCH * grid[0], PATCH * grid[1], generator=generator) - 1


@GRIDS
def test_encode_and_decode_shapes_and_ranges(model, grid):
    codes = model.encode(pictures(grid))
    assert codes.shape == (3, model.schedules.by_grid(grid).num_codes)
    assert codes.dtype == torch.int64
    assert 0 <= codes.min() and codes.max() < model.config.codebook_size
    assert len(codes.unique()) > 8 and not torch.equal(codes[0], codes[1])
    decoded = model.decode(codes, grid)
    assert decoded.shape == (3, 3, PATCH * grid[0], PATCH * grid[1])
    assert decoded.dtype == torch.float32
    assert -1 <= decoded.min() and decoded.max() <= 1 and decoded.std() > 0


@GRIDS
def test_encode_ignores_autocast(model, grid):
    plain = model.encode(pictures(grid, batch=8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model.encode(pictures(grid, batch=8)), plain)


def test_many_pictures_are_coded_some_at_a_time(model, monkeypatch):
    source, batches = pictures((4, 4), batch=5), []
    count = lambda module, args: batches.append(len(args[0]))  # noqa: E731
    parts = (model.pixel_encoder, model.pixel_decoder)
    handles = [part.register_forward_pre_hook(count) for part in parts]
    correction = {"correction": SelfCorrection(), "seed": 1, "keys": "abcde"}
    codes, corrected = model.encode(source), model.encode(source, **correction)
    decoded = model.decode(codes, (4, 4))
    monkeypatch.setattr("transformers_nextflow.modeling_nextflow_vq.PIXELS_AT_ONCE", 2 * source[0, 0].numel())
    assert batches == [5, 5, 5]
    assert torch.equal(model.encode(source), codes)
    assert all(map(torch.equal, model.encode(source, **correction), corrected))
    torch.testing.assert_close(model.decode(codes, (4, 4)), decoded, rtol=0, atol=1e-5)
    assert batches[3:] == [2, 2, 1] * 3
    for handle in handles:
        handle.remove()


@GRIDS
def test_a_batch_is_each_image_alone(model, grid):
    source = pictures(grid)
    correction = SelfCorrection()
    codes = model.encode(source)
    inputs, targets = model.encode(source, correction, seed=1, keys="abc")
    assert not torch.equal(inputs, targets)
    for i, key in enumerate("abc"):
        assert torch.equal(model.encode(source[i : i + 1])[0], codes[i])
        alone = model.encode(source[i : i + 1], correction, seed=1, keys=[key])
        assert torch.equal(alone[0][0], inputs[i]) and torch.equal(alone[1][0], targets[i])


@GRIDS
def test_unpatchify_inverts_patchify(grid):
    source = pictures(grid)
    patches = patchify(source, PATCH)
    assert patches.shape == (3, grid[0] * grid[1], 3 * PATCH * PATCH)
    assert torch.equal(unpatchify(patches, grid, PATCH), source)


@GRIDS
def test_patches_are_in_siglips_order(grid):
    source = pictures(grid, batch=1)
    expected = convert_image_to_patches(source[0].numpy(), PATCH)
    assert np.array_equal(patchify(source, PATCH)[0].numpy(), expected)


@GRIDS
def test_patches_are_those_of_siglips_image_processor(grid):
    height, width = PATCH * grid[0], PATCH * grid[1]
    array = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    processor = Siglip2ImageProcessorPil(patch_size=PATCH, max_num_patches=grid[0] * grid[1])
    output = processor(Image.fromarray(array), return_tensors="pt")
    assert output["spatial_shapes"].tolist() == [list(grid)]
    pixel_values = torch.from_numpy(array).permute(2, 0, 1)[None] / 127.5 - 1
    torch.testing.assert_close(patchify(pixel_values, PATCH), output["pixel_values"])


def test_save_and_load(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = NextFlowVQModel.from_pretrained(tmp_path)
    assert loaded.config.scale_schedules == model.config.scale_schedules
    assert loaded.config.levels == model.config.levels
    assert not loaded.training
    for grid in (SQUARE, WIDE):
        codes = model.encode(pictures(grid))
        assert torch.equal(loaded.encode(pictures(grid)), codes)
        assert torch.equal(loaded.decode(codes, grid), model.decode(codes, grid))
        for ours, theirs in zip(model.condition_features(codes, grid), loaded.condition_features(codes, grid)):
            assert torch.equal(ours, theirs)


def test_training_after_inference_mode(model):
    """Nothing that is kept for a size was made in inference mode."""
    with torch.inference_mode():
        model.decode(model.encode(pictures(WIDE)), WIDE)
    output = model(pictures(WIDE))
    (output.reconstruction.sum() + output.semantic_features.sum()).backward()
    model.zero_grad()


@GRIDS
def test_gradients_pass_straight_through_to_both_encoders(model, grid):
    model.zero_grad()
    output = model(pictures(grid))
    assert output.reconstruction.shape == (3, 3, PATCH * grid[0], PATCH * grid[1])
    assert output.semantic_features.shape == (3, grid[0] * grid[1], 32)
    loss = output.reconstruction.square().sum()
    loss.backward(retain_graph=True)
    assert _has_gradient(model.pixel_encoder) and not _has_gradient(model.semantic_encoder)
    model.zero_grad()
    output.semantic_features.square().sum().backward()
    assert _has_gradient(model.semantic_encoder) and not _has_gradient(model.pixel_encoder)
    model.zero_grad()


def _has_gradient(module: torch.nn.Module) -> bool:
    return any(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in module.parameters())


def test_vars_straight_through_gradient_is_the_decoders_own(model):
    """d(loss)/d(features) equals d(loss)/d(quantised), as if nothing had been rounded."""
    output = model(pictures(SQUARE), codebook_loss="var")
    features_gradient = torch.autograd.grad(output.reconstruction.square().sum(), output.features)[0]
    quantized = output.quantization.quantized.detach().requires_grad_()
    reconstruction = model.pixel_decoder(quantized[:, model.config.semantic_dim :])
    torch.testing.assert_close(output.reconstruction, reconstruction)
    expected = torch.autograd.grad(reconstruction.square().sum(), quantized)[0]
    assert (features_gradient - expected).abs().max() < 1e-4 * expected.abs().max()


@GRIDS
def test_forward_agrees_with_encode_and_decode(model, grid):
    with torch.no_grad():
        output = model(pictures(grid))
    codes = model.encode(pictures(grid))
    assert torch.equal(output.quantization.target_codes, codes)
    torch.testing.assert_close(output.reconstruction.clamp(-1, 1), model.decode(codes, grid))
    _, _, decoded = model.condition_features(codes, grid)
    torch.testing.assert_close(output.semantic_features, decoded.flatten(2).transpose(1, 2))


@GRIDS
def test_a_prefix_of_all_scales_is_the_whole_picture(model, grid):
    codes = model.encode(pictures(grid))
    whole = model.decode(codes, grid)
    assert torch.equal(model.decode_prefix(codes, grid, 3), whole)
    coarse = model.decode_prefix(codes, grid, 2)
    assert coarse.shape == whole.shape and not torch.equal(coarse, whole)
    length = model.schedules.by_grid(grid).prefix(2).num_codes
    changed = codes.clone()
    changed[:, length:] = 0
    assert torch.equal(model.decode_prefix(changed, grid, 2), coarse)  # finer codes are not read


@GRIDS
def test_condition_features(model, grid):
    codes = model.encode(pictures(grid))
    semantic, pixel, decoded = model.condition_features(codes, grid)
    assert semantic.shape == (3, 8, *grid) and pixel.shape == (3, 4, *grid) and decoded.shape == (3, 32, *grid)
    quantized = model.quantizer.decode(codes, model.schedules.by_grid(grid))
    assert torch.equal(torch.cat([semantic, pixel], 1), quantized)


def test_the_pixel_decoder_reads_the_pixel_half_alone(model):
    codes = model.encode(pictures(SQUARE))
    before = model.decode(codes, SQUARE)
    table = model.quantizer.semantic_codebook
    kept = table.detach().clone()
    with torch.no_grad():
        table.copy_(kept.flip(0))
        assert torch.equal(model.decode(codes, SQUARE), before)
        table.copy_(kept)


@pytest.mark.parametrize("shape", [(1, 1, 32, 32), (3, 32, 32), (0, 3, 32, 32), (1, 3, 1, 32, 32), (1, 4, 32, 32)])
def test_wrong_channels_are_refused(model, shape):
    with pytest.raises(ValueError, match=r"must have the shape \(B, 3, H, W\), got"):
        model.encode(torch.zeros(shape))


def test_pixels_that_are_no_numbers_of_the_range_are_refused(model):
    with pytest.raises(ValueError, match=r"must be floats in \[-1, 1\], got torch.uint8"):
        model.encode(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(ValueError, match="not finite"):
        model.encode(torch.full((1, 3, 32, 32), torch.nan))


@pytest.mark.parametrize("size", [(32, 40), (33, 32)])
def test_unreachable_sizes_name_the_nearest(model, size):
    with pytest.raises(ValueError, match=f"{size[0]}x{size[1]} .*nearest: 32x32"):
        model.encode(torch.zeros(1, 3, *size))


def test_wrong_codes_are_refused(model):
    codes = model.encode(pictures(SQUARE))  # 1 + 4 + 16
    for call in (model.decode, model.condition_features):
        with pytest.raises(ValueError, match=r"grid \(4, 4\) must have the shape \(B, 21\), got \(3, 20\)"):
            call(codes[:, :-1], SQUARE)
        with pytest.raises(ValueError, match=r"must lie in \[0, 64\), got -1 to"):
            call(torch.where(codes == codes.min(), -1, codes), SQUARE)
        with pytest.raises(ValueError, match=r"must lie in \[0, 64\), got \d+ to 64"):
            call(torch.where(codes == codes.max(), 64, codes), SQUARE)
        with pytest.raises(ValueError, match=r"ends in the grid \(4, 5\); nearest: \(4, 4\)"):
            call(codes, (4, 5))
        with pytest.raises(ValueError, match="codes must hold int64 in 2 dimensions, got torch.uint8"):
            call(codes.byte(), SQUARE)
    with pytest.raises(ValueError, match="between 1 and 3, got 4"):
        model.decode_prefix(codes, SQUARE, 4)


def test_configurations_whose_branches_disagree_are_refused():
    with pytest.raises(ValueError, match="downsample by 4, but patch_size is 8"):
        tiny_config(stem_stride=1)
    with pytest.raises(ValueError, match="semantic patch_size 8, pixel patch_size 16"):
        tiny_config(stem_stride=4, patch_size=16)


def test_full_size_model_builds():
    with torch.device("meta"):
        model = NextFlowVQModel(NextFlowVQConfig())
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    assert len(model.schedules) == 123
    assert parts == {
        "semantic_encoder": 412_649_712,
        "semantic_to_code": 1_365_152,
        "pixel_encoder": 17_753_608,
        "quantizer": 1_310_720,  # 32,768 entries of 32 + 8 channels
        "semantic_decoder": 48_710_256,
        "pixel_decoder": 52_880_003,
    }
    assert model.num_parameters() == 534_669_451
