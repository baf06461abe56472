"""Encoded pictures for tests, each from a seed."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from PIL import Image


def picture(seed: int = 0, *, width: int = 64, height: int = 48) -> Image.Image:
    """Smooth colours with a rectangle: what codecs are made for, and different for each seed."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    image = small.resize((width, height), Image.Resampling.BICUBIC)
    left, top = int(rng.integers(0, width // 2)), int(rng.integers(0, height // 2))
    image.paste(
        tuple(int(c) for c in rng.integers(0, 256, 3)), (left, top, left + width // 3, top + height // 3)
    )
    return image


def encoded(image: Image.Image, format: str = "JPEG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def jpeg(seed: int = 0, **size: int) -> bytes:
    return encoded(picture(seed, **size), "JPEG", quality=90)


def data_uri(data: bytes, kind: str = "image/jpeg") -> str:
    return f"data:{kind};base64," + base64.b64encode(data).decode()
