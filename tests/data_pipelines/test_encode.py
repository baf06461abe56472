"""What is stored for an image: the right pixels, the right way up, nothing else in the file."""

from __future__ import annotations

import io
import math
import struct

import imagehash
import numpy as np
import pytest
from PIL import Image, ImageOps

from data_pipelines.encode import (
    ImageOptions,
    image_size,
    is_plain,
    perceptual_hash,
    prepare_image,
    shrunk_size,
)
from data_pipelines.errors import SampleError
from tests.data_pipelines.making import encoded, huge_png, jpeg, picture


def opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def psnr(a: Image.Image, b: Image.Image) -> float:
    error = np.mean((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2)
    return 10 * math.log10(255**2 / error)


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    tags[0x010F] = "maker"
    return tags.tobytes()


def hash_distance(a: str, b: str) -> int:
    return (int(a, 16) ^ int(b, 16)).bit_count()


@pytest.mark.parametrize(("width", "height"), [(640, 480), (480, 640), (300, 300), (2000, 257)])
def test_short_side_shrinks_to_the_target_and_the_shape_stays(width: int, height: int) -> None:
    w, h = shrunk_size(width, height, 256)
    assert min(w, h) == 256
    assert abs(w / h - width / height) < 0.01 * width / height


def test_small_images_are_never_enlarged() -> None:
    assert shrunk_size(200, 100, 256) == (200, 100)
    stored = prepare_image(jpeg(1, 60, 40), ImageOptions(size=256))
    assert (stored.width, stored.height) == (60, 40)


def test_plain_images_that_need_no_change_keep_their_bytes() -> None:
    for image_format in ("JPEG", "PNG", "WEBP"):
        data = encoded(picture(1), image_format)
        assert prepare_image(data, ImageOptions(size=30)).data == data


def test_always_reencodes_and_never_keeps_when_asked_to() -> None:
    data = encoded(picture(1), "JPEG", exif=exif(6))
    assert prepare_image(data, ImageOptions(reencode="never", size=None)).data == data
    assert prepare_image(encoded(picture(1), "PNG"), ImageOptions(reencode="always")).format == "jpg"


def test_large_photos_come_out_as_a_full_decode_would_give_them() -> None:
    # The JPEG decoder halves the image on the way; that must not be seen.
    data = jpeg(3, 1600, 1200)
    stored = prepare_image(data, ImageOptions(size=128, format="png"))
    full = opened(data).resize((stored.width, stored.height), Image.Resampling.BICUBIC)
    assert psnr(opened(stored.data), full) > 45
    assert (stored.original_width, stored.original_height) == (1600, 1200)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_and_all_exif_stripped(orientation: int) -> None:
    data = encoded(picture(5, 64, 48), "JPEG", quality=95, exif=exif(orientation))
    stored = prepare_image(data, ImageOptions(format="png"))
    image = opened(stored.data)
    expected = ImageOps.exif_transpose(opened(data))
    assert image.size == expected.size == (stored.width, stored.height)
    assert np.array_equal(np.asarray(image), np.asarray(expected))
    assert not dict(image.getexif())
    assert b"maker" not in stored.data
    assert image_size(data)[:2] == (stored.original_width, stored.original_height)


def test_metadata_alone_is_reason_enough_to_reencode() -> None:
    data = encoded(picture(1), "JPEG", comment=b"secret place")
    stored = prepare_image(data, ImageOptions())
    assert b"secret" not in stored.data
    assert is_plain(opened(stored.data))


def test_transparency_becomes_white_and_grey_scale_of_16_bits_keeps_its_tones() -> None:
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    white = prepare_image(encoded(clear, "PNG"), ImageOptions(format="png"))
    assert np.all(np.asarray(opened(white.data)) == 255)
    ramp = Image.fromarray(np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8))
    grey = opened(prepare_image(encoded(ramp, "PNG"), ImageOptions(format="png")).data)
    assert np.array_equal(np.asarray(grey)[..., 0].ravel(), np.arange(0, 256, 4))


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "1", "LA"])
def test_every_pillow_mode_ends_as_rgb(mode: str) -> None:
    image_format = "TIFF" if mode == "CMYK" else "PNG"
    stored = prepare_image(encoded(picture(2).convert(mode), image_format), ImageOptions(reencode="always"))
    assert opened(stored.data).mode == "RGB"


def test_a_huge_image_is_refused_by_its_header_alone() -> None:
    with pytest.raises(SampleError, match="limit of"):
        prepare_image(huge_png(), ImageOptions())


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"<html>404</html>", "not an image"),
        (jpeg(1)[:200], "cannot be decoded|not an image"),
        (encoded(picture(1), "PNG")[:-40], "cannot be decoded"),
    ],
)
def test_what_is_no_whole_image_is_rejected_with_the_reason(data: bytes, reason: str) -> None:
    with pytest.raises(SampleError, match=reason):
        prepare_image(data, ImageOptions(reencode="always"))


@pytest.mark.parametrize("error", [KeyError("layout"), MemoryError(), struct.error("x"), SyntaxError("x")])
def test_whatever_a_decoder_raises_is_a_reject(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(SampleError, match="cannot be decoded"):
        prepare_image(b"anything", ImageOptions())


def test_size_and_shape_limits_reject() -> None:
    with pytest.raises(SampleError, match="smaller"):
        prepare_image(jpeg(1, 60, 20), ImageOptions(min_size=32))
    with pytest.raises(SampleError, match="aspect"):
        prepare_image(jpeg(1, 90, 20), ImageOptions(max_aspect=3))


def test_perceptual_hash_is_imagehash_phash_where_no_draft_decode_happens() -> None:
    data = encoded(picture(7, 50, 40), "PNG")
    assert perceptual_hash(data) == str(imagehash.phash(opened(data)))


def test_perceptual_hash_is_close_for_copies_and_far_for_others() -> None:
    hashes = []
    for seed in range(30):
        original = picture(seed, 400, 300)
        a = perceptual_hash(encoded(original, "JPEG", quality=95))
        b = perceptual_hash(encoded(original.resize((200, 150)), "JPEG", quality=60))
        assert hash_distance(a, b) <= 8
        hashes.append(a)
    pairs = [hash_distance(a, b) for i, a in enumerate(hashes) for b in hashes[:i]]
    assert min(pairs) > 8
