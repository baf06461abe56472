"""Which items make which shard, under which keys. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from data_pipelines.encode import ImageOptions
from data_pipelines.inputs.items import Item
from data_pipelines.rights import EMPTY, RemovalList


@dataclass(frozen=True)
class BuildOptions:
    image: ImageOptions | None = field(default_factory=ImageOptions)
    """None: image bytes are copied without a look at them beyond what the table needs."""
    samples_per_shard: int = 2000
    shard_bytes: int | None = None
    """Instead of a count, start a new shard before the images and captions of one exceed this; only where
    sizes are known."""
    shuffle_seed: int | None = None
    prefix: str = ""
    phash: bool = True
    defaults: Mapping[str, str] = field(default_factory=dict)
    """Rights columns for samples that bring none."""
    removal: RemovalList = EMPTY

    def fingerprint(self) -> dict[str, Any]:
        """What the output depends on, as JSON."""
        return {
            **asdict(self),
            "removal": self.removal.digest if len(self.removal) else None,
            "defaults": dict(self.defaults),
        }


@dataclass(frozen=True)
class Job:
    """One shard to write."""

    name: str
    keys: tuple[str, ...]
    items: tuple[Item, ...]


def plan_jobs(
    items: Sequence[Item], options: BuildOptions, *, sizes: Sequence[int] | None = None
) -> list[Job]:
    """Which items make which shard, under which keys. `sizes`: bytes of each item, for `shard_bytes`."""
    if options.shuffle_seed is not None:
        order = np.random.default_rng(options.shuffle_seed).permutation(len(items))
        items = [items[i] for i in order]
        sizes = None if sizes is None else [sizes[i] for i in order]
    if options.shard_bytes is not None:
        assert sizes is not None, "shard_bytes needs sizes"
        groups = _cut_by_size(items, sizes, options.shard_bytes)
    else:
        step = options.samples_per_shard
        groups = [tuple(items[i : i + step]) for i in range(0, len(items), step)]
    return [
        Job(name=f"{options.prefix}{number:05d}.tar", keys=_keys(group, number, options), items=group)
        for number, group in enumerate(groups)
    ]


def _cut_by_size(items: Sequence[Item], sizes: Sequence[int], limit: int) -> list[tuple[Item, ...]]:
    groups: list[tuple[Item, ...]] = []
    current: list[Item] = []
    filled = 0
    for item, size in zip(items, sizes, strict=True):
        if current and filled + size > limit:
            groups.append(tuple(current))
            current, filled = [], 0
        current.append(item)
        filled += size
    return [*groups, tuple(current)] if current else groups


def _keys(items: Sequence[Item], number: int, options: BuildOptions) -> tuple[str, ...]:
    """Numbers by place in the input, so that a reject leaves a gap and moves nobody; keys of shards stay as
    they are.

    Where shards that come together share a key, the later ones get `-1`, `-2`, ...
    """
    digits = max(4, len(str(options.samples_per_shard - 1)), len(str(len(items) - 1)))
    used: set[str] = set()
    out: list[str] = []
    for i, item in enumerate(items):
        wanted = item.key if item.key is not None else f"{number:05d}{i:0{digits}d}"
        key, again = wanted, 0
        while key in used:
            again += 1
            key = f"{wanted}-{again}"
        used.add(key)
        out.append(key)
    return tuple(out)
