"""Pictures as they travel: files and data URLs in, PNG in base64 out, masks."""

import re
from base64 import b64decode, b64encode
from io import BytesIO

import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from ..image_processing_nextflow import DAMAGED
from .errors import RequestError
from .limits import Limits

FORMATS = ("PNG", "JPEG", "WEBP", "GIF")  # OpenAI's; Pillow's other decoders are left out of reach


def check_pictures(count: int, limits: Limits, param: str) -> None:
    if count > limits.max_images:
        raise RequestError(f"{param}: at most {limits.max_images} pictures, got {count}", param)


def read_picture(data: bytes, max_pixels: int, param: str) -> Image.Image:
    """A picture file, decoded and upright; of several frames the first.

    Raises:
        RequestError: if it is of another format, damaged or cut short, or has more pixels.
    """
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > max_pixels:  # known before anything is decoded
                size = f"{image.width}x{image.height}"
                raise RequestError(f"{param}: a picture has at most {max_pixels} pixels, got {size}", param)
            return ImageOps.exif_transpose(image)
    except UnidentifiedImageError as error:
        raise RequestError(f"{param}: no picture of the formats {', '.join(FORMATS)}", param) from error
    except DAMAGED as error:
        raise RequestError(f"{param}: the picture is damaged: {error}", param) from error


def read_data_url(url: str, max_pixels: int, param: str) -> Image.Image:
    """The picture of a data URL in base64; see [`read_picture`]."""
    header = re.match(r"data:image/[\w.+-]+;base64,", url)
    if header is None:
        raise RequestError(f"{param}: a data URL reads data:image/png;base64,..., got {url[:40]!r}", param)
    try:
        data = b64decode(url[header.end() :], validate=True)
    except ValueError as error:  # binascii.Error, and what is no ASCII
        raise RequestError(f"{param}: the picture is no base64: {error}", param) from error
    return read_picture(data, max_pixels, param)


def read_mask(mask: Image.Image, picture: Image.Image, size: tuple[int, int], param: str = "mask") -> torch.Tensor:
    """What a mask keeps of a picture that is brought to (height, width) `size`: (H, W) bool, true where the mask is
    not wholly transparent.

    Raises:
        RequestError: if the mask has another size than the picture, or nothing transparent.
    """
    if mask.size != picture.size:
        sizes = ["{}x{}".format(*image.size) for image in (picture, mask)]
        raise RequestError("{}: a mask has its picture's size, {}, got {}".format(param, *sizes), param)
    kept = mask.convert("RGBA").getchannel("A").point(lambda alpha: 255 * (alpha > 0))
    lowest, _ = kept.getextrema()
    if lowest > 0:  # type: ignore[operator]
        raise RequestError(f"{param}: a mask is transparent where the picture is to change, got none of it", param)
    height, width = size
    kept = ImageOps.fit(kept, (width, height), Image.Resampling.BOX)  # as the image processor crops the picture
    return torch.frombuffer(bytearray(kept.tobytes()), dtype=torch.uint8).view(height, width) > 0


def to_base64(picture: Image.Image) -> str:
    """A PNG file in base64."""
    file = BytesIO()
    picture.save(file, format="PNG")
    return b64encode(file.getvalue()).decode()
