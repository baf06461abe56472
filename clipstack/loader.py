"""Shards to batches: equal on all ranks, the same whatever the number of worker processes, from any
position on."""

from __future__ import annotations

import ctypes
import hashlib
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from clipstack.config import DataConfig
from clipstack.errors import ConfigError, DataError, SampleError, ShardError, WorkerError
from clipstack.preprocess import Preprocess
from clipstack.unindexed import UnindexedSamples, announce, expand_unindexed
from clipstack.world import World
from data_pipelines.cache import Prefetcher, Schedule, ShardCache, local_share
from data_pipelines.images import open_image
from data_pipelines.order import Order, OrderParams, batch_ranges, rank_slice
from data_pipelines.rights import EMPTY, load_removal_list
from data_pipelines.sources import is_pipe, is_remote
from data_pipelines.stream import (
    MAX_OPEN_SHARDS,
    BadRate,
    BadSample,
    Drawer,
    Drawn,
    Manifest,
    Quarantine,
    RawSample,
    Reader,
    ReadOptions,
    RemovedError,
    describe_place,
    make_manifest,
    order_state,
)

PREFETCHED_BATCHES = 4
"""Batches that each worker has under way."""

_PR_SET_PDEATHSIG = 1

Ranges = tuple[tuple[int, int], ...]


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


class EvalBatch(NamedTuple):
    """B samples of an ordered pass, in the order of the shards."""

    images: Tensor
    """(B, 3, H, W) uint8; zeros where `mask` is False."""
    captions: list[tuple[str, ...]]
    """All captions of each sample."""
    class_index: Tensor
    """(B,) int64 from KEY.cls; -1 where there is none."""
    sample_index: Tensor
    """(B,) int64 position in the data set."""
    mask: Tensor
    """(B,) bool: False for what only fills the batch, and for samples that cannot be used."""
    keys: list[str]


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
        if batch_size % world.size:
            raise ConfigError(
                f"train.batch_size = {batch_size}: not divisible by {world.size} ranks; "
                f"take {batch_size // world.size * world.size or world.size}"
            )
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
            self._manifest, read_options(config), open_file=_cache(config).open, max_open=max_open
        )
        batches = _TrainBatches(reader, self._order, preprocess, seed, world.rank, world.size)
        self._workers = _Workers(batches, config.workers, pin_memory=world.device.type == "cuda")

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

    def run(self, start_sample: int, skip: Sequence[tuple[int, int]]) -> Iterator[_Made]:
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
        self._workers = _Workers(batches, config.workers, pin_memory=world.device.type == "cuda")

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

    def run(self, start_sample: int, skip: Sequence[tuple[int, int]]) -> Iterator[_Made]:
        # Positions only count here: there is no order that a window of them could be cut out of.
        made = self._workers.run(None)
        for one, ranges in zip(made, batch_ranges(start_sample, self._batch_size), strict=False):
            yield one._replace(value=one.value._replace(next_sample=ranges[-1][1]))

    def close(self) -> None:
        self._workers.close()


def _cache(config: DataConfig, *, drops: bool = False) -> ShardCache:
    return ShardCache(config.cache_dir, int(config.cache_size_gb * 1e9), drops=drops)


def _prefetcher(
    config: DataConfig, manifest: Manifest, order: Order, *, batch_size: int, world: World
) -> Prefetcher | None:
    """One on each machine, in its first rank, where there is something to fetch. Raises DataError."""
    share = local_share(batch_size, rank=world.rank, world_size=world.size)
    if share.first_rank != world.rank or not any(is_remote(shard.url) for shard in manifest.shards):
        return None
    return Prefetcher(_cache(config), Schedule(manifest, order, share))


class EvalSamples(Protocol):
    """Stored samples by position, as an evaluation reads them; workers get a copy."""

    @property
    def num_samples(self) -> int: ...

    @property
    def damage(self) -> tuple[BadSample, ...]:
        """What is known to be broken before any sample is read."""

    @property
    def max_image_pixels(self) -> int: ...

    def read(self, sample: int) -> RawSample:
        """Raises SampleError, ShardError."""

    def place(self, sample: int) -> tuple[str, str]:
        """(shard or folder, key), for a message about this sample."""


class ShardSamples:
    """The samples of indexed shards."""

    def __init__(
        self,
        paths: Sequence[str],
        config: DataConfig,
        *,
        captions: Literal["required", "optional", "ignored"] = "required",
    ) -> None:
        """Raises DataError."""
        manifest = make_manifest([(paths, 1.0)], config.cache_dir)
        options = replace(read_options(config), captions=captions)
        self._reader = Reader(manifest, options, open_file=_cache(config, drops=True).open)

    @property
    def manifest(self) -> Manifest:
        return self._reader.manifest

    @property
    def num_samples(self) -> int:
        return self.manifest.num_samples

    @property
    def damage(self) -> tuple[BadSample, ...]:
        return self.manifest.damage

    @property
    def max_image_pixels(self) -> int:
        return self._reader.options.max_image_pixels

    def read(self, sample: int) -> RawSample:
        return self._reader.read(sample)

    def place(self, sample: int) -> tuple[str, str]:
        return describe_place(self._reader, sample)


class EvalLoader:
    """One ordered pass over a data set: each sample once over all ranks, every rank with as many batches."""

    def __init__(
        self,
        data: str | Sequence[str] | EvalSamples,
        *,
        config: DataConfig | None = None,
        preprocess: Preprocess,
        batch_size: int,
        world: World,
        workers: int | None = None,
    ) -> None:
        """`data`: shards, or samples that lie elsewhere. `batch_size`: samples a rank. `config` says how
        shards are read, how many samples may be bad, and the workers. Raises DataError."""
        config = config or DataConfig(train=".")
        if isinstance(data, str):
            data = (data,)
        self.samples = ShardSamples(tuple(data), config) if isinstance(data, Sequence) else data
        self.bad: list[BadSample] = list(self.samples.damage)
        """What could not be used, of this rank's share; known once the pass is done."""
        self._batch_size, self._world = batch_size, world
        self._limit = config.max_bad_fraction
        self._workers = _Workers(
            _EvalBatches(self.samples, preprocess),
            config.workers if workers is None else workers,
            pin_memory=world.device.type == "cuda",
        )

    @property
    def num_samples(self) -> int:
        return self.samples.num_samples

    def __len__(self) -> int:
        """Batches that each rank gets."""
        return -(-self.num_samples // (self._batch_size * self._world.size))

    def __iter__(self) -> Iterator[EvalBatch]:
        rate = BadRate(self._limit)
        for made in self._workers.run(self._ranges()):
            self.bad += made.bad
            rate.count(len(made.value.keys), made.bad)
            yield made.value

    def _ranges(self) -> Iterator[Ranges]:
        size = self._batch_size
        for k in range(len(self)):
            first = (k * self._world.size + self._world.rank) * size
            yield ((first, first + size),)

    def close(self) -> None:
        """End the worker processes."""
        self._workers.close()


def read_options(config: DataConfig) -> ReadOptions:
    """Raises DataError for a removal list that cannot be read."""
    return ReadOptions(
        caption=config.caption,
        max_image_pixels=config.max_image_pixels,
        removals=EMPTY if config.removals is None else load_removal_list(config.removals),
        cache_dir=config.cache_dir,
    )


class _Made(NamedTuple):
    """What a worker hands over for one request: a batch, or the error that ends the run."""

    value: Any
    bad: list[BadSample]
    error: DataError | None = None


@dataclass
class _TrainBatches(Dataset[_Made]):
    reader: Reader
    order: Order
    preprocess: Preprocess
    seed: int
    rank: int
    world_size: int

    def __getitem__(self, ranges: Ranges) -> _Made:
        drawer = Drawer(self.reader, seed=self.seed)
        try:
            drawn = [
                drawer.draw(int(epoch), int(sample), int(source))
                for low, high in rank_slice(ranges, rank=self.rank, world_size=self.world_size)
                for source, epoch, sample in zip(*self.order.take(low, high - low), strict=True)
            ]
        except DataError as error:
            return _Made(None, [], error)
        return _train_batch(drawn, self.preprocess, next_sample=ranges[-1][1])


@dataclass
class _UnindexedBatches(IterableDataset[_Made]):
    samples: UnindexedSamples
    preprocess: Preprocess
    size: int

    def __iter__(self) -> Iterator[_Made]:
        drawn = iter(self.samples)
        while True:
            try:
                batch = list(islice(drawn, self.size))
            except DataError as error:
                yield _Made(None, [], error)
                return
            yield _train_batch(batch, self.preprocess, next_sample=0)


def _train_batch(drawn: list[Drawn], preprocess: Preprocess, *, next_sample: int) -> _Made:
    batch = Batch(
        images=torch.stack([preprocess.train_image(one.pixels, one.rng) for one in drawn]),
        tokens=preprocess.tokenize([one.caption for one in drawn]),
        sample_ids=torch.tensor([_sample_id(one) for one in drawn], dtype=torch.int64),
        sample_index=torch.tensor([one.sample for one in drawn], dtype=torch.int64),
        keys=[one.raw.key for one in drawn],
        next_sample=next_sample,
    )
    return _Made(batch, [bad for one in drawn for bad in one.bad])


@dataclass
class _EvalBatches(Dataset[_Made]):
    samples: EvalSamples
    preprocess: Preprocess

    def __getitem__(self, ranges: Ranges) -> _Made:
        ((first, last),) = ranges
        rows: list[tuple[Tensor, tuple[str, ...], int, bool, str]] = []
        bad: list[BadSample] = []
        for sample in range(first, last):
            row = self._row(sample, bad) if sample < self.samples.num_samples else None
            rows.append(
                row or (torch.zeros((3, *self.preprocess.image_size), dtype=torch.uint8), (), -1, False, "")
            )
        images, captions, classes, mask, keys = zip(*rows, strict=True)
        batch = EvalBatch(
            images=torch.stack(images),
            captions=list(captions),
            class_index=torch.tensor(classes),
            sample_index=torch.arange(first, last),
            mask=torch.tensor(mask),
            keys=list(keys),
        )
        return _Made(batch, bad)

    def _row(
        self, sample: int, bad: list[BadSample]
    ) -> tuple[Tensor, tuple[str, ...], int, bool, str] | None:
        try:
            raw = self.samples.read(sample)
            image = open_image(raw.image, max_pixels=self.samples.max_image_pixels)
        except (SampleError, ShardError) as error:
            place = self.samples.place(sample)
            bad.append(BadSample(*place, str(error), isinstance(error, RemovedError)))
            return None
        return self.preprocess.eval_pixels(image), raw.captions, raw.class_index, True, raw.key


class _Workers:
    """Runs requests through torch's DataLoader: in order, ahead of time, in processes that end with this
    one."""

    def __init__(
        self, dataset: Dataset[_Made] | IterableDataset[_Made], workers: int, *, pin_memory: bool
    ) -> None:
        self._dataset, self._count, self._pin_memory = dataset, workers, pin_memory
        self._iterator: Any = None
        self._runs = 0

    def run(self, requests: Iterable[Ranges] | None) -> Iterator[_Made]:
        """Answers in order. A new run ends the one before. Raises DataError that a worker met, or for its
        death."""
        self.close()
        self._iterator = self._start(requests)
        self._runs += 1
        run = self._runs
        while run == self._runs and self._iterator is not None:
            try:
                made: _Made = next(self._iterator)
            except StopIteration:
                self.close()
                return
            except (RuntimeError, OSError, EOFError) as error:
                if not self._count or not _is_death(error):
                    raise
                self.close()
                raise WorkerError(
                    f"data.workers = {self._count}: a loader process died ({_first_line(error)}); "
                    "most likely it was killed for want of memory: fewer workers need less"
                ) from error
            if made.error is not None:
                self.close()
                raise made.error
            yield made

    def close(self) -> None:
        """End the processes: torch does so when the last reference to its iterator goes."""
        self._iterator = None

    def _start(self, requests: Iterable[Ranges] | None) -> Any:
        loader = DataLoader(
            self._dataset,
            batch_size=None,
            sampler=requests,
            num_workers=self._count,
            collate_fn=_as_it_is,
            pin_memory=self._pin_memory,
            prefetch_factor=PREFETCHED_BATCHES if self._count else None,
            worker_init_fn=_WorkerStart(os.getpid(), threading.current_thread() is threading.main_thread()),
            multiprocessing_context="fork" if self._count else None,
        )
        # torch's SIGCHLD handler raises wherever the main thread happens to be; a dead worker is reported
        # here instead.
        with _sigchld_kept():
            return iter(loader)


def _is_death(error: Exception) -> bool:
    """Whether torch's loader failed for want of a worker: it says so, or cannot reach it for a batch it
    announced."""
    if isinstance(error, RuntimeError):
        return "DataLoader worker" in str(error) and "Caught" not in str(error)
    return "in DataLoader worker process" not in str(error)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


@dataclass(frozen=True)
class _WorkerStart:
    parent: int
    from_main_thread: bool

    def __call__(self, worker: int) -> None:
        # The launcher signals the whole group; the trainer still needs batches to finish its step and save.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if self.from_main_thread:  # the signal is tied to the life of the thread that forked
            ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != self.parent:
                os._exit(1)


@contextmanager
def _sigchld_kept() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before)


def _as_it_is(made: Any) -> Any:
    return made


def _sample_id(drawn: Drawn) -> tuple[int, int]:
    return int.from_bytes(drawn.raw.image_digest[:8], "little", signed=True), _text_id(drawn.caption)


@lru_cache(2**16)
def _text_id(text: str) -> int:
    return int.from_bytes(
        hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()[:8], "little", signed=True
    )
