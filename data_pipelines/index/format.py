"""The file of an index.

Layout, little-endian: 8 bytes magic, u32 version, u32 length of a JSON header, the header, the arrays (zlib,
in the header's order), and the SHA-256 of all that. An index is never renewed in silence.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from data_pipelines.errors import ShardError
from data_pipelines.files import whole_file
from data_pipelines.index.shard_index import DIGEST_BYTES, ShardIndex, arrays_of, index_path
from data_pipelines.tar import Damage

MAGIC = b"CLIPTIDX"
VERSION = 1
_PREFIX = struct.Struct("<8sII")


class IndexSummary(NamedTuple):
    """What the head of an index says without reading the rest."""

    num_samples: int
    tar_size: int
    digest: str
    damage: tuple[Damage, ...]


def save_index(index: ShardIndex, path: Path) -> None:
    """Write atomically. Raises ShardError."""
    with whole_file(path) as partial:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(_encode(index))


def load_index(path: str | os.PathLike[str]) -> ShardIndex:
    """Read an index by its own path or its tar's. ShardError if missing, damaged or of another version."""
    name = os.fspath(path)
    file = Path(name) if name.endswith(".idx") else index_path(name)
    try:
        data = file.read_bytes()
    except OSError as error:
        raise ShardError(f"{file}: no index: {error.strerror}; `clipstack data index` makes one") from error
    return decode_index(data, name=str(file))


def summarize_index(data: bytes, *, name: str) -> IndexSummary:
    """What the head of an index says; `data` may be its first bytes only, HEAD_BYTES or more. Raises
    ShardError.

    The checksum is not looked at: that needs the whole file, which `decode_index` reads before any sample is.
    """
    header = _decode_header(data, name=name)
    damage = tuple(Damage(*item) for item in header["damage"])
    return IndexSummary(header["samples"], header["tar_size"], header["digest"], damage)


def _decode_header(data: bytes, *, name: str) -> dict[str, Any]:
    remedy = _remedy(name)
    if len(data) < _PREFIX.size or data[:8] != MAGIC:
        raise ShardError(f"{name}: not an index; {remedy}")
    _, version, header_size = _PREFIX.unpack_from(data)
    if version != VERSION:
        raise ShardError(f"{name}: index version {version}, this clipstack reads {VERSION}; {remedy}")
    try:
        header: dict[str, Any] = json.loads(data[_PREFIX.size : _PREFIX.size + header_size])
    except ValueError as error:
        raise ShardError(f"{name}: the index is damaged (header); {remedy}") from error
    return header


def _remedy(name: str) -> str:
    return f"delete it and run `clipstack data index {name.removesuffix('.idx')}`"


def decode_index(data: bytes, *, name: str) -> ShardIndex:
    """The inverse of what `save_index` writes. Raises ShardError."""
    header = _decode_header(data, name=name)
    header_size = _PREFIX.unpack_from(data)[2]
    if hashlib.sha256(data[:-32]).digest() != data[-32:]:
        raise ShardError(f"{name}: the index is damaged (checksum); {_remedy(name)}")
    arrays: dict[str, npt.NDArray[Any]] = {}
    at = _PREFIX.size + header_size
    for label, dtype, packed in header["arrays"]:
        arrays[label] = np.frombuffer(zlib.decompress(data[at : at + packed]), dtype=dtype)
        at += packed
    first = np.concatenate(([0], np.cumsum(arrays["members"], dtype=np.int64)))
    names = arrays["keys"].tobytes().decode("utf-8", "surrogateescape")
    return ShardIndex(
        tar_size=header["tar_size"],
        keys=tuple(names.split("\0")[:-1]),
        first_member=first,
        extensions=tuple(header["extensions"]),
        extension=arrays["extension"],
        header_offset=np.cumsum(arrays["header_step"], dtype=np.int64),
        offset=np.cumsum(arrays["header_step"], dtype=np.int64) + arrays["header_size"],
        size=arrays["size"].astype(np.int64),
        checksum=arrays["checksum"],
        digests=arrays["digests"].reshape(-1, DIGEST_BYTES),
        damage=tuple(Damage(*item) for item in header["damage"]),
    )


def _encode(index: ShardIndex) -> bytes:
    arrays = arrays_of(index)
    # Digests and checksums are noise: packing them again costs time and saves nothing.
    packed = {
        label: zlib.compress(array.tobytes(), 0 if label in ("digests", "checksum") else 6)
        for label, array in arrays.items()
    }
    header = json.dumps(
        {
            "tar_size": index.tar_size,
            "samples": len(index),
            "digest": index.digest,
            "extensions": list(index.extensions),
            "damage": [[item.offset, item.reason] for item in index.damage],
            "arrays": [[label, arrays[label].dtype.str, len(data)] for label, data in packed.items()],
        },
        sort_keys=True,
    ).encode()
    body = _PREFIX.pack(MAGIC, VERSION, len(header)) + header + b"".join(packed.values())
    return body + hashlib.sha256(body).digest()
