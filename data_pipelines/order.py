"""The order in which samples are used: a pure function of (shard sizes, seed, epoch), read at any position.

An epoch permutes the shards, cuts them into equal lanes at sample boundaries, permutes the samples of each
lane inside windows of a few shards, and takes from the lanes in turn. Nothing is as long as the data set: a
window is drawn when a position in it is asked for. Positions go on through epoch after epoch, so that a
batch may span two.
"""

from __future__ import annotations

import hashlib
import struct
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from data_pipelines.errors import DataError

Ids = npt.NDArray[np.int64]

MIXTURE_BLOCK = 4096
"""A mixture's weights are met exactly in every so many draws: each share is a multiple of 1/4096."""

_CACHED_IDS = 2**23
"""Ids of drawn windows that are kept, 64 MiB of them."""


@dataclass(frozen=True)
class OrderParams:
    """What an order depends on besides the shards. The command line and recipes share these defaults."""

    seed: int = 0
    lanes: int = 4
    """equal parts of an epoch that are read side by side, so that machines share the download"""
    window_shards: int = 4
    """shards of a lane whose samples are permuted together"""
    quantum: int = 1
    """samples taken of a lane before it is the next one's turn"""


class Draws(NamedTuple):
    """What stands at some positions of the order, each (n,)."""

    source: Ids
    epoch: Ids
    """Of its source."""
    sample: Ids
    """Position in the data set: the sources' samples in a row, shard by shard."""


class SourceOrder:
    """The order of one source, without end."""

    def __init__(self, shard_sizes: Sequence[int] | Ids, params: OrderParams, *, stream: int = 0) -> None:
        """`shard_sizes`: samples of each shard. `stream`: number of the source in a mixture. Raises
        DataError."""
        self._sizes = np.asarray(shard_sizes, dtype=np.int64)
        self._firsts = np.concatenate(
            ([0], np.cumsum(self._sizes))
        )  # (shards + 1,) first sample of each shard
        self._params = params
        self._stream = stream
        self.num_samples = int(self._firsts[-1])
        if self.num_samples == 0:
            raise DataError("the shards hold no samples; check the path")
        self._lane_starts = np.arange(params.lanes + 1, dtype=np.int64) * self.num_samples // params.lanes
        shortest = self.num_samples // params.lanes
        self._rounds = shortest // params.quantum
        # What is left of each lane after the full rounds is read lane by lane.
        rests = np.diff(self._lane_starts) - self._rounds * params.quantum
        self._rest_starts = np.concatenate(([0], np.cumsum(rests)))
        self._windows: OrderedDict[tuple[int, int, int], tuple[int, Ids]] = OrderedDict()
        self._cached = 0
        self._shuffled = lru_cache(maxsize=4)(self._shuffle_shards)

    def take(self, start: int, count: int) -> tuple[Ids, Ids]:
        """(epochs, samples), each (count,), at positions start .. start + count."""
        positions = np.arange(start, start + count, dtype=np.int64)
        return self.at(positions)

    def at(self, positions: Ids) -> tuple[Ids, Ids]:
        """(epochs, samples) at any positions, each of the same shape (n,)."""
        epochs, inside = np.divmod(positions, self.num_samples)
        samples = np.empty_like(inside)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            samples[chosen] = self._in_epoch(int(epoch), inside[chosen])
        return epochs, samples

    def _in_epoch(self, epoch: int, positions: Ids) -> Ids:
        lanes, offsets = self._lane_of(positions)
        samples = np.empty_like(positions)
        for lane in np.unique(lanes):
            in_lane = np.flatnonzero(lanes == lane)
            by_offset = in_lane[np.argsort(offsets[in_lane], kind="stable")]
            places = self._lane_starts[lane] + offsets[by_offset]  # in the epoch's row of shuffled shards
            done = 0
            while done < len(places):
                first, ids = self._window_at(epoch, int(lane), int(places[done]))
                end = int(np.searchsorted(places, first + len(ids)))
                samples[by_offset[done:end]] = ids[places[done:end] - first]
                done = end
        return samples

    def _lane_of(self, positions: Ids) -> tuple[Ids, Ids]:
        """(lane, offset in the lane) of positions in an epoch."""
        lanes, quantum = self._params.lanes, self._params.quantum
        turn, inside = np.divmod(positions, quantum * lanes)
        lane = inside // quantum
        offset = turn * quantum + inside % quantum
        rest = positions - self._rounds * quantum * lanes
        late = rest >= 0
        if late.any():
            lane[late] = np.searchsorted(self._rest_starts, rest[late], side="right") - 1
            offset[late] = self._rounds * quantum + rest[late] - self._rest_starts[lane[late]]
        return lane, offset

    def _window_at(self, epoch: int, lane: int, place: int) -> tuple[int, Ids]:
        """(first place, permuted samples) of a lane's window that holds a place in the row of shuffled
        shards."""
        shards, starts = self._shuffled(epoch)
        lane_start, lane_end = int(self._lane_starts[lane]), int(self._lane_starts[lane + 1])
        first_shard = int(np.searchsorted(starts, lane_start, side="right")) - 1
        shard = int(np.searchsorted(starts, place, side="right")) - 1
        number = (shard - first_shard) // self._params.window_shards
        key = (epoch, lane, number)
        if key in self._windows:
            self._windows.move_to_end(key)
            return self._windows[key]
        begin = first_shard + number * self._params.window_shards
        end = min(begin + self._params.window_shards, len(shards))
        pieces = []
        for row in range(begin, end):
            low = max(int(starts[row]), lane_start)
            high = min(int(starts[row + 1]), lane_end)
            first_sample = int(self._firsts[shards[row]]) - int(starts[row])
            if low < high:
                pieces.append(np.arange(first_sample + low, first_sample + high, dtype=np.int64))
        ids = np.concatenate(pieces)
        ids = ids[_permutation(len(ids), "window", self._params.seed, self._stream, epoch, lane, number)]
        self._remember(key, (max(int(starts[begin]), lane_start), ids))
        return self._windows[key]

    def _remember(self, key: tuple[int, int, int], window: tuple[int, Ids]) -> None:
        self._windows[key] = window
        self._cached += len(window[1])
        # One window of each lane must stay, or interleaving would draw them again and again.
        while self._cached > _CACHED_IDS and len(self._windows) > self._params.lanes:
            _, (_, ids) = self._windows.popitem(last=False)
            self._cached -= len(ids)

    def _shuffle_shards(self, epoch: int) -> tuple[Ids, Ids]:
        """(shards in the epoch's order, (shards + 1,) where each starts in the epoch's row)."""
        shards = _permutation(len(self._sizes), "shards", self._params.seed, self._stream, epoch)
        return shards, np.concatenate(([0], np.cumsum(self._sizes[shards])))


class Order:
    """The order of a data set of one or more weighted sources.

    With several, every run of MIXTURE_BLOCK draws holds each source in its share, in an order of its own;
    each source is read without replacement, epoch after epoch, at its own pace.
    """

    def __init__(
        self, sources: Sequence[Sequence[int] | Ids], weights: Sequence[float], params: OrderParams
    ) -> None:
        """`sources`: for each the samples of its shards. Raises DataError for an empty or too light
        source."""
        self.params = params
        self._sources = [SourceOrder(sizes, params, stream=i) for i, sizes in enumerate(sources)]
        self._bases = np.concatenate(([0], np.cumsum([source.num_samples for source in self._sources])))
        self.num_samples = int(self._bases[-1])
        self._quotas = _quotas(weights)
        self._blocks = lru_cache(maxsize=8)(self._draw_block)

    def take(self, start: int, count: int) -> Draws:
        """What stands at positions start .. start + count."""
        if len(self._sources) == 1:
            epochs, samples = self._sources[0].take(start, count)
            return Draws(np.zeros(count, dtype=np.int64), epochs, samples)
        positions = np.arange(start, start + count, dtype=np.int64)
        source = np.empty(count, dtype=np.int64)
        turn = np.empty(count, dtype=np.int64)  # how many draws of its source came before
        for block in range(start // MIXTURE_BLOCK, (start + count - 1) // MIXTURE_BLOCK + 1):
            chosen = positions // MIXTURE_BLOCK == block
            sources, ranks = self._blocks(block)
            at = positions[chosen] % MIXTURE_BLOCK
            source[chosen] = sources[at]
            turn[chosen] = block * self._quotas[sources[at]] + ranks[at]
        epoch = np.empty(count, dtype=np.int64)
        sample = np.empty(count, dtype=np.int64)
        for i, one in enumerate(self._sources):
            mine = source == i
            epoch[mine], inside = one.at(turn[mine])
            sample[mine] = inside + self._bases[i]
        return Draws(source, epoch, sample)

    def epochs(self, position: int) -> list[float]:
        """How many epochs of each source lie before a position."""
        if len(self._sources) == 1:
            return [position / self.num_samples]
        block, inside = divmod(position, MIXTURE_BLOCK)
        drawn = block * self._quotas + np.bincount(
            self._blocks(block)[0][:inside], minlength=len(self._quotas)
        )
        return [float(n) / source.num_samples for n, source in zip(drawn, self._sources, strict=True)]

    def _draw_block(self, block: int) -> tuple[Ids, Ids]:
        """((4096,) source of each draw, (4096,) how many draws of that source come before it in the
        block)."""
        in_a_row = np.repeat(np.arange(len(self._quotas)), self._quotas)
        sources = in_a_row[_permutation(MIXTURE_BLOCK, "mixture", self.params.seed, block)]
        ranks = np.empty(MIXTURE_BLOCK, dtype=np.int64)
        for i, quota in enumerate(self._quotas):
            ranks[sources == i] = np.arange(quota)
        return sources, ranks


def _quotas(weights: Sequence[float]) -> Ids:
    """Draws of each source in a block, by largest remainder."""
    exact = np.asarray(weights, dtype=np.float64) / sum(weights) * MIXTURE_BLOCK
    quotas = np.floor(exact).astype(np.int64)
    most_left = np.argsort(-(exact - quotas), kind="stable")
    quotas[most_left[: MIXTURE_BLOCK - int(quotas.sum())]] += 1
    if (quotas == 0).any():
        light = int(np.flatnonzero(quotas == 0)[0])
        raise DataError(
            f"data.train[{light}].weight = {weights[light]}: less than 1/{MIXTURE_BLOCK} of the mixture; "
            "raise it or leave the source out"
        )
    return quotas


def batch_ranges(
    start: int, batch_size: int, skip: Sequence[tuple[int, int]] = ()
) -> Iterator[tuple[tuple[int, int], ...]]:
    """Global batch after global batch from a position: its ranges [low, high) of positions, B in all.

    Positions inside a window [low, high) of `skip` are jumped over.
    """
    windows = sorted(window for window in skip if window[0] < window[1])
    at = start
    while True:
        ranges: list[tuple[int, int]] = []
        missing = batch_size
        while missing:
            for low, high in windows:
                if low <= at < high:
                    at = high
            end = min([at + missing, *(low for low, _ in windows if low > at)])
            ranges.append((at, end))
            missing -= end - at
            at = end
        yield tuple(ranges)


def rank_slice(
    ranges: Sequence[tuple[int, int]], *, rank: int, world_size: int
) -> tuple[tuple[int, int], ...]:
    """The ranges of positions that a rank takes of a global batch: its contiguous share."""
    size = sum(high - low for low, high in ranges)
    first, last = size * rank // world_size, size * (rank + 1) // world_size
    out = []
    done = 0
    for low, high in ranges:
        a, b = max(first, done), min(last, done + high - low)
        if a < b:
            out.append((low + a - done, low + b - done))
        done += high - low
    return tuple(out)


def sample_seed(seed: int, epoch: int, sample: int) -> int:
    """The seed (64 bits) of everything random that happens to a sample in an epoch, wherever it is loaded."""
    return int.from_bytes(_key("sample", seed, epoch, sample)[:8], "little")


def _key(label: str, *numbers: int) -> bytes:
    return hashlib.blake2b(
        label.encode() + struct.pack(f"<{len(numbers)}q", *numbers), digest_size=16
    ).digest()


def _permutation(n: int, label: str, *numbers: int) -> Ids:
    """A permutation of range(n) that depends on the key alone, under any version of numpy.

    numpy promises a bit generator's raw stream for good, but not what Generator.permutation makes of it.
    """
    raw = np.random.Philox(key=int.from_bytes(_key(label, *numbers), "little")).random_raw(n)
    return np.argsort(raw, kind="stable")
