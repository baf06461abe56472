"""What training takes at a place of the order: a decoded sample, or what stands in for one that cannot
be used."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple

from data_pipelines.errors import DataError, SampleError, ShardError
from data_pipelines.images import Pixels, decode
from data_pipelines.order import sample_seed
from data_pipelines.stream.quarantine import BadSample
from data_pipelines.stream.reader import Reader, describe_place
from data_pipelines.stream.samples import RawSample, RemovedError

SUBSTITUTES_IN_SHARD = 8
SUBSTITUTES = 64


class Drawn(NamedTuple):
    """A usable sample at a position of the order."""

    sample: int
    """Position in the data set of the sample that is used."""
    raw: RawSample
    pixels: Pixels
    caption: str
    rng: random.Random
    """For augmentation: the same whenever this sample is drawn in this epoch."""
    bad: tuple[BadSample, ...]
    """What stood here first and could not be used."""


class Drawer:
    """What stands at (epoch, sample) of the order, with a bad sample replaced, always by the same one."""

    def __init__(self, reader: Reader, *, seed: int) -> None:
        self.reader = reader
        self._seed = seed

    def draw(self, epoch: int, sample: int, source: int = 0) -> Drawn:
        """Raises DataError if nothing usable is found in SUBSTITUTES attempts."""
        bad: list[BadSample] = []
        for candidate in self._candidates(epoch, sample, source):
            rng = random.Random(sample_seed(self._seed, epoch, candidate))
            try:
                raw = self.reader.read(candidate)
                pixels = decode(raw.image, max_pixels=self.reader.options.max_image_pixels)
            except (SampleError, ShardError) as error:
                bad.append(self._describe(candidate, error))
                continue
            caption = raw.captions[int(rng.random() * len(raw.captions))]
            return Drawn(candidate, raw, pixels, caption, rng, tuple(bad))
        raise DataError(
            f"{bad[0].shard}/{bad[0].key}: {bad[0].reason}; no usable sample was found in its place "
            f"in {len(bad)} attempts: run `clipstack data verify`"
        )

    def _candidates(self, epoch: int, sample: int, source: int) -> Iterator[int]:
        """The sample itself, then others drawn from its shard, then from its source."""
        yield sample
        shard, _ = self.reader.locate(sample)
        rng = random.Random(sample_seed(self._seed, epoch, -1 - sample))
        first, size = self.reader.first_of(shard), self.reader.manifest.shards[shard].num_samples
        for _ in range(SUBSTITUTES_IN_SHARD):
            yield first + int(rng.random() * size)
        low, high = self._bounds(source)
        for _ in range(SUBSTITUTES - SUBSTITUTES_IN_SHARD):
            yield low + int(rng.random() * (high - low))

    def _bounds(self, source: int) -> tuple[int, int]:
        shards = [len(one.shards) for one in self.reader.manifest.sources]
        first = sum(shards[:source])
        return self.reader.first_of(first), self.reader.first_of(first + shards[source])

    def _describe(self, sample: int, error: SampleError | ShardError) -> BadSample:
        shard, key = describe_place(self.reader, sample)
        return BadSample(shard, key, str(error), removed=isinstance(error, RemovedError))
