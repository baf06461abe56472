"""Whole shards of remote sources in a folder of this machine, fetched ahead and dropped in the known
order."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections.abc import Container, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipelines.errors import DataError, ShardError
from data_pipelines.order import Order
from data_pipelines.sources import (
    LocalFile,
    ShardFile,
    default_cache_dir,
    filesystem,
    is_remote,
    locked,
    retried,
)
from data_pipelines.stream.manifest import Manifest, ShardEntry

SCAN_CHUNK = 2**15
"""Positions of the order that the prefetcher looks at in one step."""


class ShardCache:
    """A folder of fetched shards, shared by all processes of a machine. Remote shards only."""

    def __init__(self, cache_dir: Path | None, limit_bytes: int, *, drops: bool = False) -> None:
        """`drops`: make room for what is opened; else someone else does, who knows what comes next."""
        self.folder = (cache_dir or default_cache_dir()) / "shards"
        self.limit_bytes = limit_bytes
        self._keep: Container[Path] | None = () if drops else None

    def path(self, entry: ShardEntry) -> Path:
        """Where a shard lies once fetched. The name holds its content's hash: a changed shard is another
        file."""
        digest = hashlib.sha256(f"{entry.url}\n{entry.digest}".encode()).hexdigest()[:16]
        return self.folder / f"{digest}-{entry.name}"

    def open(self, entry: ShardEntry) -> ShardFile:
        """The shard, fetched if it is not here. Local shards are opened where they lie. Raises ShardError."""
        if not is_remote(entry.url):
            return LocalFile(entry.url)
        while True:
            path = self.fetch(entry, self._keep)
            try:
                return LocalFile(path)
            except ShardError:
                if path.exists():
                    raise
                # Dropped between the two lines by the process that keeps the folder within its limit.

    def fetch(self, entry: ShardEntry, keep: Container[Path] | None = None) -> Path:
        """Download a shard unless it is here; one process does it while others wait.

        `keep`: where given, other shards than these are dropped to stay within the limit, the oldest first.
        Raises ShardError, DataError.
        """
        path = self.path(entry)
        if not path.exists():
            with locked(path):
                if not path.exists():
                    if keep is not None:
                        self._make_room(entry.size_bytes, keep)
                    self._download(entry, path)
        return path

    def _make_room(self, size_bytes: int, keep: Container[Path]) -> None:
        held = self.held()
        total = sum(held.values()) + size_bytes
        for path, size in held.items():
            if total > self.limit_bytes and path not in keep:
                self.drop(path)
                total -= size

    def drop(self, path: Path) -> None:
        """Files that are open stay readable to whoever has them open."""
        path.unlink(missing_ok=True)

    def held(self) -> dict[Path, int]:
        """Fetched shards and their sizes in bytes, the longest untouched first."""
        found = []
        for path in self.folder.glob("*.tar"):
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            found.append((status.st_mtime, path, status.st_size))
        return {path: size for _, path, size in sorted(found)}

    def _download(self, entry: ShardEntry, path: Path) -> None:
        fs, remote = filesystem(entry.url)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            retried(entry.url, lambda: _get(fs, remote, partial, entry.size_bytes))
            os.replace(partial, path)
        except OSError as error:
            raise ShardError(f"{entry.url}: cannot be cached in {self.folder}: {error.strerror}") from error
        finally:
            partial.unlink(missing_ok=True)


def _get(fs: Any, remote: str, partial: Path, size_bytes: int) -> None:
    try:
        fs.get_file(remote, str(partial))
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise DataError(
                f"data.cache_dir = {partial.parent}: no space left; lower data.cache_size_gb"
            ) from error
        raise
    got = partial.stat().st_size
    if got != size_bytes and got != fs.size(remote):
        raise OSError(f"the download broke off after {got} of {size_bytes} bytes")


@dataclass(frozen=True)
class NodeShare:
    """Which part of each global batch the ranks of this machine take."""

    batch_size: int
    first_rank: int = 0
    num_ranks: int = 1
    world_size: int = 1

    def mask(self, positions: npt.NDArray[np.int64], start: int) -> npt.NDArray[np.bool_]:
        """(n,) whether this machine reads a position, where batches start at `start`."""
        inside = (positions - start) % self.batch_size
        low = self.batch_size * self.first_rank // self.world_size
        high = self.batch_size * (self.first_rank + self.num_ranks) // self.world_size
        return (inside >= low) & (inside < high)


def local_share(batch_size: int, *, rank: int, world_size: int) -> NodeShare:
    """The share of this machine's ranks, as launchers describe it, ranks in a row: LOCAL_RANK, and torchrun's
    LOCAL_WORLD_SIZE or deepspeed's LOCAL_SIZE."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    num_ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1")
    return NodeShare(batch_size, rank - local_rank, num_ranks, world_size)


class Schedule:
    """Which shards the coming positions of an order need, in the order of their first use."""

    def __init__(self, manifest: Manifest, order: Order, share: NodeShare) -> None:
        self._manifest, self._order, self._share = manifest, order, share
        self._firsts = np.concatenate(([0], np.cumsum([shard.num_samples for shard in manifest.shards])))

    def upcoming(self, start: int, limit_bytes: int) -> list[ShardEntry]:
        """Distinct shards from a position on, as many as fit in `limit_bytes`; all of them at most."""
        entries: list[ShardEntry] = []
        room = limit_bytes
        for shard in self._shards_from(start):
            entry = self._manifest.shards[shard]
            if entry.size_bytes > room:
                break
            room -= entry.size_bytes
            entries.append(entry)
        return entries

    def side_by_side_bytes(self) -> int:
        """What one window of every lane takes: less room than this would fetch shards again and again."""
        params, shards = self._order.params, self._manifest.shards
        mean = self._manifest.num_samples / len(shards)
        span = int(params.lanes * params.window_shards * mean)
        samples = self._samples(0, min(span, self._manifest.num_samples))
        return sum(shards[i].size_bytes for i in np.unique(self._shard_of(samples)))

    def _shards_from(self, start: int) -> Iterator[int]:
        seen: set[int] = set()
        # After a whole epoch every source has shown what it has; a light one of a mixture may take longer.
        end = start + 2 * self._manifest.num_samples + SCAN_CHUNK
        for low in range(start, end, SCAN_CHUNK):
            shards = self._shard_of(self._samples(low, low + SCAN_CHUNK, start))
            _, first_use = np.unique(shards, return_index=True)
            for i in np.sort(first_use):
                shard = int(shards[i])
                if shard not in seen:
                    seen.add(shard)
                    yield shard
            if len(seen) == len(self._manifest.shards):
                return

    def _samples(self, low: int, high: int, start: int = 0) -> npt.NDArray[np.int64]:
        positions = np.arange(low, high, dtype=np.int64)
        return self._order.take(low, high - low).sample[self._share.mask(positions, start)]

    def _shard_of(self, samples: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return np.searchsorted(self._firsts, samples, side="right") - 1


class Prefetcher:
    """A thread that keeps the cache one step ahead of training: one for each machine."""

    def __init__(self, cache: ShardCache, schedule: Schedule) -> None:
        """Raises DataError if the cache is too small for the shards that are read side by side."""
        needed = schedule.side_by_side_bytes()
        if needed > cache.limit_bytes:
            raise DataError(
                f"data.cache_size_gb = {cache.limit_bytes / 1e9:g}: the shards read side by side take "
                f"{needed / 1e9:.3g} GB; raise it, or lower data.lanes or data.window_shards"
            )
        self._cache, self._schedule = cache, schedule
        self._position = 0
        self._closed = False
        self._moved = threading.Condition()
        self._thread: threading.Thread | None = None

    def start(self, position: int) -> None:
        """Begin, or go on from elsewhere."""
        self.advance(position)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="shard-prefetch", daemon=True)
            self._thread.start()

    def advance(self, position: int) -> None:
        """Training has used what lies before `position`."""
        with self._moved:
            self._position = position
            self._moved.notify()

    def close(self) -> None:
        with self._moved:
            self._closed = True
            self._moved.notify()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._closed = False

    def _run(self) -> None:
        # What cannot be fetched here is fetched by the worker that needs it, which meets the error and tells.
        with suppress(DataError):
            while not self._closed:
                position = self._position
                self._fill(position)
                with self._moved:
                    while not self._closed and self._position == position:
                        self._moved.wait()

    def _fill(self, position: int) -> None:
        """Fetch what comes, in order, dropping what is no longer wanted to make room."""
        wanted = self._schedule.upcoming(position, self._cache.limit_bytes)
        keep = {self._cache.path(entry) for entry in wanted}
        for entry in wanted:
            if self._closed:
                return
            if is_remote(entry.url):
                with suppress(ShardError):  # the others may be at hand
                    self._cache.fetch(entry, keep)
