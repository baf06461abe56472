"""All shards of a data set, in a fixed order, with the number of samples of each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from data_pipelines.errors import DataError
from data_pipelines.index.finding import ensure_summary
from data_pipelines.order import Order, OrderParams
from data_pipelines.sources import expand_all, is_pipe, is_remote, shard_name, size_bytes
from data_pipelines.stream.quarantine import BadSample


@dataclass(frozen=True)
class ShardEntry:
    """One line of a manifest."""

    url: str
    name: str
    num_samples: int
    size_bytes: int
    digest: str


@dataclass(frozen=True)
class Source:
    """Shards that are drawn from together."""

    shards: tuple[ShardEntry, ...]
    weight: float = 1.0


@dataclass(frozen=True)
class Manifest:
    """All shards of a data set, in a fixed order, with the number of samples of each."""

    sources: tuple[Source, ...]
    damage: tuple[BadSample, ...] = ()
    """What is known to be broken before any sample is read."""

    @cached_property
    def shards(self) -> tuple[ShardEntry, ...]:
        return tuple(shard for source in self.sources for shard in source.shards)

    @property
    def num_samples(self) -> int:
        return sum(shard.num_samples for shard in self.shards)

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of the names and contents of the shards; where they lie does not matter."""
        listed = [[[shard.name, shard.digest] for shard in source.shards] for source in self.sources]
        return hashlib.sha256(json.dumps(listed).encode()).hexdigest()

    def order(self, params: OrderParams) -> Order:
        sizes = [[shard.num_samples for shard in source.shards] for source in self.sources]
        return Order(sizes, [source.weight for source in self.sources], params)


def make_manifest(sources: Sequence[tuple[Sequence[str], float]], cache_dir: Path | None = None) -> Manifest:
    """Find and index the shards of each (paths, weight). Missing indexes are made. Raises DataError,
    ShardError."""
    entries = []
    damage: list[BadSample] = []
    for paths, weight in sources:
        urls = expand_all(paths)
        if pipes := [url for url in urls if is_pipe(url)]:
            raise DataError(f"{pipes[0]}: a pipe has no index; only data.train can be one, and alone")
        # Summaries are small reads: many at once where each is a round trip, in turn where they come from
        # a disk.
        workers = 16 if any(is_remote(url) for url in urls) else 1
        with ThreadPoolExecutor(workers) as pool:
            found = list(pool.map(lambda url: _entry(url, cache_dir), urls))
        entries.append(Source(tuple(entry for entry, _ in found), weight))
        damage += [bad for _, bads in found for bad in bads]
    manifest = Manifest(tuple(entries), tuple(damage))
    if not manifest.num_samples:
        raise DataError(f"{', '.join(p for paths, _ in sources for p in paths)}: the shards hold no samples")
    return manifest


def _entry(url: str, cache_dir: Path | None) -> tuple[ShardEntry, list[BadSample]]:
    summary = ensure_summary(url, cache_dir)
    name = shard_name(url)
    size_bytes(url)  # a shard that is missing is the user's mistake; one that shrank shows sample by sample
    damage = [BadSample(name, None, f"byte {item.offset}: {item.reason}") for item in summary.damage]
    return ShardEntry(url, name, summary.num_samples, summary.tar_size, summary.digest), damage


def order_state(manifest: Manifest, params: OrderParams) -> dict[str, object]:
    """What must stay the same for a position to mean the same sample: JSON-able."""
    return {
        "manifest": manifest.digest,
        "weights": [source.weight for source in manifest.sources],
        **asdict(params),
    }
