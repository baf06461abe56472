"""The index of a shard, `X.tar.idx`: where each sample's members lie and what their bytes hash to.

File layout, little-endian: 8 bytes magic, u32 version, u32 length of a JSON header, the header, the arrays
(zlib, in the header's order), and the SHA-256 of all that. An index is never renewed in silence.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from data_pipelines.errors import ShardError
from data_pipelines.files import whole_file
from data_pipelines.tar import BLOCK, Damage, Member, Readable, TarWriter, walk

MAGIC = b"CLIPTIDX"
VERSION = 1
DIGEST_BYTES = 16
"""Of the SHA-256 of each payload, so many leading bytes are kept."""

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm")

_PREFIX = struct.Struct("<8sII")
_KEY_AND_EXTENSION = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")  # webdataset's rule
_META = re.compile(r"__[^/]*__($|/)")


class Sample(NamedTuple):
    """What the members of one key hold: extension (`jpg`, `txt`, ...) to bytes, in the tar's order."""

    key: str
    members: Mapping[str, bytes]


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


class IndexSummary(NamedTuple):
    """What the head of an index says without reading the rest."""

    num_samples: int
    tar_size: int
    digest: str
    damage: tuple[Damage, ...]


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
        for array in _arrays(self).values():
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


@dataclass
class IndexBuilder:
    """Collects members in the order of the archive; members in a row that share a key are one sample."""

    keys: list[str] = field(default_factory=list)
    first: list[int] = field(default_factory=list)
    extensions: dict[str, int] = field(default_factory=dict)
    rows: list[tuple[int, int, int, int]] = field(default_factory=list)
    checksums: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    damage: list[Damage] = field(default_factory=list)

    def add(self, member: Member) -> None:
        split = split_name(member.name)
        if split is None:
            return
        key, extension = split
        if not self.keys or self.keys[-1] != key:
            self.keys.append(key)
            self.first.append(len(self.rows))
        number = self.extensions.setdefault(extension, len(self.extensions))
        self.rows.append((number, member.header_offset, member.offset, member.size))
        self.checksums.append(member.checksum)
        self.digests.append(payload_digest(member.payload))

    def finish(self, tar_size: int) -> ShardIndex:
        rows = np.array(self.rows, dtype=np.int64).reshape(-1, 4)
        return ShardIndex(
            tar_size=tar_size,
            keys=tuple(self.keys),
            first_member=np.array([*self.first, len(rows)], dtype=np.int64),
            extensions=tuple(self.extensions),
            extension=rows[:, 0].astype(np.uint16),
            header_offset=rows[:, 1].copy(),
            offset=rows[:, 2].copy(),
            size=rows[:, 3].copy(),
            checksum=np.array(self.checksums, dtype=np.uint64),
            digests=np.frombuffer(b"".join(self.digests), dtype=np.uint8).reshape(-1, DIGEST_BYTES),
            damage=tuple(self.damage),
        )


class ShardWriter:
    """Writes samples as one shard with its index beside it; atomic, and a function of the samples alone.

    `with ShardWriter(path) as writer: writer.add(sample); writer.commit()`. Without `commit` nothing stays.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._tar = TarWriter(path)
        self._builder = IndexBuilder()

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return self._tar.size

    def __len__(self) -> int:
        return len(self._builder.keys)

    def add(self, sample: Sample) -> None:
        """Raises ShardError for a key that readers would split elsewhere or that the sample before has."""
        builder = self._builder
        if builder.keys and builder.keys[-1] == sample.key:
            raise ShardError(f"{self._tar.path}: key {sample.key!r} comes twice; give each sample its own")
        for extension, payload in sample.members.items():
            name = f"{sample.key}.{extension}"
            if split_name(name) != (sample.key, extension):
                raise ShardError(
                    f"{self._tar.path}: {name!r} is no name for a member: "
                    "a key has no dot in its last part, an extension is lower case"
                )
            builder.add(self._tar.add(name, payload))

    def commit(self) -> ShardIndex:
        """Give the shard and its index their names."""
        beside = index_path(self._tar.path)
        # The index of a shard that is replaced here must never stand beside the new one.
        beside.unlink(missing_ok=True)
        self._tar.commit()
        index = self._builder.finish(self._tar.size)
        save_index(index, beside)
        return index

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tar.__exit__(kind, error, trace)


def write_shard(path: str | os.PathLike[str], samples: Iterable[Sample]) -> ShardIndex:
    """Write a shard and its `.idx`, atomically: equal samples give equal bytes. Raises ShardError."""
    with ShardWriter(path) as writer:
        for sample in samples:
            writer.add(sample)
        return writer.commit()


def index_stream(stream: Readable, *, name: str, strict: bool = True) -> ShardIndex:
    """Index the tar that `stream` delivers. Damage raises ShardError; without `strict` it goes to
    `.damage`."""
    counted = _Counting(stream)
    builder = IndexBuilder()
    for item in walk(counted):
        if isinstance(item, Member):
            builder.add(item)
        elif strict:
            raise ShardError(
                f"{name}: damaged at byte {item.offset}: {item.reason}; "
                "`clipstack data verify --repair` saves what can be saved"
            )
        else:
            builder.damage.append(item)
    while counted.read(2**20):  # the walk stops at the end mark; the size counts what pads it
        pass
    if not builder.keys and builder.damage and builder.damage[0].offset == 0:
        raise ShardError(f"{name}: no tar archive: {builder.damage[0].reason}")
    return builder.finish(counted.count)


def build_index(tar: str | os.PathLike[str], *, strict: bool = True) -> ShardIndex:
    """Index a local tar by reading all of it. Raises ShardError; see `index_stream`."""
    try:
        with open(tar, "rb", buffering=2**20) as stream:
            return index_stream(stream, name=os.fspath(tar), strict=strict)
    except OSError as error:
        raise ShardError(f"{os.fspath(tar)}: cannot be read: {error.strerror}") from error


def index_path(tar: str | os.PathLike[str]) -> Path:
    """Where the index of a local tar lies."""
    return Path(os.fspath(tar) + ".idx")


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


def _arrays(index: ShardIndex) -> dict[str, npt.NDArray[Any]]:
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


def _encode(index: ShardIndex) -> bytes:
    arrays = _arrays(index)
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


class _Counting:
    def __init__(self, stream: Readable) -> None:
        self._stream = stream
        self.count = 0

    def read(self, size: int = -1, /) -> bytes:
        data = self._stream.read(size)
        self.count += len(data)
        return data
