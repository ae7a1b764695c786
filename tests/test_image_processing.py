"""Pictures of every kind to patches, and back."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

from transformers_nextflow import NextFlowImageProcessor
from transformers_nextflow.modeling_nextflow_vq import patchify, unpatchify

SIZES = [(24, 24), (16, 32), (32, 16)]  # (height, width) of the tiny schedules
P = 8


@pytest.fixture
def processor(tiny_processor) -> NextFlowImageProcessor:
    return tiny_processor.image_processor


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def pixels_of(processor, image, **kwargs) -> torch.Tensor:
    """(3, H, W) in [-1, 1], what the model will see of one picture."""
    inputs = processor(image, return_tensors="pt", **kwargs)
    return unpatchify(inputs["pixel_values"][None], inputs["image_grid_hw"][0].tolist(), P)[0]


def eight_bits(pixels: torch.Tensor) -> np.ndarray:
    """(H, W, 3) uint8."""
    return ((pixels.permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()


@pytest.mark.parametrize("size", SIZES)
def test_picture_of_a_schedules_size_passes_bit_exactly(processor, size):
    picture = noise(*size)
    inputs = processor(Image.fromarray(picture), return_tensors="pt")
    expected = ((torch.from_numpy(picture).double() / 255 - 0.5) / 0.5).float().permute(2, 0, 1)
    assert torch.equal(inputs["pixel_values"], patchify(expected[None], P)[0])
    assert inputs["image_grid_hw"].tolist() == [[size[0] // P, size[1] // P]]
    assert inputs["pixel_values"].dtype == torch.float32
    assert inputs["image_grid_hw"].dtype == torch.int64


def test_every_byte_value_survives_postprocess(processor):
    picture = np.arange(24 * 24 * 3, dtype=np.int64).reshape(24, 24, 3).astype(np.uint8)
    pixels = pixels_of(processor, picture)
    assert pixels.min() == -1 and pixels.max() == 1
    (restored,) = processor.postprocess(pixels[None])
    assert restored.mode == "RGB"
    assert np.array_equal(np.asarray(restored), picture)


def test_postprocess_clamps_and_rejects_other_shapes(processor):
    (picture,) = processor.postprocess(torch.tensor([-3.0, 0.0, 3.0]).view(1, 3, 1, 1) + 0.001)
    assert picture.getpixel((0, 0)) == (0, 128, 255)
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\), got \(3, 8, 8\)"):
        processor.postprocess(torch.zeros(3, 8, 8))
    with pytest.raises(ValueError, match="pixel_values are not finite"):
        processor.postprocess(torch.tensor([0.0, float("inf"), 0.0]).view(1, 3, 1, 1))


def test_pictures_of_several_sizes_and_arrays_are_postprocessed_each(processor):
    pixels = [torch.rand(3, 8, 16) * 2 - 1, torch.rand(3, 16, 8) * 2 - 1]
    alone = [processor.postprocess(each[None])[0] for each in pixels]
    for given in (pixels, [each.numpy() for each in pixels]):
        assert [picture.size for picture in processor.postprocess(given)] == [(16, 8), (8, 16)]
        assert all(map(np.array_equal, processor.postprocess(given), alone))
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\), got \(1, 8, 8\)"):
        processor.postprocess([pixels[0], torch.zeros(1, 8, 8)])


def test_sides_are_cropped_not_squeezed(processor):
    wide, tall = noise(24, 30), noise(30, 24)
    assert np.array_equal(eight_bits(pixels_of(processor, wide)), wide[:, 3:27])
    assert np.array_equal(eight_bits(pixels_of(processor, tall)), tall[3:27])


def test_scaling_keeps_the_aspect_ratio(processor):
    disc = np.hypot(*np.mgrid[-59.5:60, -79.5:80]) < 40  # a white disc on 120 x 160
    seen = eight_bits(pixels_of(processor, np.uint8(disc[..., None] * [255, 255, 255])))[..., 0] > 127
    assert seen.any(axis=0).sum() == seen.any(axis=1).sum() == 24 * 80 // 120


@pytest.mark.parametrize(
    "size, grid", [((100, 210), (2, 4)), ((210, 100), (4, 2)), ((90, 100), (3, 3)), ((1, 40), (2, 4))]
)
def test_nearest_aspect_ratio_decides(processor, size, grid):
    inputs = processor(Image.fromarray(noise(*size)))
    assert tuple(inputs["image_grid_hw"][0]) == grid
    assert len(inputs["pixel_values"]) == grid[0] * grid[1]
    assert processor.get_number_of_image_patches(*size) == grid[0] * grid[1]


def test_orientation_tag_is_applied(processor, tmp_path):
    upright = Image.fromarray(noise(16, 32))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    upright.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    expected = pixels_of(processor, upright)
    for turned in (Image.open(tmp_path / "turned.png"), tmp_path / "turned.png", str(tmp_path / "turned.png")):
        assert torch.equal(pixels_of(processor, turned), expected)


def test_transparency_shows_white(processor, tmp_path):
    picture = noise(24, 24, 4)
    picture[:8, :, 3], picture[8:16, :, 3], picture[16:, :, 3] = 0, 255, 51
    picture[16:, :, :3] = 100
    Image.fromarray(picture).save(tmp_path / "transparent.png")
    inputs = (Image.fromarray(picture), picture, torch.from_numpy(picture), tmp_path / "transparent.png")
    for image in inputs:
        seen = eight_bits(pixels_of(processor, image))
        assert (seen[:8] == 255).all()
        assert np.array_equal(seen[8:16], picture[8:16, :, :3])
        assert (seen[16:] == 224).all()  # 0.2 * 100 + 0.8 * 255
    floats = pixels_of(processor, picture / np.float32(255), do_rescale=False)
    assert torch.allclose(floats, pixels_of(processor, picture), atol=1.01 / 127.5)


def test_palette_with_a_transparent_colour(processor):
    picture = Image.new("P", (24, 24), 0)
    picture.putpalette([255, 0, 0, 0, 0, 255])
    picture.paste(1, (0, 0, 24, 12))
    assert (eight_bits(pixels_of(processor, picture))[12:] == (255, 0, 0)).all()
    picture.info["transparency"] = 0
    seen = eight_bits(pixels_of(processor, picture))
    assert (seen[:12] == (0, 0, 255)).all()
    assert (seen[12:] == 255).all()


def test_modes_of_one_grey_agree(processor, tmp_path):
    grey = noise(24, 24, 1)[..., 0]
    expected = pixels_of(processor, np.repeat(grey[..., None], 3, axis=-1))
    wide = grey.astype(np.uint16) * 257
    Image.fromarray(wide).save(tmp_path / "wide.png")
    same = {
        "L": Image.fromarray(grey),
        "LA": Image.fromarray(grey).convert("LA"),
        "RGB": Image.fromarray(grey).convert("RGB"),
        "RGBA": Image.fromarray(grey).convert("RGBA"),
        "I;16": Image.fromarray(wide),
        "I": Image.fromarray(wide.astype(np.int32)),
        "16-bit file": tmp_path / "wide.png",
        "(H, W)": grey,
        "(1, H, W)": grey[None],
        "(H, W, 1) int64": grey[..., None].astype(np.int64),
        "uint16": wide,
        "float 255": grey.astype(np.float64),
    }
    for name, image in same.items():
        assert torch.allclose(pixels_of(processor, image), expected, atol=1e-6), name
    bilevel = Image.fromarray(grey).convert("1")
    assert torch.equal(pixels_of(processor, bilevel), pixels_of(processor, np.asarray(bilevel)))


def test_sixteen_bits_keep_their_precision(processor):
    ramp = np.arange(30_000, 30_000 + 576, dtype=np.uint16).reshape(24, 24)
    expected = torch.from_numpy(ramp.astype(np.float64) / 65535 * 2 - 1).float()
    assert torch.allclose(pixels_of(processor, Image.fromarray(ramp))[0], expected, atol=1e-6)


def test_cmyk(processor):
    cmyk = Image.new("CMYK", (24, 24), (255, 255, 0, 0))
    assert (eight_bits(pixels_of(processor, cmyk)) == (0, 0, 255)).all()


@pytest.mark.parametrize("size", [(24, 24), (50, 70)])
def test_array_types_and_layouts_agree(processor, size):
    picture = noise(*size) // 2 + 64  # resampling stays inside [0, 255]
    expected = pixels_of(processor, Image.fromarray(picture))
    first = np.ascontiguousarray(picture.transpose(2, 0, 1))
    for image in (picture, first, torch.from_numpy(picture), torch.from_numpy(first), [picture], picture[None]):
        assert torch.equal(pixels_of(processor, image), expected)
    for image in (first / 255, torch.from_numpy(first / np.float32(255))):
        floats = pixels_of(processor, image, do_rescale=False)
        assert torch.allclose(floats, expected, atol=1e-6 if size == (24, 24) else 1.5 / 127.5)
        assert floats.abs().max() <= 1


def test_batch_is_its_pictures_in_order_flat_or_nested(processor):
    pictures = [Image.fromarray(noise(h, w, seed=h)) for h, w in ((24, 24), (16, 32), (90, 100), (32, 16))]
    alone = [processor(picture, return_tensors="pt") for picture in pictures]
    for batch in (pictures, [pictures[:1], pictures[1:]], [[], pictures]):
        inputs = processor(batch, return_tensors="pt")
        for name in ("pixel_values", "image_grid_hw"):
            assert torch.equal(inputs[name], torch.cat([single[name] for single in alone])), name


def test_errors_name_the_value(processor):
    with pytest.raises(ValueError, match=r"look rescaled already; pass do_rescale=False"):
        processor(np.full((24, 24, 3), 0.5))
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\], got 0.0 to 255.0"):
        processor(np.array([0, 255.0] * 864).reshape(24, 24, 3), do_rescale=False)
    with pytest.raises(ValueError, match="nan"):
        processor(np.full((24, 24, 3), np.nan), do_rescale=False)
    with pytest.raises(ValueError, match=r"\[0, 255\], got -1 to 300"):
        processor(np.array([-1, 300] * 864).reshape(24, 24, 3))
    for resample in (-1, max(Image.Resampling) + 1, 2.0):
        with pytest.raises(ValueError, match=rf"one of Pillow's, 0 to \d, got {resample}"):
            processor(noise(24, 24), resample=resample)
    picture = noise(30, 24)
    by = [processor(picture, resample=resample).pixel_values for resample in (np.int64(0), Image.Resampling.NEAREST)]
    assert np.array_equal(*by)
    with pytest.raises(ValueError, match="mode F"):
        processor(Image.new("F", (24, 24)))
    with pytest.raises(ValueError, match="25x24"):
        processor(noise(25, 24), do_resize=False)
    with pytest.raises(ValueError, match="got mode L"):
        processor(Image.new("L", (24, 24)), do_convert_rgb=False)
    with pytest.raises(ValueError, match="level must be one of 24, got 99"):
        processor(noise(24, 24), level=99)
    with pytest.raises(ValueError, match="level must be one of 24, got 99"):
        NextFlowImageProcessor(patch_size=8, scale_schedules=[[[1, 1]]], levels={"24": 1}, level="99")


def test_integers_are_rescaled_either_way_and_arrays_of_them_with_a_warning(processor):
    picture = noise(24, 24)
    expected = pixels_of(processor, picture)
    arrays = {name: picture.astype(name) for name in ("uint8", "int64")} | {"torch": torch.from_numpy(picture)}
    for name, array in arrays.items():
        logging.warning_once.cache_clear()
        with CaptureLogger(logging.get_logger("transformers_nextflow.image_processing_nextflow")) as logs:
            assert torch.equal(pixels_of(processor, array, do_rescale=False), expected)
        assert "hold 0 to 255: do_rescale=False is for floats alone" in logs.out, name
    with CaptureLogger(logging.get_logger("transformers_nextflow.image_processing_nextflow")) as logs:
        assert torch.equal(pixels_of(processor, Image.fromarray(picture), do_rescale=False), expected)
        pixels_of(processor, picture)
        pixels_of(processor, picture / 255, do_rescale=False)
        pixels_of(processor, Image.fromarray(picture[..., 0].astype(np.uint16)), do_rescale=False)
    assert logs.out == "", "a picture of PIL says what it holds"


def test_the_ends_of_the_range_of_floats(processor):
    black, white = (pixels_of(processor, np.full((24, 24, 3), value)) for value, dtype in ((0, int), (255, int)))
    assert torch.equal(pixels_of(processor, np.zeros((24, 24, 3))), black)
    assert torch.equal(pixels_of(processor, np.full((24, 24, 3), 255.0)), white)
    assert torch.equal(pixels_of(processor, np.ones((24, 24, 3)), do_rescale=False), white)
    with pytest.raises(ValueError, match="look rescaled already"):
        processor(np.ones((24, 24, 3)))
    with pytest.raises(ValueError, match=r"must lie in \[0, 255\], got 255.5"):
        processor(np.full((24, 24, 3), 255.5))


@pytest.mark.parametrize("size", [(3, 30), (30, 3)])
def test_a_narrow_array_of_grey_is_no_stack_of_channels(processor, size):
    grey = noise(*size, 1)[..., 0]
    assert torch.equal(pixels_of(processor, grey), pixels_of(processor, Image.fromarray(grey)))


def test_a_mean_and_deviation_of_ones_own(processor):
    picture, options = Image.fromarray(noise(24, 24)), (P, processor.scale_schedules, processor.levels)
    one = NextFlowImageProcessor(*options, image_mean=[0.5], image_std=0.5)
    assert torch.equal(pixels_of(one, picture), pixels_of(processor, picture))
    assert torch.allclose(pixels_of(one, picture, do_normalize=False), (pixels_of(one, picture) + 1) / 2)
    other = NextFlowImageProcessor(*options, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.25, 0.3])
    (restored,) = other.postprocess(pixels_of(other, picture)[None])
    assert restored.tobytes() == picture.tobytes()


def test_levels(tmp_path):
    rows = [[[1, 1], [2, 2], [4, 4]], [[1, 1], [2, 3], [4, 6]]]
    processor = NextFlowImageProcessor(patch_size=8, scale_schedules=rows, levels={"low": 2, "high": 3})
    small = noise(16, 16)
    assert np.array_equal(eight_bits(pixels_of(processor, small)), small), "a schedule's size stays"
    assert pixels_of(processor, small, level="high").shape == (3, 32, 32)
    assert pixels_of(processor, noise(33, 32)).shape == (3, 32, 32), "others come to the highest level"
    assert pixels_of(processor, noise(31, 40)).shape == (3, 16, 24), "at which they are not enlarged"
    assert pixels_of(processor, noise(9, 8)).shape == (3, 16, 16), "or to the lowest"
    assert pixels_of(processor, noise(100, 150), level="low").shape == (3, 16, 24)
    low = NextFlowImageProcessor(patch_size=8, scale_schedules=rows, levels={"low": 2, "high": 3}, level="low")
    assert pixels_of(low, noise(32, 32)).shape == (3, 16, 16)
    low.save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    assert isinstance(loaded, NextFlowImageProcessor)
    assert loaded.to_dict() == low.to_dict()
    assert torch.equal(pixels_of(loaded, noise(32, 32)), pixels_of(low, noise(32, 32)))


def test_default_is_table_14():
    processor = NextFlowImageProcessor()
    assert processor(noise(1025, 1030))["image_grid_hw"].tolist() == [[64, 64]]
    inputs = processor(noise(40, 40), level=256)
    assert inputs["image_grid_hw"].tolist() == [[16, 16]]
    assert inputs["pixel_values"].shape == (256, 16 * 16 * 3)
