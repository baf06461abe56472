"""What the builder stores for one image: shrunk, upright, stripped of metadata, or byte for byte as it
came."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from data_pipelines.errors import SampleError
from data_pipelines.images import DECODER_ERRORS, MAX_IMAGE_PIXELS

Reencode = Literal["needed", "always", "never"]
Format = Literal["jpg", "png", "webp"]

STORABLE: dict[str, Format] = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
"""Pillow's format names to extensions that every reader of shards knows; anything else is re-encoded."""

_EXIF_ORIENTATION = 0x0112
_METADATA = ("exif", "xmp", "XML:com.adobe.xmp", "icc_profile", "photoshop", "comment", "mp")
_WHITE = (255, 255, 255)


@dataclass(frozen=True)
class ImageOptions:
    size: int | None = 256
    """Short side in pixels that larger images are shrunk to; images are never enlarged. None: any size is
    kept."""
    reencode: Reencode = "needed"
    """needed: bytes that nothing has to change are stored as they are. never: all bytes are, metadata
    included."""
    format: Format = "jpg"
    """Of what is re-encoded."""
    quality: int = 90
    """1-100, for jpg and webp."""
    min_size: int = 1
    """Images with a shorter short side, in pixels, are rejected."""
    max_aspect: float | None = None
    """Images with a larger ratio of long to short side are rejected."""
    max_pixels: int = MAX_IMAGE_PIXELS
    """Images of more pixels are rejected, by their header, before they are decoded."""


@dataclass(frozen=True)
class StoredImage:
    data: bytes
    format: Format
    width: int
    height: int
    original_width: int
    original_height: int


def prepare_image(data: bytes, options: ImageOptions) -> StoredImage:
    """The bytes to store for an image file's bytes. Raises SampleError with the reason why it cannot be used.

    Sizes are those of the upright image (EXIF orientation applied). Transparent pixels become white. Colour
    profiles are dropped without conversion, as training pipelines do.
    """
    with _opened(data, max_pixels=options.max_pixels) as image:
        orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
        width, height = image.size[::-1] if orientation in (5, 6, 7, 8) else image.size
        _check_shape(width, height, options)
        target = shrunk_size(width, height, options.size)
        stored_format = STORABLE.get(image.format or "")
        if options.reencode == "never":
            if stored_format is None:
                raise SampleError(f"{image.format} images cannot be stored as they are; allow re-encoding")
            image.load()
            return StoredImage(data, stored_format, width, height, width, height)
        if image.format == "JPEG":
            # The decoder itself can halve a JPEG for little; at twice the target no quality is lost by it.
            image.draft(
                None, (2 * target[0], 2 * target[1]) if orientation < 5 else (2 * target[1], 2 * target[0])
            )
        image.load()
        if options.reencode == "needed" and stored_format and target == (width, height) and is_plain(image):
            return StoredImage(data, stored_format, width, height, width, height)
        rgb = to_rgb(ImageOps.exif_transpose(image))
        if rgb.size != target:
            rgb = rgb.resize(target, Image.Resampling.BICUBIC)
        return StoredImage(_encoded(rgb, options), options.format, *target, width, height)


def shrunk_size(width: int, height: int, short_side: int | None) -> tuple[int, int]:
    """(width, height) with the short side at most `short_side` and the shape kept; never larger than
    given."""
    short = min(width, height)
    if short_side is None or short <= short_side:
        return width, height
    return max(short_side, round(width * short_side / short)), max(
        short_side, round(height * short_side / short)
    )


def is_plain(image: Image.Image) -> bool:
    """Whether a loaded image is stored as every reader expects: 8-bit RGB or grey, one frame, no metadata."""
    # A PNG's text chunks stand in `text`, which other formats lack.
    text = getattr(image, "text", None)
    return (
        image.mode in ("RGB", "L")
        and "transparency" not in image.info
        and getattr(image, "n_frames", 1) == 1
        and not text
        and not any(name in image.info for name in _METADATA)
    )


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB; transparency over white, 16-bit grey scaled down."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):
        pixels = np.asarray(image, dtype=np.int64).clip(0, 65535) >> 8
        return Image.fromarray(pixels.astype(np.uint8)).convert("RGB")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        rgba = image.convert("RGBA")
        background = Image.new("RGBA", rgba.size, (*_WHITE, 255))
        return Image.alpha_composite(background, rgba).convert("RGB")
    return image.convert("RGB")


def image_size(data: bytes, *, max_pixels: int = MAX_IMAGE_PIXELS) -> tuple[int, int, str]:
    """(width, height, format as in `STORABLE`'s values or Pillow's name in lower case), upright, from the
    header alone.

    Raises SampleError.
    """
    with _opened(data, max_pixels=max_pixels) as image:
        orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
        width, height = image.size[::-1] if orientation in (5, 6, 7, 8) else image.size
        name = image.format or ""
        return width, height, STORABLE.get(name, name.lower())


def perceptual_hash(data: bytes, *, max_pixels: int = MAX_IMAGE_PIXELS) -> str:
    """The 64-bit DCT hash (16 hex digits) of an image: a few bits apart for copies, 14 and more for different
    photos.

    `imagehash.phash` on a draft decode: JPEGs are read at the smallest scale of 64 pixels or more. Raises
    SampleError. Source: https://www.hackerfactor.com/blog/index.php?/archives/432-Looks-Like-It.html
    """
    import imagehash

    with _opened(data, max_pixels=max_pixels) as image:
        image.draft("L", (64, 64))
        image.load()
        return str(imagehash.phash(to_rgb(image) if image.mode not in ("L", "RGB") else image))


def _encoded(image: Image.Image, options: ImageOptions) -> bytes:
    image.info = {}  # Pillow writes comments and profiles that it finds there
    out = io.BytesIO()
    match options.format:
        case "jpg":
            image.save(out, "JPEG", quality=options.quality)
        case "png":
            image.save(out, "PNG")
        case "webp":
            image.save(out, "WEBP", quality=options.quality)
    return out.getvalue()


def _check_shape(width: int, height: int, options: ImageOptions) -> None:
    if min(width, height) < options.min_size:
        raise SampleError(f"{width} x {height} is smaller than the shortest side allowed, {options.min_size}")
    if options.max_aspect is not None and max(width, height) > options.max_aspect * min(width, height):
        raise SampleError(
            f"{width} x {height} is longer than the aspect ratio allowed, {options.max_aspect:g}"
        )


@contextmanager
def _opened(data: bytes, *, max_pixels: int) -> Iterator[Image.Image]:
    """An image whose header was read; what goes wrong with it, also while decoding inside the `with`, is a
    SampleError."""
    if not data:
        raise SampleError("an empty file")
    try:
        with warnings.catch_warnings():
            # Pillow warns of large images by a fixed limit and of odd EXIF; our own limit decides, by the
            # header.
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data)) as image:
                width, height = image.size
                if width * height > max_pixels:
                    raise SampleError(f"{width} x {height} is over the limit of {max_pixels} pixels")
                yield image
    except Image.DecompressionBombError as error:
        raise SampleError(f"over the limit of pixels: {error}") from error
    except UnidentifiedImageError as error:
        raise SampleError("not an image that can be read") from error
    except DECODER_ERRORS as error:
        raise SampleError(f"cannot be decoded: {error}") from error
