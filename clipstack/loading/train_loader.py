"""Shards to training batches: equal on all ranks, the same whatever the number of worker processes, from any
position on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from clipstack.config.models import DataConfig
from clipstack.errors import ConfigError, DataError
from clipstack.loading.reading import read_options, shard_cache
from clipstack.loading.unindexed import UnindexedSamples, announce, expand_unindexed
from clipstack.loading.workers import Made, Ranges, Workers
from clipstack.preprocess import Preprocess
from clipstack.world import World
from data_pipelines.cache import Prefetcher, Schedule, local_share
from data_pipelines.order import Order, OrderParams, batch_ranges, rank_slice
from data_pipelines.sources import is_pipe, is_remote
from data_pipelines.stream import Reader, make_manifest
from data_pipelines.stream.drawing import Drawer, Drawn
from data_pipelines.stream.manifest import Manifest, order_state
from data_pipelines.stream.quarantine import BadRate, BadSample, Quarantine
from data_pipelines.stream.reader import MAX_OPEN_SHARDS


class Batch(NamedTuple):
    """A rank's share of a global batch: B pairs."""

    images: Tensor
    """(B, 3, H, W) uint8; `Preprocess.normalize` makes floats of them on the device."""
    tokens: Tensor
    """(B, context_length) int64"""
    sample_ids: Tensor
    """(B, 2) int64: hash of the image's bytes, hash of the caption that is used."""
    sample_index: Tensor
    """(B,) int64 position in the data set."""
    keys: list[str]
    """SHARD_FILE_NAME/KEY"""
    next_sample: int
    """Where in the order the next global batch starts: the integer that a checkpoint keeps."""


class TrainLoader:
    """The training data of one rank."""

    def __init__(
        self,
        config: DataConfig,
        *,
        preprocess: Preprocess,
        batch_size: int,
        world: World,
        seed: int,
        quarantine_path: Path | None,
    ) -> None:
        """`batch_size` is global. Raises ConfigError, DataError."""
        world.check_batch(batch_size)
        self._config = config
        self._quarantine = Quarantine(quarantine_path)
        sources = config.sources
        has_pipes = any(is_pipe(path) for paths, _ in sources for path in paths)
        make = _UnindexedData if has_pipes else _IndexedData
        self._data = make(config, sources, preprocess, batch_size=batch_size, world=world, seed=seed)
        self._quarantine.add(self._data.damage)

    @property
    def num_samples(self) -> int:
        """In one epoch, all sources together. Raises ConfigError for sources that cannot be indexed."""
        return self._data.num_samples

    def epochs(self, position: int) -> list[float]:
        """How many epochs of each source lie before a position; 0 for a source that cannot be indexed."""
        return self._data.epochs(position)

    def state(self) -> dict[str, object]:
        """What a position depends on, JSON-able: a checkpoint keeps it beside the position."""
        return self._data.state()

    def check_state(self, state: Mapping[str, object]) -> None:
        """Raises ConfigError naming what differs from the run that saved `state`."""
        names = {
            "manifest": "data.train (its shards)", "weights": "data.train (its weights)",
            "unindexed": "data.train", "seed": "seed",
        }  # fmt: skip
        for name, value in self.state().items():
            if state.get(name) != value:
                key = names.get(name, f"data.{name}")
                raise ConfigError(
                    f"{key}: {value!r} now, {state.get(name)!r} when the position in the data was saved, "
                    "which would now mean other samples: put it back, or take another run.dir"
                )

    def iterate(self, start_sample: int, skip: Sequence[tuple[int, int]] = ()) -> Iterator[Batch]:
        """Batches without end from a position of the order; positions inside windows [low, high) of `skip`
        are left out.

        A new call ends the one before. Raises DataError when too many samples are bad or a worker process
        dies.
        """
        rate = BadRate(self._config.max_bad_fraction)
        for made in self._data.run(start_sample, skip):
            self._quarantine.add(made.bad)
            rate.count(len(made.value.keys), made.bad)
            yield made.value

    def write_quarantine(self) -> None:
        """Try again what the disk has refused."""
        self._quarantine.write_pending()

    def close(self) -> None:
        """End the worker processes."""
        self._data.close()
        self._quarantine.write_pending()


class _IndexedData:
    """Shards in the order of the order function."""

    def __init__(
        self,
        config: DataConfig,
        sources: Sequence[tuple[tuple[str, ...], float]],
        preprocess: Preprocess,
        *,
        batch_size: int,
        world: World,
        seed: int,
    ) -> None:
        self._params = OrderParams(seed, config.lanes, config.window_shards, config.quantum)
        self._batch_size = batch_size
        self._manifest = make_manifest(sources, config.cache_dir)
        self._order = self._manifest.order(self._params)
        self._prefetcher = _prefetcher(
            config, self._manifest, self._order, batch_size=batch_size, world=world
        )
        # Lanes take turns: with fewer open shards than they read side by side, each turn would open one anew.
        max_open = max(MAX_OPEN_SHARDS, 2 * config.lanes * config.window_shards)
        reader = Reader(
            self._manifest, read_options(config), open_file=shard_cache(config).open, max_open=max_open
        )
        batches = _TrainBatches(reader, self._order, preprocess, seed, world.rank, world.size)
        self._workers = Workers(batches, config.workers, pin_memory=world.device.type == "cuda")

    @property
    def damage(self) -> tuple[BadSample, ...]:
        return self._manifest.damage

    @property
    def num_samples(self) -> int:
        return self._order.num_samples

    def epochs(self, position: int) -> list[float]:
        return self._order.epochs(position)

    def state(self) -> dict[str, object]:
        return order_state(self._manifest, self._params)

    def run(self, start_sample: int, skip: Sequence[tuple[int, int]]) -> Iterator[Made]:
        made = self._workers.run(batch_ranges(start_sample, self._batch_size, skip))
        if self._prefetcher is None:
            yield from made
            return
        for one in made:
            # Started only once the workers are there, since a fork copies no threads.
            self._prefetcher.start(one.value.next_sample)
            yield one

    def close(self) -> None:
        self._workers.close()
        if self._prefetcher is not None:
            self._prefetcher.close()


class _UnindexedData:
    """Pipes, through the webdataset library. Batches are equal on all ranks; nothing else is promised."""

    damage: tuple[BadSample, ...] = ()

    def __init__(
        self,
        config: DataConfig,
        sources: Sequence[tuple[tuple[str, ...], float]],
        preprocess: Preprocess,
        *,
        batch_size: int,
        world: World,
        seed: int,
    ) -> None:
        urls = expand_unindexed(sources)
        announce(config, urls)
        self._urls, self._seed, self._batch_size = urls, seed, batch_size
        samples = UnindexedSamples(urls, read_options(config), seed, world.rank)
        batches = _UnindexedBatches(samples, preprocess, size=batch_size // world.size)
        self._workers = Workers(batches, config.workers, pin_memory=world.device.type == "cuda")

    @property
    def num_samples(self) -> int:
        raise ConfigError(
            f"data.train = {self._urls[0]!r}: its size is unknown, and what is asked for needs it; "
            "name shards in a folder"
        )

    def epochs(self, position: int) -> list[float]:
        return [0.0]

    def state(self) -> dict[str, object]:
        return {"unindexed": list(self._urls), "seed": self._seed}

    def run(self, start_sample: int, skip: Sequence[tuple[int, int]]) -> Iterator[Made]:
        # Positions only count here: there is no order that a window of them could be cut out of.
        made = self._workers.run(None)
        for one, ranges in zip(made, batch_ranges(start_sample, self._batch_size), strict=False):
            yield one._replace(value=one.value._replace(next_sample=ranges[-1][1]))

    def close(self) -> None:
        self._workers.close()


def _prefetcher(
    config: DataConfig, manifest: Manifest, order: Order, *, batch_size: int, world: World
) -> Prefetcher | None:
    """One on each machine, in its first rank, where there is something to fetch. Raises DataError."""
    share = local_share(batch_size, rank=world.rank, world_size=world.size)
    if share.first_rank != world.rank or not any(is_remote(shard.url) for shard in manifest.shards):
        return None
    return Prefetcher(shard_cache(config), Schedule(manifest, order, share))


@dataclass
class _TrainBatches(Dataset[Made]):
    reader: Reader
    order: Order
    preprocess: Preprocess
    seed: int
    rank: int
    world_size: int

    def __getitem__(self, ranges: Ranges) -> Made:
        drawer = Drawer(self.reader, seed=self.seed)
        try:
            drawn = [
                drawer.draw(int(epoch), int(sample), int(source))
                for low, high in rank_slice(ranges, rank=self.rank, world_size=self.world_size)
                for source, epoch, sample in zip(*self.order.take(low, high - low), strict=True)
            ]
        except DataError as error:
            return Made(None, [], error)
        return _train_batch(drawn, self.preprocess, next_sample=ranges[-1][1])


@dataclass
class _UnindexedBatches(IterableDataset[Made]):
    samples: UnindexedSamples
    preprocess: Preprocess
    size: int

    def __iter__(self) -> Iterator[Made]:
        drawn = iter(self.samples)
        while True:
            try:
                batch = list(islice(drawn, self.size))
            except DataError as error:
                yield Made(None, [], error)
                return
            yield _train_batch(batch, self.preprocess, next_sample=0)


def _train_batch(drawn: list[Drawn], preprocess: Preprocess, *, next_sample: int) -> Made:
    batch = Batch(
        images=torch.stack([preprocess.train_image(one.pixels, one.rng) for one in drawn]),
        tokens=preprocess.tokenize([one.caption for one in drawn]),
        sample_ids=torch.tensor([_sample_id(one) for one in drawn], dtype=torch.int64),
        sample_index=torch.tensor([one.sample for one in drawn], dtype=torch.int64),
        keys=[one.raw.key for one in drawn],
        next_sample=next_sample,
    )
    return Made(batch, [bad for one in drawn for bad in one.bad])


def _sample_id(drawn: Drawn) -> tuple[int, int]:
    return int.from_bytes(drawn.raw.image_digest[:8], "little", signed=True), _text_id(drawn.caption)


@lru_cache(2**16)
def _text_id(text: str) -> int:
    return int.from_bytes(
        hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()[:8], "little", signed=True
    )
