"""From bytes to pixels: what is accepted, what is refused and with which code."""

from __future__ import annotations

import io
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from serve.errors import ErrorCode, ServeError
from serve.images import MAX_JPEG_SCANS, ImageLimits, decode_image, read_header
from tests.serve.pictures import encoded, jpeg, picture

LIMITS = ImageLimits()


def refusal(data: bytes, limits: ImageLimits = LIMITS) -> ErrorCode:
    with pytest.raises(ServeError) as caught:
        decode_image(data, limits)
    return caught.value.code


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize(
    ("format", "options"), [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {})]
)
def test_pixels_are_those_of_pillow_to_the_bit(format: str, options: dict[str, bool], mode: str) -> None:
    data = encoded(picture(3).convert(mode), format, **options)
    np.testing.assert_array_equal(
        decode_image(data, LIMITS), np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    )


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(picture(1), "JPEG", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(decode_image(data, LIMITS), np.asarray(upright))


def test_cmyk_jpeg_becomes_rgb() -> None:
    pixels = decode_image(encoded(picture(2).convert("CMYK"), "JPEG", quality=95), LIMITS)
    assert np.abs(pixels.astype(int) - np.asarray(picture(2)).astype(int)).mean() < 6


def test_16_bit_png_keeps_its_upper_8_bits() -> None:
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    pixels = decode_image(encoded(Image.fromarray(values), "PNG"), LIMITS)
    np.testing.assert_array_equal(pixels, np.repeat((values >> 8).astype(np.uint8)[..., None], 3, axis=2))


def test_palette_and_transparent_images_become_rgb() -> None:
    for image in (
        picture(4).convert("P"),
        picture(4).convert("RGBA"),
        picture(4).convert("LA"),
        picture(4).convert("1"),
    ):
        expected = np.asarray(image.convert("RGB"))
        np.testing.assert_array_equal(decode_image(encoded(image, "PNG"), LIMITS), expected)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("sixteenths", range(16))
def test_truncated_images_are_named_so(format: str, sixteenths: int) -> None:
    data = encoded(picture(5, width=160, height=120), format)
    code = refusal(data[: len(data) * sixteenths // 16])
    assert code is (ErrorCode.IMAGE_TRUNCATED if sixteenths else ErrorCode.IMAGE_EMPTY)


def test_other_content_is_refused_whatever_it_is_called() -> None:
    for data in (
        encoded(picture(), "GIF"),
        encoded(picture(), "BMP"),
        encoded(picture(), "TIFF"),
        b"%PDF-1.7 ....",
        b"x",
    ):
        assert refusal(data) is ErrorCode.IMAGE_FORMAT_UNSUPPORTED


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_animations_are_refused(format: str) -> None:
    data = encoded(picture(1), format, save_all=True, append_images=[picture(2)])
    assert refusal(data) is ErrorCode.IMAGE_ANIMATED


def test_a_phone_photo_with_a_second_picture_inside_is_no_animation() -> None:
    data = encoded(picture(1), "MPO", save_all=True, append_images=[picture(2)])
    assert decode_image(data, LIMITS).shape == (48, 64, 3)


def png_header(width: int, height: int) -> bytes:
    head = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    body = png_chunk(b"IDAT", zlib.compress(b"\0" * 100)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + head + body


def test_bombs_are_refused_by_their_header() -> None:
    assert refusal(png_header(60_000, 60_000)) is ErrorCode.TOO_MANY_PIXELS
    webp = encoded(picture(1), "WEBP", lossless=True)
    assert webp[12:16] == b"VP8L"
    bomb = webp[:21] + struct.pack("<I", 16383 | 16383 << 14) + webp[25:]
    assert refusal(bomb) is ErrorCode.TOO_MANY_PIXELS
    wide = jpeg(1)
    start = wide.index(b"\xff\xc0")
    bomb = wide[: start + 5] + struct.pack(">HH", 65000, 65000) + wide[start + 9 :]
    assert refusal(bomb) is ErrorCode.TOO_MANY_PIXELS


def test_limits_of_bytes_and_pixels_hold_to_the_unit() -> None:
    data = jpeg(1)
    assert decode_image(data, ImageLimits(size_bytes=len(data), pixels=64 * 48)).shape == (48, 64, 3)
    assert refusal(data, ImageLimits(size_bytes=len(data) - 1)) is ErrorCode.IMAGE_TOO_LARGE
    assert refusal(data, ImageLimits(pixels=64 * 48 - 1)) is ErrorCode.TOO_MANY_PIXELS


def test_images_without_pixels_are_refused() -> None:
    assert refusal(png_header(0, 10)) is ErrorCode.IMAGE_CORRUPT
    assert refusal(png_header(10, 0)) is ErrorCode.IMAGE_CORRUPT


def test_a_jpeg_of_endless_scans_is_refused() -> None:
    data = jpeg(1)
    scan = data.index(b"\xff\xda")
    assert (
        refusal(data[:scan] + b"\xff\xda\0\x02" * (MAX_JPEG_SCANS + 1) + data[scan:])
        is ErrorCode.IMAGE_CORRUPT
    )


def exif_part(size: int) -> bytes:
    return b"\xff\xe1" + struct.pack(">H", 2 + 6 + size) + b"Exif\0\0" + b"a" * size


@pytest.mark.parametrize(
    "filler",
    [exif_part(20) * 30_000, b"\xff\xe5\0\x02" * 200_000, b"\xff" * 900_000, b"\xff\x00" * 400_000],
    ids=["tiny EXIF parts", "empty parts", "padding", "escaped bytes"],
)
def test_a_jpeg_header_of_nothing_but_tiny_parts_costs_no_time(filler: bytes) -> None:
    """Pillow alone takes seconds for these, and minutes for 10 MiB of the first."""
    data = jpeg(1)
    started = time.process_time()
    assert refusal(data[:2] + filler + data[2:]) is ErrorCode.IMAGE_CORRUPT
    assert time.process_time() - started < 0.1


def test_a_jpeg_of_many_sound_parts_is_taken() -> None:
    data = jpeg(1)
    comments = (b"\xff\xfe" + struct.pack(">H", 60_002) + b"c" * 60_000) * 60
    whole = data[:2] + exif_part(20) + comments + b"\xff" * 100 + data[2:]
    np.testing.assert_array_equal(decode_image(whole, LIMITS), decode_image(data, LIMITS))


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def test_a_png_of_endless_chunks_is_refused() -> None:
    data = encoded(picture(1), "PNG")
    assert refusal(data[:33] + png_chunk(b"prVt", b"") * 20_000 + data[33:]) is ErrorCode.IMAGE_CORRUPT
    some = data[:33] + png_chunk(b"prVt", b"x") * 500 + data[33:]
    np.testing.assert_array_equal(decode_image(some, LIMITS), decode_image(data, LIMITS))


def test_words_inside_a_png_s_chunks_are_no_chunks() -> None:
    moving = encoded(picture(1), "PNG", save_all=True, append_images=[picture(2)])
    said = png_chunk(b"tEXt", b"Comment\0IDAT acTL")
    assert refusal(moving[:33] + said + moving[33:]) is ErrorCode.IMAGE_ANIMATED
    still = encoded(picture(1), "PNG")
    assert decode_image(still[:33] + said + still[33:], LIMITS).shape == (48, 64, 3)


def test_damage_inside_gives_pixels_or_an_error_of_ours_and_nothing_else() -> None:
    rng = np.random.default_rng(0)
    for format in ("JPEG", "PNG", "WEBP"):
        data = encoded(picture(6, width=100, height=80), format)
        for _ in range(100):
            broken = bytearray(data)
            for position in rng.integers(0, len(data), 3):
                broken[position] ^= 1 << int(rng.integers(8))
            try:
                assert decode_image(bytes(broken), LIMITS).dtype == np.uint8
            except ServeError as error:
                assert 400 <= error.code.status < 500


def test_the_header_says_what_the_image_is() -> None:
    for format in ("JPEG", "PNG", "WEBP"):
        header = read_header(encoded(picture(1), format), LIMITS)
        assert (header.format, header.width, header.height) == (format, 64, 48)
    header = read_header(encoded(picture(1), "WEBP", lossless=True), LIMITS)
    assert (header.width, header.height) == (64, 48)
    header = read_header(
        encoded(picture(1).convert("RGBA"), "WEBP", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0"), LIMITS
    )
    assert (header.width, header.height) == (64, 48)
