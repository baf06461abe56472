"""Pictures and folders of them for the tests of the data tools."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_pipelines.index import Sample, write_shard
from data_pipelines.index.shard_index import ShardIndex

REPOSITORY = Path(__file__).resolve().parents[2]
SHARED_DATA = REPOSITORY / "../shared/data"


def picture(seed: int, width: int = 40, height: int = 30) -> Image.Image:
    """Smooth random colours: no two seeds look alike, and JPEG keeps them nearly as they are."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, image_format: str = "JPEG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, image_format, **options)
    return out.getvalue()


def jpeg(seed: int, width: int = 40, height: int = 30) -> bytes:
    return encoded(picture(seed, width, height), quality=90)


def huge_png() -> bytes:
    """A few bytes that claim 20,000 x 20,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000)))


def image_folder(folder: Path, count: int, **size: int) -> Path:
    """`count` JPEGs with sidecar captions."""
    folder.mkdir(parents=True)
    for i in range(count):
        (folder / f"{i:03}.jpg").write_bytes(jpeg(i, **size))
        (folder / f"{i:03}.txt").write_text(f"picture number {i}\n")
    return folder


def plain_shard(path: Path, seeds: range, **members: bytes) -> ShardIndex:
    """A shard of small JPEGs with captions, and further members for each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_shard(
        path,
        (
            Sample(f"{i:06}", {"jpg": jpeg(i), "txt": f"picture number {i}".encode(), **members})
            for i in seeds
        ),
    )


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
