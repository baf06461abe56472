"""Samples to a shard with its index beside it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import NamedTuple

from data_pipelines.errors import ShardError
from data_pipelines.index.format import save_index
from data_pipelines.index.indexing import IndexBuilder
from data_pipelines.index.shard_index import ShardIndex, index_path, split_name
from data_pipelines.tar import TarWriter


class Sample(NamedTuple):
    """What the members of one key hold: extension (`jpg`, `txt`, ...) to bytes, in the tar's order."""

    key: str
    members: Mapping[str, bytes]


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
