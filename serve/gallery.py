"""A small folder of images that the page at / searches by text."""

from __future__ import annotations

import asyncio
import base64
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from clipstack.errors import ConfigError
from serve.errors import ServeError
from serve.images import ImageLimits, decode_image
from serve.items import ImageItem
from serve.runtime import Float32
from serve.versions import Version

THUMBNAIL_PIXELS = 192
CHUNK = 16
_ENDINGS = frozenset((".jpg", ".jpeg", ".png", ".webp"))


@dataclass(frozen=True)
class Picture:
    name: str
    data: bytes
    thumbnail: str  # a data URI


class Gallery:
    """Pictures read once at start; their vectors are computed once for each model that is asked."""

    def __init__(self, pictures: tuple[Picture, ...]) -> None:
        self.pictures = pictures
        self._vectors: dict[str, asyncio.Task[Float32]] = {}  # by fingerprint

    @classmethod
    def read(cls, folder: Path, *, max_images: int, limits: ImageLimits) -> Gallery:
        """Raises ConfigError for a folder without images, and for an image that cannot be read."""
        if not folder.is_dir():
            raise ConfigError(
                f"gallery = {str(folder)!r}: no such folder; give a folder of JPEG, PNG or WebP images"
            )
        paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in _ENDINGS)[:max_images]
        if not paths:
            raise ConfigError(f"gallery = {str(folder)!r}: holds no JPEG, PNG or WebP image")
        return cls(tuple(_picture(path, limits) for path in paths))

    async def search(self, version: Version, query: Float32, top_k: int) -> list[tuple[Picture, float]]:
        """The pictures nearest to a text's vector (D,), with their cosines."""
        cosines = await self._vectors_of(version) @ query
        order = np.argsort(-cosines, kind="stable")[:top_k]
        return [(self.pictures[i], float(cosines[i])) for i in order]

    async def _vectors_of(self, version: Version) -> Float32:
        known = self._vectors.get(version.info.fingerprint)
        if known is None or _has_failed(known):
            known = self._vectors[version.info.fingerprint] = asyncio.ensure_future(self._encode(version))
        return await asyncio.shield(known)

    def forget(self, fingerprint: str) -> None:
        """Drop the vectors of a model that is no longer served."""
        self._vectors.pop(fingerprint, None)

    async def _encode(self, version: Version) -> Float32:
        with version.lease():
            parts = []
            for start in range(0, len(self.pictures), CHUNK):
                items = [ImageItem(picture.data) for picture in self.pictures[start : start + CHUNK]]
                encoded = await version.encode(items, deadline=float("inf"), truncate=False, param="gallery")
                parts.append(encoded.vectors)
        return np.concatenate(parts)


def _has_failed(task: asyncio.Task[Float32]) -> bool:
    return task.done() and (task.cancelled() or task.exception() is not None)


def _picture(path: Path, limits: ImageLimits) -> Picture:
    try:
        data = path.read_bytes()
        pixels = decode_image(data, limits)
    except (OSError, ServeError) as error:
        reason = error.message if isinstance(error, ServeError) else error.strerror
        raise ConfigError(f"gallery: {str(path)!r} cannot be read ({reason}); repair or remove it") from error
    small = ImageOps.contain(Image.fromarray(pixels), (THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    out = io.BytesIO()
    small.save(out, "JPEG", quality=80)
    return Picture(path.stem, data, "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode())
