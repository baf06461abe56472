"""The order function: exactly once, elastic, the same from any position."""

from __future__ import annotations

import time
from itertools import islice, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.errors import DataError
from data_pipelines.order import (
    MIXTURE_BLOCK,
    Order,
    OrderParams,
    SourceOrder,
    batch_ranges,
    rank_slice,
    sample_seed,
)

PINNED = [9, 15, 11, 19, 13, 18, 12, 16, 10, 17, 6, 4, 8, 0, 7, 1, 5, 3, 14, 2]
PINNED_SEED = 11801706642324498625

SIZES = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(lambda sizes: sum(sizes) > 0)
PARAMS = st.builds(
    OrderParams,
    seed=st.integers(0, 2**31 - 1),
    lanes=st.integers(1, 9),
    window_shards=st.integers(1, 5),
    quantum=st.integers(1, 7),
)


def one_source(sizes: list[int], params: OrderParams) -> Order:
    return Order([sizes], [1.0], params)


def rank_samples(order: Order, ranges: tuple[tuple[int, int], ...], rank: int, world_size: int) -> list[int]:
    parts = rank_slice(ranges, rank=rank, world_size=world_size)
    return [int(sample) for low, high in parts for sample in order.take(low, high - low).sample]


@given(SIZES, PARAMS)
@settings(deadline=None)
def test_each_of_three_epochs_holds_every_sample_once(sizes: list[int], params: OrderParams) -> None:
    order = one_source(sizes, params)
    n = order.num_samples
    draws = order.take(0, 3 * n)
    for epoch in range(3):
        part = slice(epoch * n, (epoch + 1) * n)
        assert sorted(draws.sample[part]) == list(range(n))
        assert set(draws.epoch[part]) == {epoch}


@given(SIZES, PARAMS, st.integers(0, 500), st.integers(1, 60))
@settings(deadline=None)
def test_any_part_read_alone_equals_the_whole(
    sizes: list[int], params: OrderParams, start: int, count: int
) -> None:
    whole = one_source(sizes, params).take(0, start + count).sample[start:]
    assert list(one_source(sizes, params).take(start, count).sample) == list(whole)


@given(SIZES, PARAMS, st.data())
@settings(deadline=None, max_examples=60)
def test_epochs_are_exact_for_any_ranks_and_across_a_change_of_batch_size(
    sizes: list[int], params: OrderParams, data: st.DataObject
) -> None:
    """Three epochs in batches of 24 and then of 48; at each batch the ranks' union is the same set for any
    world."""
    order = one_source(sizes, params)
    n = order.num_samples
    first = data.draw(st.integers(0, 3 * n // 24)) * 24
    batches = list(islice(batch_ranges(0, 24), first // 24)) + list(
        islice(batch_ranges(first, 48), 3 * n // 48 + 1)
    )
    reference = [
        [s for low, high in ranges for s in order.take(low, high - low).sample] for ranges in batches
    ]
    for world_size in (1, 2, 3, 4, 6, 8):
        shares = [
            [rank_samples(order, ranges, r, world_size) for r in range(world_size)] for ranges in batches
        ]
        assert all(len({len(share) for share in one}) == 1 for one in shares)
        assert [[s for share in one for s in share] for one in shares] == reference
    seen = [s for batch in reference for s in batch][: 3 * n]
    assert np.bincount(seen, minlength=n).tolist() == [3] * n


@given(SIZES, PARAMS)
@settings(deadline=None, max_examples=40)
def test_lanes_and_windows_follow_the_definition(sizes: list[int], params: OrderParams) -> None:
    """Against a slow reference: lay the shuffled shards in a row, cut lanes, compare the set of each
    window."""
    source = SourceOrder(sizes, params)
    shards, _ = source._shuffled(0)
    firsts = np.concatenate(([0], np.cumsum(sizes)))
    row = [(int(s), int(i)) for s in shards for i in range(firsts[s], firsts[s + 1])]
    bounds = [len(row) * lane // params.lanes for lane in range(params.lanes + 1)]
    lanes = [row[low:high] for low, high in pairwise(bounds)]
    left = [list(lane) for lane in lanes]
    samples = iter(source.take(0, len(row))[1])
    full_rounds = min(map(len, lanes)) // params.quantum
    turns = [(lane, params.quantum) for _ in range(full_rounds) for lane in range(params.lanes)]
    turns += [(lane, len(lanes[lane]) - full_rounds * params.quantum) for lane in range(params.lanes)]
    for lane, count in turns:
        for _ in range(count):
            remaining = left[lane]
            ordered_shards = list(dict.fromkeys(int(s) for s in shards))
            rank = {shard: i for i, shard in enumerate(ordered_shards)}
            begin = rank_of_first(lanes[lane], rank, bounds[lane], sizes, ordered_shards)
            window = (rank[remaining[0][0]] - begin) // params.window_shards
            sample = int(next(samples))
            match = next(item for item in remaining if item[1] == sample)
            assert (rank[match[0]] - begin) // params.window_shards == window
            remaining.remove(match)


def rank_of_first(
    lane: list[tuple[int, int]], rank: dict[int, int], start: int, sizes: list[int], shards: list[int]
) -> int:
    """Place of the shard that a lane starts in, among the shuffled shards, empty ones included as the order
    does."""
    ends = np.cumsum([sizes[s] for s in shards])
    starts = ends - [sizes[s] for s in shards]
    return int(np.searchsorted(starts, start, side="right")) - 1


def test_another_seed_or_epoch_is_another_order() -> None:
    sizes = [50] * 8
    a, b = one_source(sizes, OrderParams(seed=1)), one_source(sizes, OrderParams(seed=2))
    assert (a.take(0, 400).sample != b.take(0, 400).sample).mean() > 0.9
    assert (a.take(0, 400).sample != a.take(400, 400).sample).mean() > 0.9


def test_the_order_is_the_same_under_every_version() -> None:
    """Positions in checkpoints mean something only as long as this holds."""
    order = one_source([5, 3, 8, 4], OrderParams(seed=7, lanes=2, window_shards=2, quantum=1))
    assert order.take(0, 20).sample.tolist() == PINNED
    assert sample_seed(1, 2, 3) == PINNED_SEED


def test_neighbours_in_the_shards_are_neighbours_no_more_often_than_chance() -> None:
    n = 20_000
    pairs = 0
    for seed in range(5):
        samples = one_source([2000] * 10, OrderParams(seed=seed)).take(0, n).sample
        pairs += int((np.abs(np.diff(samples)) == 1).sum())
    # Chance: 2 (n - 1) / n pairs an epoch, Poisson; 5 epochs expect 10, and 25 lies 4.7 standard
    # deviations above.
    assert pairs <= 25


def test_a_cold_seek_in_400_million_samples_is_fast() -> None:
    order = one_source([10_000] * 40_000, OrderParams(seed=1, lanes=16, window_shards=8))
    began = time.process_time()
    order.take(250_000_000, 4096)
    assert time.process_time() - began < 1.0  # 0.17 s when nothing else runs


@given(
    st.lists(st.tuples(SIZES, st.floats(0.05, 10)), min_size=2, max_size=4),
    PARAMS,
    st.integers(0, 3 * MIXTURE_BLOCK),
)
@settings(deadline=None, max_examples=25)
def test_a_mixture_keeps_its_weights_and_reads_each_source_without_replacement(
    sources: list[tuple[list[int], float]], params: OrderParams, start: int
) -> None:
    sizes, weights = [s for s, _ in sources], [w for _, w in sources]
    order = Order(sizes, weights, params)
    draws = order.take(0, 2 * MIXTURE_BLOCK)
    shares = np.bincount(draws.source, minlength=len(sources)) / len(draws.source)
    assert np.abs(shares - np.array(weights) / sum(weights)).max() <= 1 / MIXTURE_BLOCK
    base = 0
    for i, source in enumerate(sizes):
        n = sum(source)
        mine = draws.sample[draws.source == i]
        for epoch in range(len(mine) // n):
            assert sorted(mine[epoch * n : (epoch + 1) * n] - base) == list(range(n))
        assert len(mine) / n == pytest.approx(order.epochs(2 * MIXTURE_BLOCK)[i])
        base += n
    later = Order(sizes, weights, params).take(start, 50)
    assert list(later.sample) == list(order.take(0, start + 50).sample[start:])


def test_a_weight_too_small_to_be_drawn_is_refused() -> None:
    with pytest.raises(DataError, match=r"data\.train\[1\]\.weight"):
        Order([[5], [5]], [1.0, 1e-6], OrderParams())


@given(
    st.lists(st.tuples(st.integers(0, 300), st.integers(0, 40)), max_size=4),
    st.integers(0, 100),
    st.integers(1, 30),
)
def test_batches_jump_over_windows_and_stay_whole(
    windows: list[tuple[int, int]], start: int, size: int
) -> None:
    skip = [(low, low + length) for low, length in windows]
    positions = [
        p
        for ranges in islice(batch_ranges(start, size, skip), 12)
        for low, high in ranges
        for p in range(low, high)
    ]
    wanted = (p for p in range(start, 10_000) if not any(low <= p < high for low, high in skip))
    assert positions == list(islice(wanted, 12 * size))


def test_an_empty_data_set_is_refused() -> None:
    with pytest.raises(DataError, match="no samples"):
        one_source([0, 0], OrderParams())
