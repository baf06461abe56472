"""What an index knows of one shard: its keys, and place, checksum and hash of every member."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Container
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from data_pipelines.tar import BLOCK, Damage

DIGEST_BYTES = 16
"""Of the SHA-256 of each payload, so many leading bytes are kept."""
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm")


def image_extension(members: Container[str]) -> str | None:
    """Which of a sample's members is its image, for everyone: the first of IMAGE_EXTENSIONS, as webdataset's
    `rename(image="jpg;jpeg;png;...")` takes it; None where there is none.
    """
    return next((extension for extension in IMAGE_EXTENSIONS if extension in members), None)


_KEY_AND_EXTENSION = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")  # webdataset's rule
_META = re.compile(r"__[^/]*__($|/)")


class Span(NamedTuple):
    """Where a member lies, in bytes; `checksum` is its blocks', `digest` the head of its payload's
    SHA-256."""

    header_offset: int
    offset: int
    size: int
    checksum: int
    digest: bytes


class Extent(NamedTuple):
    """Bytes [start, end) of the tar that hold a whole sample, headers and padding included."""

    start: int
    end: int
    checksum: int


@dataclass(frozen=True)
class ShardIndex:
    """The samples of one shard, S of them with M members in all."""

    tar_size: int
    keys: tuple[str, ...]
    first_member: npt.NDArray[np.int64]
    """(S + 1,): members of sample i are first_member[i] .. first_member[i + 1]."""
    extensions: tuple[str, ...]
    extension: npt.NDArray[np.uint16]
    """(M,): positions in `extensions`."""
    header_offset: npt.NDArray[np.int64]
    offset: npt.NDArray[np.int64]
    size: npt.NDArray[np.int64]
    checksum: npt.NDArray[np.uint64]
    digests: npt.NDArray[np.uint8]
    """(M, 16)"""
    damage: tuple[Damage, ...] = ()
    """What was broken when the index was made from a tar that was already damaged."""

    def __len__(self) -> int:
        return len(self.keys)

    def members(self, sample: int) -> dict[str, Span]:
        """Extension to place, in the tar's order. Where one extension comes twice the first counts."""
        header_offset, offset, size, check, digests = self._columns
        out: dict[str, Span] = {}
        for m in range(self._firsts[sample], self._firsts[sample + 1]):
            name = self._names[m]
            if name not in out:
                digest = digests[DIGEST_BYTES * m : DIGEST_BYTES * (m + 1)]
                out[name] = Span(header_offset[m], offset[m], size[m], check[m], digest)
        return out

    def extent(self, sample: int) -> Extent | None:
        """All of a sample in one piece, or None where something else lies between its members."""
        return self._extents[sample]

    @cached_property
    def _firsts(self) -> list[int]:
        firsts: list[int] = self.first_member.tolist()
        return firsts

    @cached_property
    def _names(self) -> list[str]:
        return [self.extensions[number] for number in self.extension.tolist()]

    @cached_property
    def _columns(self) -> tuple[list[int], list[int], list[int], list[int], bytes]:
        # Lists, because taking single numbers out of arrays is what a read would spend its time on.
        return (
            self.header_offset.tolist(),
            self.offset.tolist(),
            self.size.tolist(),
            self.checksum.tolist(),
            self.digests.tobytes(),
        )

    @cached_property
    def _extents(self) -> list[Extent | None]:
        if not self.keys:
            return []
        first, last = self.first_member[:-1], self.first_member[1:] - 1
        ends = self.offset + self.size + -self.size % BLOCK
        start, end = self.header_offset[first], ends[last]
        check = np.add.reduceat(self.checksum, first)
        whole = np.add.reduceat(ends - self.header_offset, first) == end - start
        extents = map(Extent, start.tolist(), end.tolist(), check.tolist())
        return [extent if sound else None for extent, sound in zip(extents, whole.tolist(), strict=True)]

    def payloads(self, sample: int, data: bytes, start: int) -> dict[str, bytes]:
        """Extension to payload, cut out of `data`, the tar's bytes from `start` on."""
        _, offset, size, _, _ = self._columns
        mine = slice(self._firsts[sample], self._firsts[sample + 1])
        out: dict[str, bytes] = {}
        for name, at, length in zip(self._names[mine], offset[mine], size[mine], strict=True):
            if name not in out:
                out[name] = data[at - start : at - start + length]
        return out

    def payload_digest(self, sample: int, extension: str) -> bytes:
        """The kept bytes of the SHA-256 of one member's payload."""
        first = self._firsts[sample]
        m = self._names.index(extension, first, self._firsts[sample + 1])
        return self._columns[4][DIGEST_BYTES * m : DIGEST_BYTES * (m + 1)]

    def position(self, key: str) -> int | None:
        """Where a key stands in the shard; None if it has no such key."""
        return self._positions.get(key)

    @cached_property
    def _positions(self) -> dict[str, int]:
        return {key: i for i, key in reversed(list(enumerate(self.keys)))}

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of what the index says: equal for equal shards, wherever they lie."""
        content = hashlib.sha256(json.dumps([self.tar_size, self.extensions]).encode())
        for array in arrays_of(self).values():
            content.update(array.tobytes())
        return content.hexdigest()


def payload_digest(payload: bytes) -> bytes:
    """The 16 bytes that an index keeps for a payload."""
    return hashlib.sha256(payload).digest()[:DIGEST_BYTES]


def split_name(name: str) -> tuple[str, str] | None:
    """(key, lower-case extension) by webdataset's rule: the key ends at the first dot of the file name.

    None for names that webdataset skips: no dot, a leading dot, `__meta__`.
    """
    match = _KEY_AND_EXTENSION.match(name)
    if match is None or _META.search(name):
        return None
    return match.group(1), match.group(2).lower()


def index_path(tar: str | os.PathLike[str]) -> Path:
    """Where the index of a local tar lies."""
    return Path(os.fspath(tar) + ".idx")


def arrays_of(index: ShardIndex) -> dict[str, npt.NDArray[Any]]:
    # Steps and counts instead of absolute positions: small repeating numbers, which zlib packs to little.
    return {
        "keys": np.frombuffer(
            "".join(key + "\0" for key in index.keys).encode("utf-8", "surrogateescape"), dtype=np.uint8
        ),
        "members": np.diff(index.first_member).astype("<u4"),
        "extension": index.extension.astype("<u2"),
        "header_step": np.diff(index.header_offset, prepend=0).astype("<i8"),
        "header_size": (index.offset - index.header_offset).astype("<u4"),
        "size": index.size.astype("<u4"),
        "checksum": index.checksum.astype("<u8"),
        "digests": index.digests,
    }
