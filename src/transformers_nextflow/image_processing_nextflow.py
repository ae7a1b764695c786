"""Pictures of any size, mode and orientation to patches of a scale schedule's size, and pixels back to pictures."""

import os
import struct
import zlib
from base64 import decodebytes
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from math import inf
from numbers import Integral
from pathlib import Path

import numpy as np
import torch
from huggingface_hub.dataclasses import validate_typed_dict
from PIL import Image, ImageOps
from transformers import BatchFeature, image_utils
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import ImageInput, infer_channel_dimension_format, is_valid_image
from transformers.processing_utils import ImagesKwargs, Unpack
from transformers.utils import logging

from .configuration_nextflow import NextFlowVQConfig
from .modeling_nextflow_vq import patchify, unpatchify
from .remote_code import ProcessorBringsCode
from .sampling import integer
from .scales import Grid, ScaleSchedule, ScheduleTable, schedule_table

SIXTEEN_BIT_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N")
CHANNELS = (1, 3, 4)
WHITE = {np.dtype(bool): 1, np.dtype(np.uint16): 65535}  # of other integers 255
PNG_EXIF = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")  # a chunk's name, keywords of those of text
ORIENTATION = 0x0112  # EXIF
LYING = range(5, 9)  # orientations of pictures on their side; others than 1 to 8 mean nothing

# What Pillow's decoders raise of damaged files; `DecompressionBombError` is beyond twice `Image.MAX_IMAGE_PIXELS`.
DAMAGED = (
    *(OSError, EOFError, SyntaxError, ValueError, TypeError, LookupError, OverflowError),
    *(struct.error, zlib.error, Image.DecompressionBombError),
)

logger = logging.get_logger(__name__)


def open_picture(path: str | Path) -> Image.Image:
    """A picture file, decoded and upright; of several frames the first.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no picture, is damaged or cut short, or has more pixels than Pillow takes for safe.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no image file {path}")
    return _opened(lambda: path, path)


def _opened(file: Callable[[], str | Path | BytesIO], name: str | Path) -> Image.Image:
    try:
        with Image.open(file()) as image:
            return _upright(image)
    except DAMAGED as error:
        raise ValueError(f"cannot read the image {name}: {error}") from error


def _file_at(address: str) -> BytesIO:
    """What a URL leads to, or a data URL or bare base64 holds."""
    if address.startswith(("http://", "https://")):
        return BytesIO(image_utils.httpx.get(address, timeout=None, follow_redirects=True).content)
    return BytesIO(decodebytes(address.rpartition(",")[2].encode()))


def _upright(image: Image.Image) -> Image.Image:
    image.load()  # what `Image.open` put off
    if image.getexif().get(ORIENTATION, 1) == 1:
        return image  # `exif_transpose` would copy it
    return ImageOps.exif_transpose(image)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(height, width) of a picture once it is upright, by its header alone; of TIFF, Pillow says it already."""
    lies = image.format != "TIFF" and _may_have_exif(image) and image.getexif().get(ORIENTATION) in LYING
    return (image.width, image.height) if lies else (image.height, image.width)


def _may_have_exif(image: Image.Image) -> bool:
    """False only where there is none. Pillow decodes a PNG to find out, since EXIF may follow the pixels; its bytes
    tell it too."""
    file = getattr(image, "fp", None)
    if image.format != "PNG" or "exif" in image.info or file is None:
        return True
    place = file.tell()
    file.seek(0)
    data = file.read()
    file.seek(place)
    return any(name in data for name in PNG_EXIF)


class NextFlowImageProcessorKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """
    level (`str` or `int`, *optional*):
        Level of the schedules to choose from; `None` keeps pictures that have a schedule's size already, and brings
        others to the highest level at which they are not enlarged, or the lowest.
    """

    level: str | int | None


class NextFlowImageProcessor(ProcessorBringsCode, PilBackend):
    r"""
    Brings every picture to the nearest size that has a scale schedule, and cuts it into patches.

    A picture is turned upright (EXIF), put on white where it is transparent, scaled with its aspect ratio kept until
    it covers the size of the schedule nearest in aspect ratio, and cropped around its centre. One that has the size
    already is not resampled.

    Args:
        patch_size (`int`, defaults to 16), scale_schedules (`list`, *optional*), levels (`dict`, *optional*):
            As in [`NextFlowVQConfig`], and to be the same as the model's.
        image_size (`int`, *optional*):
            As in [`NextFlowVQConfig`]: pictures of this edge, which the grid does not divide, stay whole.
        level (`str` or `int`, *optional*):
            Level of the schedules to choose from. `None` keeps pictures that have a schedule's size already, and
            brings others to the highest level at which they are not enlarged, or the lowest.
        do_resize, do_convert_rgb (`bool`, default to `True`):
            Without the first, pictures of other sizes are an error; without the second, other modes than RGB.
        resample (`PIL.Image.Resampling`, defaults to bicubic).
        do_rescale, rescale_factor, do_normalize, image_mean, image_std:
            `(pixel * rescale_factor - image_mean) / image_std`; the defaults take [0, 255] to the model's [-1, 1].
            `do_rescale=False` says that float arrays hold [0, 1] already; integers are rescaled either way, arrays of
            them with a warning.
    """

    do_convert_rgb = True
    do_resize = True
    resample = Image.Resampling.BICUBIC
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    image_mean = [0.5, 0.5, 0.5]
    image_std = [0.5, 0.5, 0.5]
    level = None
    valid_kwargs = NextFlowImageProcessorKwargs
    model_input_names = ["pixel_values", "image_grid_hw"]
    auto_map = {"AutoImageProcessor": "image_processing_nextflow.NextFlowImageProcessor"}

    def __init__(
        self,
        patch_size: int = 16,
        scale_schedules: Sequence | None = None,
        levels: dict[str, int] | None = None,
        image_size: int | None = None,
        **kwargs: Unpack[NextFlowImageProcessorKwargs],
    ):
        kwargs.pop("auto_map", None)  # of the file it came from
        super().__init__(**kwargs)
        self.patch_size = patch_size
        self.scale_schedules = scale_schedules and [[list(grid) for grid in row] for row in scale_schedules]
        self.levels = levels and dict(levels)
        self.image_size = image_size
        integer("patch_size", patch_size, 1)
        self.schedule_table().of_level(self.level)  # raises where there is none
        # what the library checks of a call's arguments, here of those of a file
        names = ("do_resize", "do_convert_rgb", "do_rescale", "do_normalize", "resample", "rescale_factor", "level")
        validate_typed_dict(self.valid_kwargs, {name: getattr(self, name) for name in names})
        self._validate_preprocess_kwargs(
            rescale_factor=self.rescale_factor, image_mean=self.image_mean, image_std=self.image_std
        )

    @classmethod
    def from_vq_config(cls, config: NextFlowVQConfig) -> "NextFlowImageProcessor":
        """For the pictures of a vision tokenizer."""
        return cls(config.patch_size, config.scale_schedules, config.levels, config.image_size)

    def schedule_table(self) -> ScheduleTable:
        """The schedules pictures are brought to."""
        return schedule_table(self.scale_schedules, self.levels, self.patch_size, self.image_size)

    def schedule_of(self, height: int, width: int, level: str | int | None = None) -> ScaleSchedule:
        """The schedule of a picture of `height` x `width` pixels; `level` as in the class."""
        table = self.schedule_table()
        if level is not None:
            return table.nearest_to_image(height, width, level)
        for schedule in table:
            if table.image_size(schedule) == (height, width):
                return schedule
        nearest = [table.nearest_to_image(height, width, name) for name in table.levels]
        fitting = [schedule for schedule in nearest if np.all(table.image_size(schedule) <= np.array([height, width]))]
        return (fitting[-1:] or nearest)[0]

    def fetch_images(self, image_url_or_urls):
        """Open paths and addresses, give grey (H, W) arrays their channel; others pass, nested as they come."""
        if isinstance(image_url_or_urls, (list, tuple)):
            return [self.fetch_images(entry) for entry in image_url_or_urls]
        image, kind = image_url_or_urls, type(image_url_or_urls).__name__
        if isinstance(image, Path) or (isinstance(image, str) and os.path.isfile(image)):
            return open_picture(image)
        if isinstance(image, (np.ndarray, torch.Tensor)) and image.ndim == 2:  # the channel where none mistakes it
            return image[..., None] if image.shape[1] in CHANNELS else image[None]
        if isinstance(image, str):  # the library's reader would lose transparency and more than 8 bits
            return _opened(lambda: _file_at(image), f"{image[:80]}, which is no file here, as a URL or base64")
        if not is_valid_image(image):
            raise TypeError(f"a picture is a PIL image, an array, a tensor, a path or a URL, got {kind}")
        return image

    def process_image(
        self,
        image: ImageInput,
        do_convert_rgb: bool | None = None,
        do_rescale: bool | None = None,
        rescale_factor: float | None = None,
        input_data_format=None,
        **kwargs,
    ) -> Image.Image | np.ndarray:
        """One input to an RGB picture of 8 bits, or to (3, H, W) float32 in [0, 1] where it holds more.

        Arrays are (H, W), or with 1, 3 or 4 (RGBA) channels first or last. Integers hold 0 to 255, `uint16` 0 to
        65535, bool 0 and 1; floats 0 to 255, or 0 to 1 with `do_rescale=False`.

        Raises:
            ValueError: if a picture is damaged or has no pixels, or an array holds other values than these, or might
                have its channels first as well as last.
        """
        white = 255.0
        if isinstance(image, Image.Image):
            try:
                image = _upright(image)
            except DAMAGED as error:
                kind = f"{image.format or image.mode}, {image.width}x{image.height} pixels"
                raise ValueError(f"cannot decode the picture ({kind}): {error}") from error
            if image.mode not in SIXTEEN_BIT_MODES:
                return _to_rgb(image, do_convert_rgb)
            image, white, do_rescale = np.asarray(image)[..., None], 65535, True
        elif isinstance(image, torch.Tensor):
            image = image.detach().cpu()
            image = (image.float() if image.is_floating_point() else image).numpy()
        if image.dtype.kind not in "buif" or image.size == 0:
            raise ValueError(f"a picture has bools, integers or floats as pixels, got {image.dtype} {image.shape}")
        image = _channels_last(image, input_data_format)
        channels, is_float = image.shape[-1], image.dtype.kind == "f"
        if channels not in CHANNELS or (channels != 3 and not do_convert_rgb):
            expected = "1, 3 or 4 channels, with do_convert_rgb=False 3"
            raise ValueError(f"a picture has {expected}, got {channels} as {input_data_format}")
        if is_float:
            white = 1 / rescale_factor if do_rescale else 1
        else:
            white = WHITE.get(image.dtype.newbyteorder("="), white)
            if not do_rescale:
                logger.warning_once(
                    f"pixels of {image.dtype} hold 0 to {white:g}: do_rescale=False is for floats alone"
                )
        low, high = image.min(), image.max()
        if is_float and do_rescale and 0 < high <= 1:
            raise ValueError(f"float pixels in [{low}, {high}] look rescaled already; pass do_rescale=False")
        if not (low >= 0 and np.float32(high) <= np.float32(white)):  # NaN too
            raise ValueError(f"pixels of {image.dtype} must lie in [0, {white:g}], got {low} to {high}")
        if not is_float and white < 65535:
            image = image.astype(np.uint8) * np.uint8(255 // white)
            return _to_rgb(Image.fromarray(image[..., 0] if channels == 1 else image))
        pixels = image.astype(np.float32) / np.float32(white)
        if channels == 4:
            alpha = pixels[..., 3:]
            pixels = pixels[..., :3] * alpha + (1 - alpha)
        return np.broadcast_to(pixels, (*pixels.shape[:2], 3)).transpose(2, 0, 1)

    def _validate_preprocess_kwargs(self, do_resize=None, size=None, **kwargs):
        for name, value in {"size": size, **kwargs}.items():
            if value and name in ("size", "do_center_crop", "crop_size", "do_pad", "pad_size"):
                own = "pictures are brought to their schedule's size alone"
                raise ValueError(f"{own}, got {name}={value}: choose a level instead of a size")
            if name in ("image_mean", "image_std") and (
                np.shape(value) not in ((), (1,), (3,)) or np.asarray(value).dtype.kind not in "iuf"
            ):
                raise ValueError(f"{name} must be a number or three, got {value!r}")
        factor = kwargs["rescale_factor"]
        if not isinstance(factor, (int, float)) or not 0 < abs(factor) < inf:
            raise ValueError(f"rescale_factor must be a number other than 0, got {factor!r}")
        super()._validate_preprocess_kwargs(**kwargs)  # resizing needs no `size`, it follows from the schedules

    def _preprocess(
        self,
        images: list[Image.Image | np.ndarray],
        level: str | int | None,
        do_resize: bool,
        resample: int,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: Sequence[float],
        image_std: Sequence[float],
        return_tensors: str | None,
        **kwargs,
    ) -> BatchFeature:
        """
        Returns:
            `pixel_values`: (sum of final-grid cells, p*p*3) float32, patches row-major, image after image; with
                `image_size` (images, 3, H, W).
            `image_grid_hw`: (images, 2) int64 final grids.
        """
        if not images:
            raise ValueError("give at least one picture, got none")
        if not isinstance(resample, Integral) or resample not in list(Image.Resampling):
            raise ValueError(f"resample must be one of Pillow's, 0 to {max(Image.Resampling):d}, got {resample!r}")
        table = self.schedule_table()
        mean, std = (
            np.broadcast_to(v, 3)[:, None, None] for v in ((image_mean, image_std) if do_normalize else (0, 1))
        )
        of_bytes = (np.arange(256) * rescale_factor - mean) / std  # (3, 1, 256), all values that 8 bits can have
        if not np.isfinite(of_bytes).all():
            raise ValueError(f"pixels are not finite: {rescale_factor=}, {image_mean=}, {image_std=}")
        patches, grids = [], []
        for image in images:
            image = self._fit(image, level, do_resize, resample)
            grids.append(table.by_size(*size_of(image)).final_grid)
            if isinstance(image, Image.Image):
                planes = np.moveaxis(np.asarray(image), -1, 0)
                values = np.stack([row[0].astype(np.float32)[plane] for row, plane in zip(of_bytes, planes)])
            else:
                values = ((image.astype(np.float64) - mean) / std).astype(np.float32)
            pixels = torch.from_numpy(values)[None]
            patches.append(pixels if self.image_size else patchify(pixels, self.patch_size)[0])
        data = {"pixel_values": torch.cat(patches).numpy(), "image_grid_hw": np.array(grids, dtype=np.int64)}
        return BatchFeature(data, tensor_type=return_tensors)

    def fit(self, image: ImageInput) -> Image.Image | np.ndarray:
        """A picture as this processor reads it, in the size that it brings it to: an RGB one of 8 bits, or (3, H, W)
        float32 in [0, 1] where it holds more. With `do_rescale=False` it is read as the picture itself is."""
        image = self.process_image(image, self.do_convert_rgb, self.do_rescale, self.rescale_factor)
        return self._fit(image, self.level, self.do_resize, self.resample)

    def _fit(
        self, image: Image.Image | np.ndarray, level: str | int | None, do_resize: bool, resample: int
    ) -> Image.Image | np.ndarray:
        """Scale until the size of its schedule is covered, aspect ratio kept, and crop around the centre."""
        table, size = self.schedule_table(), size_of(image)
        schedule = self.schedule_of(*size, level) if do_resize else table.by_size(*size)
        height, width = table.image_size(schedule)
        if isinstance(image, Image.Image):
            return ImageOps.fit(image, (width, height), resample)
        channels = [ImageOps.fit(Image.fromarray(channel), (width, height), resample) for channel in image]
        return np.stack([np.asarray(channel) for channel in channels]).clip(0, 1)

    def whole(self, inputs: Mapping[str, torch.Tensor]) -> tuple[Grid, torch.Tensor]:
        """What this processor made of pictures of one size: their final grid, and (B, 3, H, W) pixels, as the vision
        tokenizer reads them.

        Raises:
            ValueError: for pictures of several grids.
        """
        grids = sorted(set(map(tuple, inputs["image_grid_hw"].tolist())))
        if len(grids) != 1:
            raise ValueError(f"pictures of one call must have one grid, got {grids}")
        (grid,), pixels = grids, inputs["pixel_values"]
        if self.image_size:
            return grid, pixels
        return grid, unpatchify(pixels.view(-1, grid[0] * grid[1], pixels.shape[-1]), grid, self.patch_size)

    def postprocess(self, pixel_values: torch.Tensor | Sequence[torch.Tensor]) -> list[Image.Image]:
        """(B, 3, H, W) pixels as the model has them, in [-1, 1], or (3, H, W) ones of any sizes -> pictures."""
        mean, std = (
            torch.as_tensor(v, dtype=torch.float32, device="cpu").expand(3)[:, None, None]
            for v in (self.image_mean, self.image_std)
        )
        pictures = []
        for pixels in (torch.as_tensor(each, device="cpu") for each in pixel_values):
            if pixels.ndim != 3 or len(pixels) != 3:
                got = tuple(getattr(pixel_values, "shape", pixels.shape))
                raise ValueError(f"pixel_values must be (B, 3, H, W), got {got}")
            if not pixels.isfinite().all():
                raise ValueError("pixel_values are not finite: the weights of the vision tokenizer are damaged")
            values = (pixels.detach().float() * std + mean) / self.rescale_factor
            eight_bits = values.round().clamp(0, 255).to(torch.uint8)
            pictures.append(Image.fromarray(eight_bits.permute(1, 2, 0).numpy()))
        return pictures

    def get_number_of_image_patches(self, height: int, width: int, images_kwargs: dict | None = None) -> int:
        """Patches of a picture of `height` x `width` pixels: cells of its final grid."""
        return self.schedule_of(height, width, (images_kwargs or {}).get("level", self.level)).lengths[-1]


def size_of(image: Image.Image | np.ndarray) -> tuple[int, int]:
    """(height, width) of a picture as [`~NextFlowImageProcessor.fit`] gives it."""
    return (image.height, image.width) if isinstance(image, Image.Image) else image.shape[1:]


def _to_rgb(image: Image.Image, do_convert_rgb: bool | None = True) -> Image.Image:
    """Any mode of 8 bits a channel to RGB; what is transparent shows white."""
    if image.mode != "RGB" and not do_convert_rgb:
        raise ValueError(f"do_convert_rgb=False takes RGB pictures, got mode {image.mode}")
    if image.mode == "F":
        raise ValueError("a picture of mode F has no known range; give a float array in [0, 1] with do_rescale=False")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image)
    return white


def _channels_last(image: np.ndarray, input_data_format) -> np.ndarray:
    if input_data_format is None and {image.shape[0], image.shape[-1]} <= set(CHANNELS) and image.size > 1:
        raise ValueError(
            f"an array of the shape {image.shape} has its channels first or last: say which by input_data_format"
        )
    layout = input_data_format or infer_channel_dimension_format(image, num_channels=CHANNELS)
    return np.moveaxis(image, 0, -1) if layout == "channels_first" else image
