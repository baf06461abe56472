"""Stored samples to batches in one ordered pass: each sample once over all ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from clipstack.config.models import DataConfig
from clipstack.errors import SampleError, ShardError
from clipstack.loading.reading import read_options, shard_cache
from clipstack.loading.workers import Made, Ranges, Workers
from clipstack.preprocess import Preprocess
from clipstack.world import World
from data_pipelines.images import open_image
from data_pipelines.stream import Reader, make_manifest
from data_pipelines.stream.manifest import Manifest
from data_pipelines.stream.quarantine import BadRate, BadSample
from data_pipelines.stream.reader import describe_place
from data_pipelines.stream.samples import RawSample, RemovedError


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
        self._reader = Reader(manifest, options, open_file=shard_cache(config, drops=True).open)

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
        self._workers = Workers(
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


@dataclass
class _EvalBatches(Dataset[Made]):
    samples: EvalSamples
    preprocess: Preprocess

    def __getitem__(self, ranges: Ranges) -> Made:
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
        return Made(batch, bad)

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
