"""Sources without an index (pipes): read through the webdataset library, with what is not exact there said
aloud."""

from __future__ import annotations

import random
import tarfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from clipstack.config.models import DataConfig
from clipstack.errors import ConfigError, DataError, SampleError
from data_pipelines.images import decode
from data_pipelines.order import sample_seed
from data_pipelines.sources import expand_all, shard_name
from data_pipelines.stream import ReadOptions
from data_pipelines.stream.drawing import Drawn
from data_pipelines.stream.quarantine import BadSample
from data_pipelines.stream.samples import RemovedError, parse_sample

SHUFFLE_BUFFER = 1000
"""Samples that a worker holds to shuffle among; webdataset's buffer starts to give when a tenth is there."""

UNKNOWN_POSITION = -1


class UnindexedWarning(UserWarning):
    """The data cannot be indexed: what is exact elsewhere is not here."""


def announce(config: DataConfig, urls: Sequence[str]) -> None:
    """Say what does not hold for these sources. Raises ConfigError where pipes are not allowed."""
    if not config.allow_pipe:
        raise ConfigError(
            f"data.train = {urls[0]!r}: a pipe runs a shell command; "
            "set data.allow_pipe = true if you trust the recipe"
        )
    warnings.warn(
        f"data.train = {urls[0]!r} cannot be indexed and is read through the webdataset library: samples "
        "come again or stay away within an epoch, resuming starts the source anew, the order depends on "
        "ranks and data.workers, sample_index is unknown. Shards in a folder or under a URL do better.",
        UnindexedWarning,
        stacklevel=4,
    )


@dataclass
class UnindexedSamples(IterableDataset[Drawn]):
    """Samples without end: shards drawn with replacement, so that no rank ever runs short, then a shuffle
    buffer."""

    urls: tuple[str, ...]
    options: ReadOptions
    seed: int
    rank: int

    def __iter__(self) -> Iterator[Drawn]:
        """Raises DataError for a source that cannot be read or gives no usable sample."""
        import webdataset

        info = get_worker_info()
        stream = sample_seed(self.seed, self.rank, info.id if info else 0)
        rng = random.Random(stream)
        bad: list[BadSample] = []
        shuffle = webdataset.shuffle(SHUFFLE_BUFFER, initial=SHUFFLE_BUFFER // 10, rng=rng)
        for stored in shuffle(self._stored(random.Random(stream + 1))):
            own = random.Random(rng.getrandbits(64))
            try:
                raw = parse_sample(_key(stored), _members(stored), self.options)
                pixels = decode(raw.image, max_pixels=self.options.max_image_pixels)
            except SampleError as error:
                shard, key = _key(stored).split("/", 1)
                bad.append(BadSample(shard, key, str(error), isinstance(error, RemovedError)))
                continue
            caption = raw.captions[int(own.random() * len(raw.captions))]
            yield Drawn(UNKNOWN_POSITION, raw, pixels, caption, own, tuple(bad))
            bad = []

    def _stored(self, rng: random.Random) -> Iterator[dict[str, Any]]:
        import webdataset

        while True:
            url = rng.choice(self.urls)
            count = 0
            try:
                for stored in webdataset.tarfile_to_samples()(iter([{"url": url}])):
                    count += 1
                    yield stored
            except (OSError, tarfile.TarError, ValueError) as error:
                raise DataError(f"data.train = {url!r}: cannot be read: {error.args[0]}") from error
            if not count:
                raise DataError(f"data.train = {url!r}: gave no samples")


def expand_unindexed(sources: Sequence[tuple[Sequence[str], float]]) -> tuple[str, ...]:
    """All URLs. Raises ConfigError for weights: nothing is counted here that could keep them."""
    if len(sources) > 1:
        raise ConfigError("data.train: pipes cannot be mixed by weight; give one list of paths")
    return tuple(expand_all(sources[0][0]))


def _members(stored: dict[str, Any]) -> dict[str, bytes]:
    return {name: value for name, value in stored.items() if not name.startswith("__")}


def _key(stored: dict[str, Any]) -> str:
    url = str(stored["__url__"])
    name = "pipe" if url.startswith("pipe:") else shard_name(url)
    return f"{name}/{stored['__key__']}"
