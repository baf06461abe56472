"""Image bytes to pixels: size checked before decoding, EXIF orientation applied, simplejpeg where it can,
Pillow elsewhere."""

from __future__ import annotations

import io
import math
import random
import struct
import zlib
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from data_pipelines.errors import SampleError

try:
    import simplejpeg
except ImportError:  # an optional extra: Pillow decodes the same pixels at half the speed
    simplejpeg = None

Pixels = npt.NDArray[np.uint8]
"""(H, W, 3) RGB"""

MAX_IMAGE_PIXELS = 50_000_000

DECODER_ERRORS = (
    ArithmeticError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)
"""What Pillow's plugins raise on broken files; they have no common base."""

_JPEG = b"\xff\xd8\xff"


class Box(NamedTuple):
    """A crop in pixels."""

    top: int
    left: int
    height: int
    width: int


def decode(data: bytes, *, max_pixels: int = MAX_IMAGE_PIXELS) -> Pixels:
    """(H, W, 3) uint8 RGB, upright. Raises SampleError for what is no image, is cut off or has too many
    pixels."""
    if simplejpeg is not None and data.startswith(_JPEG) and not _has_exif(data):
        pixels = _decode_jpeg(data, max_pixels)
        if pixels is not None:
            return pixels
    return np.asarray(open_image(data, max_pixels=max_pixels))


def open_image(data: bytes, *, max_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """The same as a loaded Pillow image in mode RGB. Raises SampleError."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            _check_size(*image.size, max_pixels)
            image.load()
            upright = ImageOps.exif_transpose(image)
            return upright.convert("RGB")
    except UnidentifiedImageError as error:  # its own text holds an address, which differs from run to run
        raise SampleError("no image in a format that Pillow knows") from error
    except Image.DecompressionBombError as error:
        raise SampleError(_first_line(error)) from error
    except DECODER_ERRORS as error:
        raise SampleError(f"cannot be decoded: {_first_line(error)}") from error


def crop_box(
    width: int, height: int, *, scale: tuple[float, float], ratio: tuple[float, float], rng: random.Random
) -> Box:
    """torchvision's RandomResizedCrop.get_params, drawn from `rng`: a share of the area, a ratio, a place."""
    area = width * height
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        target = area * (scale[0] + (scale[1] - scale[0]) * rng.random())
        aspect = math.exp(low + (high - low) * rng.random())
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            return Box(int(rng.random() * (height - h + 1)), int(rng.random() * (width - w + 1)), h, w)
    # No place for such a shape: the largest central crop with a ratio in range.
    w, h = width, height
    if width / height < ratio[0]:
        h = min(height, round(width / ratio[0]))
    elif width / height > ratio[1]:
        w = min(width, round(height * ratio[1]))
    return Box((height - h) // 2, (width - w) // 2, h, w)


class Geometry(NamedTuple):
    """Which part of an image training sees, and whether mirrored."""

    box: Box
    flip: bool


def draw_geometry(
    width: int,
    height: int,
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    hflip: bool,
    rng: random.Random,
) -> Geometry:
    """The crop and mirroring of a training image: drawn here once, for the loader and for replay."""
    box = crop_box(width, height, scale=scale, ratio=ratio, rng=rng)
    return Geometry(box, hflip and rng.random() < 0.5)


def _decode_jpeg(data: bytes, max_pixels: int) -> Pixels | None:
    """None where simplejpeg has no answer: CMYK, or bytes that Pillow may still make sense of."""
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        _check_size(width, height, max_pixels)
        if colorspace in ("CMYK", "YCCK"):
            return None
        pixels: Any = simplejpeg.decode_jpeg(data, colorspace="RGB")
    except ValueError:
        return None
    return np.asarray(pixels)


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise SampleError(
            f"{width} x {height} pixels, over the limit of {max_pixels}; data.max_image_pixels sets it"
        )


def _has_exif(data: bytes) -> bool:
    # Metadata comes before the first scan; one search is all that most files cost.
    return data.find(b"Exif\0\0", 0, 2**17) >= 0


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
