"""Stored samples by position: read by offset, checked against the index."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from pathlib import Path

from data_pipelines.errors import SampleError, ShardError
from data_pipelines.index.finding import ensure_index, find_index
from data_pipelines.index.format import decode_index
from data_pipelines.index.shard_index import ShardIndex, Span
from data_pipelines.rights import RemovalList, removed_samples, shard_urls
from data_pipelines.sources import LocalFile, RemoteFile, ShardFile, is_remote
from data_pipelines.stream.manifest import Manifest, ShardEntry
from data_pipelines.stream.samples import RawSample, ReadOptions, RemovedError, parse_sample
from data_pipelines.tar import checksum

MAX_OPEN_SHARDS = 128


class Reader:
    """Reads stored samples of a manifest. Opens shards when they are first needed; pickles without them."""

    def __init__(
        self,
        manifest: Manifest,
        options: ReadOptions,
        *,
        open_file: Callable[[ShardEntry], ShardFile] | None = None,
        max_open: int = MAX_OPEN_SHARDS,
    ) -> None:
        """open_file: how to open a shard, as a cache does; None: where it lies. max_open: so many shards are
        kept open, and the longest unused is closed first."""
        self.manifest = manifest
        self.options = options
        self._open_file = open_file or open_shard
        self._max_open = max_open
        self._firsts = [0, *accumulate(shard.num_samples for shard in manifest.shards)]
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()

    def locate(self, sample: int) -> tuple[int, int]:
        """(shard, position in it) of a position in the data set."""
        shard = bisect_right(self._firsts, sample) - 1
        return shard, sample - self._firsts[shard]

    def first_of(self, shard: int) -> int:
        """Position in the data set of the first sample of a shard."""
        return self._firsts[shard]

    def key(self, sample: int) -> str:
        """SHARD_FILE_NAME/KEY. Raises ShardError."""
        shard, position = self.locate(sample)
        entry = self.manifest.shards[shard]
        return f"{entry.name}/{self._index(shard).keys[position]}"

    def read(self, sample: int) -> RawSample:
        """Raises SampleError if it cannot be used as it is stored, RemovedError if it must not be,
        ShardError."""
        shard, position = self.locate(sample)
        opened = self._opened(shard)
        if position in opened.removed:
            raise RemovedError(f"removed: {opened.removed[position]}")
        payloads = _read_members(opened, position)
        index = opened.index
        # The index knows the hash of the image already, and the checksum vouches for the bytes.
        digest_of = partial(index.payload_digest, position)
        return parse_sample(f"{opened.name}/{index.keys[position]}", payloads, self.options, digest_of)

    def members(self, sample: int) -> dict[str, bytes]:
        """Every member of a sample, checked against the index. Raises SampleError, ShardError."""
        shard, position = self.locate(sample)
        opened = self._opened(shard)
        return _read_members(opened, position)

    def close(self) -> None:
        for opened in self._open.values():
            opened.close()
        self._open.clear()

    def _index(self, shard: int) -> ShardIndex:
        return self._opened(shard).index

    def _opened(self, shard: int) -> _OpenShard:
        found = self._open.get(shard)
        if found is not None:
            self._open.move_to_end(shard)
            return found
        while len(self._open) >= self._max_open:
            self._open.popitem(last=False)[1].close()
        entry = self.manifest.shards[shard]
        index = _index_of(entry, self.options.cache_dir)
        removed = removed_of(entry, index, self.options.removals)
        self._open[shard] = _OpenShard(entry.name, index, removed, lambda: self._open_file(entry))
        return self._open[shard]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": OrderedDict()}


class _OpenShard:
    """An index, and the file behind it once bytes are asked for."""

    def __init__(
        self, name: str, index: ShardIndex, removed: dict[int, str], open_file: Callable[[], ShardFile]
    ) -> None:
        self.name = name
        self.index = index
        self.removed = removed
        self._open_file = open_file
        self._file: ShardFile | None = None

    def read(self, start: int, end: int) -> bytes:
        if self._file is None:
            self._file = self._open_file()
        data = self._file.read(start, end)
        if len(data) < end - start:
            raise SampleError(f"the shard ends at byte {start + len(data)}, inside this sample")
        return data

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def open_shard(entry: ShardEntry) -> ShardFile:
    """The file of a shard where it lies. Raises ShardError."""
    return RemoteFile(entry.url) if is_remote(entry.url) else LocalFile(entry.url)


def removed_of(entry: ShardEntry, index: ShardIndex, removals: RemovalList) -> dict[int, str]:
    """Positions in a shard that the list removes, by key, image hash and the URLs of the table beside it;
    URLs that stand in KEY.json alone show when a sample is read."""
    if not removals:
        return {}
    urls = None if is_remote(entry.url) else shard_urls(entry.url)
    return removed_samples(removals, index, shard_name=entry.name, urls=urls)


def _index_of(entry: ShardEntry, cache_dir: Path | None) -> ShardIndex:
    found = find_index(entry.url, cache_dir)
    index = ensure_index(entry.url, cache_dir) if found is None else decode_index(found[1], name=found[0])
    if index.digest != entry.digest:
        raise ShardError(
            f"{entry.url}: its index changed while it was in use; do not rebuild shards under a run"
        )
    return index


def _read_members(opened: _OpenShard, position: int) -> dict[str, bytes]:
    extent = opened.index.extent(position)
    if extent is None:
        return {ext: _read_member(opened, ext, span) for ext, span in opened.index.members(position).items()}
    start, end, expected = extent
    data = opened.read(start, end)
    if checksum(data) != expected:
        raise SampleError("its bytes are not those that the index was made of")
    return opened.index.payloads(position, data, start)


def _read_member(opened: _OpenShard, extension: str, span: Span) -> bytes:
    data = opened.read(span.header_offset, span.offset + span.size + -span.size % 512)
    if checksum(data) != span.checksum:
        raise SampleError(f"the bytes of its .{extension} are not those that the index was made of")
    start = span.offset - span.header_offset
    return data[start : start + span.size]


def describe_place(reader: Reader, sample: int) -> tuple[str, str]:
    """(shard file name, key) of a sample; where even the index cannot be read the key is its position, as
    `#12`."""
    shard, position = reader.locate(sample)
    name = reader.manifest.shards[shard].name
    try:
        return name, reader.key(sample).removeprefix(name + "/")
    except ShardError:
        return name, f"#{position}"
