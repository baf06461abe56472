"""From the bytes of an image to RGB pixels, with every limit checked before memory is spent. Imports no
torch.

Policies: JPEG, PNG and WebP by their content, whatever the sender calls them; EXIF orientation is applied;
CMYK and grey become RGB; 16-bit PNG keeps its upper 8 bits; transparency is dropped as in training;
animations are
refused rather than cut to a frame in silence.
"""

from __future__ import annotations

import io
import re
import struct
import zlib
from dataclasses import dataclass
from typing import Literal, assert_never, cast

import numpy as np
import simplejpeg
from PIL import Image, ImageOps

from serve.errors import ErrorCode, ServeError
from serve.runtime import UInt8

ImageFormat = Literal["JPEG", "PNG", "WEBP"]
MAX_JPEG_SCANS = 100
# Pillow walks through a file's parts in Python, and joins EXIF parts in quadratic time: a file of nothing but
# tiny parts would hold the interpreter for minutes.
MAX_JPEG_PARTS = 500
MAX_JPEG_PADDING = 65536
MAX_PNG_CHUNKS = 10_000
_EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True)
class ImageLimits:
    size_bytes: int = 10 * 1024 * 1024
    pixels: int = 50_000_000


@dataclass(frozen=True)
class ImageHeader:
    format: ImageFormat
    width: int
    height: int
    is_plain: bool = False  # an upright JPEG in colour or grey: what the fast decoder decodes as Pillow does

    @property
    def pixels(self) -> int:
        return self.width * self.height


def decode_image(data: bytes, limits: ImageLimits) -> UInt8:
    """(H, W, 3) RGB. Raises ServeError: image_empty, image_too_large, image_format_unsupported,
    too_many_pixels, ...
    """
    return decode_pixels(data, read_header(data, limits))


def read_header(data: bytes, limits: ImageLimits) -> ImageHeader:
    """Format and size, from the first bytes alone; raises ServeError for what must not be decoded."""
    if not data:
        raise ServeError(ErrorCode.IMAGE_EMPTY, "the image has no bytes")
    if len(data) > limits.size_bytes:
        raise ServeError(
            ErrorCode.IMAGE_TOO_LARGE,
            f"the image has {len(data)} bytes; this server takes up to {limits.size_bytes}",
        )
    header = _parse_header(data, _sniff(data))
    if header.pixels > limits.pixels:
        raise ServeError(
            ErrorCode.TOO_MANY_PIXELS,
            f"the image has {header.width}x{header.height} pixels; this server takes up to {limits.pixels}",
        )
    return header


def _sniff(data: bytes) -> ImageFormat:
    for magic, name in _MAGIC.items():
        if data.startswith(magic) and (name != "WEBP" or data[8:12] == b"WEBP"):
            return name
        if len(data) < 12 and magic.startswith(data[: len(magic)]):
            raise _truncated()
    raise ServeError(
        ErrorCode.IMAGE_FORMAT_UNSUPPORTED, "not a JPEG, PNG or WebP image, judging by its content"
    )


_MAGIC: dict[bytes, ImageFormat] = {b"\xff\xd8\xff": "JPEG", b"\x89PNG\r\n\x1a\n": "PNG", b"RIFF": "WEBP"}


def _parse_header(data: bytes, format: ImageFormat) -> ImageHeader:
    match format:
        case "JPEG":
            header = _parse_jpeg(data)
        case "PNG":
            header = _parse_png(data)
        case "WEBP":
            header = _parse_webp(data)
        case _:
            assert_never(format)
    if header.pixels == 0:
        raise ServeError(ErrorCode.IMAGE_CORRUPT, "the image is 0 pixels wide or high")
    return header


def _parse_jpeg(data: bytes) -> ImageHeader:
    # Entropy-coded data never holds a marker, so this counts scans (and at most a few in embedded previews).
    # Each scan
    # of a progressive file costs a pass over all pixels and may cost the sender only some bytes.
    if data.count(b"\xff\xda") > MAX_JPEG_SCANS:
        raise ServeError(ErrorCode.IMAGE_CORRUPT, f"the JPEG has more than {MAX_JPEG_SCANS} scans")
    _check_jpeg_parts(data)
    with _open(data, "JPEG") as image:
        try:
            is_upright = image.getexif().get(_EXIF_ORIENTATION, 1) == 1
        except _DECODE_ERRORS as error:
            raise _unreadable(data, "JPEG") from error
        return ImageHeader("JPEG", *image.size, is_plain=is_upright and image.mode in ("RGB", "L"))


def _check_jpeg_parts(data: bytes) -> None:
    """Raises ServeError image_corrupt for too many parts, or too much between them, before the first scan."""
    position, padding = 2, 0
    for _ in range(MAX_JPEG_PARTS):
        start = data.find(b"\xff", position)
        marker = _NOT_PADDING.search(data, start) if start >= 0 else None
        at = len(data) if marker is None else marker.start()
        padding += at - position
        if padding > MAX_JPEG_PADDING:
            raise ServeError(ErrorCode.IMAGE_CORRUPT, "the JPEG header is mostly padding")
        if marker is None or data[at] == _START_OF_SCAN:
            return
        position = at + 1
        if data[at] not in _BARE_MARKERS:
            position += max(2, int.from_bytes(data[position : position + 2], "big"))
    raise ServeError(ErrorCode.IMAGE_CORRUPT, f"the JPEG has more than {MAX_JPEG_PARTS} parts")


_NOT_PADDING = re.compile(rb"[^\xff]")
_START_OF_SCAN = 0xDA
_BARE_MARKERS = frozenset((0x00, 0xC8, *range(0xD0, 0xDA), *range(0xF0, 0xFE)))  # no length follows these


def _parse_png(data: bytes) -> ImageHeader:
    if len(data) < 33:
        raise _truncated()
    kind, width, height = struct.unpack(">4sII", data[12:24])
    if kind != b"IHDR" or width > _PNG_SIDE or height > _PNG_SIDE:
        raise ServeError(ErrorCode.IMAGE_CORRUPT, "the PNG header is not valid")
    _check_png_chunks(data)
    return ImageHeader("PNG", width, height)


def _check_png_chunks(data: bytes) -> None:
    """Raises ServeError image_animated, or image_corrupt for too many chunks."""
    position, seen = 8, set[bytes]()
    for _ in range(MAX_PNG_CHUNKS):
        kind = data[position + 4 : position + 8]
        if len(kind) < 4 or kind == b"IEND":
            return
        if kind == b"acTL" and b"IDAT" not in seen:
            raise _animated()
        seen.add(kind)
        position += 12 + int.from_bytes(data[position : position + 4], "big")
    raise ServeError(ErrorCode.IMAGE_CORRUPT, f"the PNG has more than {MAX_PNG_CHUNKS} chunks")


def _parse_webp(data: bytes) -> ImageHeader:
    """Read by hand: Pillow allocates the whole canvas when it opens a WebP, before anybody could look at its
    size.
    """
    if len(data) < 30:
        raise _truncated()
    chunk = data[12:16]
    if chunk == b"VP8X":
        if data[20] & _WEBP_ANIMATION:
            raise _animated()
        return ImageHeader("WEBP", 1 + _uint24(data[24:27]), 1 + _uint24(data[27:30]))
    if chunk == b"VP8L":
        (bits,) = struct.unpack("<I", data[21:25])
        return ImageHeader("WEBP", 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF))
    if chunk == b"VP8 ":
        width, height = struct.unpack("<HH", data[26:30])
        return ImageHeader("WEBP", width & 0x3FFF, height & 0x3FFF)
    raise ServeError(ErrorCode.IMAGE_CORRUPT, "the WebP header is not valid")


_PNG_SIDE = 2**31 - 1
_WEBP_ANIMATION = 0x02  # https://developers.google.com/speed/webp/docs/riff_container#extended_file_format


def _uint24(data: bytes) -> int:
    return int.from_bytes(data, "little")


def decode_pixels(data: bytes, header: ImageHeader) -> UInt8:
    """(H, W, 3) RGB of an image whose header was accepted. Raises ServeError image_truncated or
    image_corrupt.
    """
    pixels = _decode_jpeg(data) if header.is_plain else None
    if pixels is not None:
        return pixels
    with _open(data, header.format) as image:
        try:
            return _to_rgb(ImageOps.exif_transpose(image))
        except _DECODE_ERRORS as error:
            raise _unreadable(data, header.format) from error


def _decode_jpeg(data: bytes) -> UInt8 | None:
    """The fast decoder, bit-identical to Pillow's. None: it objects; Pillow, which forgives more, has the
    last word.
    """
    try:
        return cast(UInt8, simplejpeg.decode_jpeg(data, "RGB"))
    except ValueError:
        return None


def _to_rgb(image: Image.Image) -> UInt8:
    if image.mode.startswith("I;16") or image.mode == "I":
        # Pillow would clip a 16-bit grey to white; the upper byte is what an 8-bit copy of the image holds.
        grey = (np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    return np.asarray(image.convert("RGB"))


def _open(data: bytes, format: ImageFormat) -> Image.Image:
    """Pillow's lazy image: the header is read and no pixel decoded."""
    try:
        return Image.open(io.BytesIO(data), formats=(format,))
    except Image.DecompressionBombError as error:
        raise ServeError(
            ErrorCode.TOO_MANY_PIXELS, "the image has more pixels than this server takes"
        ) from error
    except _DECODE_ERRORS as error:
        raise _unreadable(data, format) from error


# What Pillow's plugins raise for damaged files, besides its own UnidentifiedImageError (an OSError).
_DECODE_ERRORS = (
    OSError, ValueError, SyntaxError, EOFError, KeyError, IndexError, TypeError, OverflowError, struct.error,
    zlib.error, MemoryError, AttributeError, RuntimeError,
)  # fmt: skip


def _unreadable(data: bytes, format: ImageFormat) -> ServeError:
    if _ends_early(data, format):
        return _truncated()
    return ServeError(ErrorCode.IMAGE_CORRUPT, f"the {format} image is damaged and cannot be decoded")


def _ends_early(data: bytes, format: ImageFormat) -> bool:
    match format:
        case "JPEG":
            return b"\xff\xd9" not in data[-4096:]
        case "PNG":
            return b"IEND" not in data[-4096:]
        case "WEBP":
            return len(data) < 8 + int.from_bytes(data[4:8], "little")
        case _:
            assert_never(format)


def _truncated() -> ServeError:
    return ServeError(ErrorCode.IMAGE_TRUNCATED, "the image ends early; it was probably cut in transfer")


def _animated() -> ServeError:
    return ServeError(ErrorCode.IMAGE_ANIMATED, "the image is animated; send the one frame that you mean")
