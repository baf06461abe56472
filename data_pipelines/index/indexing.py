"""A tar to its index, by reading all of it once."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import numpy as np

from data_pipelines.errors import ShardError
from data_pipelines.index.shard_index import DIGEST_BYTES, ShardIndex, payload_digest, split_name
from data_pipelines.tar import Damage, Member, Readable, walk


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


class _Counting:
    def __init__(self, stream: Readable) -> None:
        self._stream = stream
        self.count = 0

    def read(self, size: int = -1, /) -> bytes:
        data = self._stream.read(size)
        self.count += len(data)
        return data
