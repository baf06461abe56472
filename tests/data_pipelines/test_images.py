"""Decoding against Pillow, and the limits."""

from __future__ import annotations

import io
import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from data_pipelines import images
from data_pipelines.errors import SampleError
from data_pipelines.images import crop_box, decode, open_image


def picture(width: int = 40, height: int = 24, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def encoded(image: Image.Image, format_: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_, **options)
    return buffer.getvalue()


def rotated_jpeg(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(picture(), "JPEG", exif=exif)


@pytest.mark.parametrize(
    "data",
    [
        encoded(picture(), "JPEG"),
        encoded(picture(), "JPEG", progressive=True),
        encoded(picture(mode="L"), "JPEG"),
        encoded(picture(mode="CMYK"), "JPEG"),
        encoded(picture(41, 23), "JPEG", subsampling=2),
        encoded(picture(), "PNG"),
        encoded(picture(mode="P"), "PNG"),
        encoded(picture(mode="RGBA"), "PNG"),
        encoded(picture(), "WEBP"),
        encoded(picture(), "GIF"),
    ],
)
def test_decoding_is_bit_identical_to_pillow(data: bytes) -> None:
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(decode(data), expected)
    assert np.array_equal(np.asarray(open_image(data)), expected)


def test_jpegs_take_the_fast_path_and_pillow_stands_in_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(picture(), "JPEG")
    fast = decode(data)
    monkeypatch.setattr(images, "simplejpeg", None)
    assert np.array_equal(decode(data), fast)
    monkeypatch.undo()
    monkeypatch.setattr(images, "open_image", None)
    assert np.array_equal(decode(data), fast)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    data = rotated_jpeg(orientation)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert np.array_equal(decode(data), np.asarray(upright))
    assert decode(data).shape == ((40, 24, 3) if orientation >= 5 else (24, 40, 3))


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP"])
def test_the_pixel_limit_is_checked_before_decoding(format_: str) -> None:
    data = encoded(picture(100, 100), format_)
    assert decode(data, max_pixels=10_000).shape == (100, 100, 3)
    with pytest.raises(SampleError, match="100 x 100 pixels, over the limit of 9999"):
        decode(data, max_pixels=9999)


@pytest.mark.parametrize(
    "data", [b"", b"hello", b"\xff\xd8\xff" + bytes(50), encoded(picture(), "PNG")[:-30]]
)
def test_what_is_no_image_raises_a_sample_error_that_is_the_same_each_time(data: bytes) -> None:
    reasons = set()
    for _ in range(2):
        with pytest.raises(SampleError) as caught:
            decode(data)
        reasons.add(str(caught.value))
    assert len(reasons) == 1


@pytest.mark.filterwarnings("ignore:Tag data larger")
def test_one_flipped_byte_anywhere_gives_pixels_or_a_sample_error() -> None:
    rng = random.Random(0)
    for format_ in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"):
        sound = encoded(picture(), format_)
        for _ in range(150):
            data = bytearray(sound)
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            try:
                pixels = decode(bytes(data), max_pixels=10**6)
            except SampleError:
                continue
            assert pixels.ndim == 3 and pixels.shape[2] == 3


@pytest.mark.parametrize(
    "size, scale", [((640, 480), (0.08, 1.0)), ((50, 500), (0.5, 1.0)), ((32, 32), (0.9, 1.0))]
)
def test_crops_are_distributed_as_torchvisions(size: tuple[int, int], scale: tuple[float, float]) -> None:
    import clipstack.torchvision_compat  # isort: skip # noqa: F401 - before torchvision
    from torchvision.transforms import RandomResizedCrop  # isort: skip

    width, height = size
    torch.manual_seed(0)
    canvas = torch.empty(3, height, width)
    theirs = np.array(
        [RandomResizedCrop.get_params(canvas, list(scale), [3 / 4, 4 / 3]) for _ in range(2000)], float
    )
    rng = random.Random(0)
    ours = np.array(
        [crop_box(width, height, scale=scale, ratio=(3 / 4, 4 / 3), rng=rng) for _ in range(2000)], float
    )
    for column in range(4):  # top, left, height, width: two-sample Kolmogorov-Smirnov at 0.1 %
        grid = np.union1d(ours[:, column], theirs[:, column])
        cdfs = [np.searchsorted(np.sort(x[:, column]), grid, side="right") / len(x) for x in (ours, theirs)]
        assert np.abs(cdfs[0] - cdfs[1]).max() < 1.95 * (2 / 2000) ** 0.5


def test_crops_lie_inside_the_image() -> None:
    rng = random.Random(1)
    for _ in range(2000):
        width, height = rng.randint(1, 60), rng.randint(1, 60)
        box = crop_box(width, height, scale=(0.01, 1.0), ratio=(0.5, 2.0), rng=rng)
        assert (
            box.top >= 0
            and box.top + box.height <= height
            and box.left >= 0
            and box.left + box.width <= width
        )
        assert box.height > 0 and box.width > 0
