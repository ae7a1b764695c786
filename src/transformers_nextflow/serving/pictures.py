"""Pictures and masks of requests."""

from io import BytesIO

import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from ..image_processing_nextflow import DAMAGED
from .errors import RequestError
from .limits import Limits

FORMATS = ("PNG", "JPEG", "WEBP", "GIF")  # OpenAI's; Pillow's other decoders are left out of reach


def check_pictures(count: int, limits: Limits, param: str) -> None:
    if count > limits.max_images:
        raise RequestError(f"at most {limits.max_images} pictures, got {count}", param)


def too_many_pixels(most: int, width: int, height: int) -> str:
    return f"a picture has at most {most} pixels, got {width}x{height}"


def read_picture(data: bytes, max_pixels: int, param: str) -> Image.Image:
    """A picture file, decoded and upright; of several frames the first.

    Raises:
        RequestError: if it is of another format, damaged or cut short, or has more pixels.
    """
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > max_pixels:  # known before anything is decoded
                raise RequestError(too_many_pixels(max_pixels, *image.size), param)
            upright = ImageOps.exif_transpose(image)
            # torn EXIF, which Pillow passes over here, must not stop those that ask for it again
            upright.info = {name: value for name, value in upright.info.items() if name == "transparency"}
            return upright
    except UnidentifiedImageError as error:
        raise RequestError(f"no picture of the formats {', '.join(FORMATS)}", param) from error
    except DAMAGED as error:
        raise RequestError(f"the picture is damaged: {error}", param) from error


def read_mask(mask: Image.Image, of_picture: tuple[int, int], size: tuple[int, int]) -> torch.Tensor:
    """What a mask keeps of a picture of (width, height) `of_picture` that is brought to (height, width) `size`: (H, W)
    bool, true where the mask is not wholly transparent.

    Raises:
        RequestError: if the mask has another size than the picture, or nothing transparent.
    """
    if mask.size != of_picture:
        sizes = "{}x{}, got {}x{}".format(*of_picture, *mask.size)
        raise RequestError(f"a mask has its picture's size, {sizes}", "mask")
    kept = mask.convert("RGBA").getchannel("A").point(lambda alpha: 255 * (alpha > 0))
    lowest, _ = kept.getextrema()
    if lowest > 0:  # type: ignore[operator]
        raise RequestError("a mask is transparent where the picture is to change, got none of it", "mask")
    height, width = size
    kept = ImageOps.fit(kept, (width, height), Image.Resampling.BOX)  # as the image processor crops the picture
    return torch.frombuffer(bytearray(kept.tobytes()), dtype=torch.uint8).view(height, width) > 0
