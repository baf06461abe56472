"""The queue in front of the device, with a runtime that works when the test says so."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from typing import Any

import numpy as np
import pytest

from serve.batching import Batcher, BatchLimits, Budget, DrainRate, Kind, SharedCores
from serve.errors import ErrorCode, ServeError
from tests.serve.fakes import END, START, FakeRuntime

FOREVER = float("inf")


def ids(*tokens: int) -> np.ndarray[Any, Any]:
    return np.array([START, *tokens, END], dtype=np.int64)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@asynccontextmanager
async def batching(runtime: FakeRuntime, **options: Any) -> AsyncIterator[Batcher]:
    with ThreadPoolExecutor(options.get("lanes", 1)) as device:
        yield Batcher(runtime, device=device, **options)
        runtime.gate.set()


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 30))


async def until_started(runtime: FakeRuntime) -> None:
    assert await asyncio.to_thread(runtime.started.wait, 10)


def test_a_device_with_two_lanes_computes_two_batches_and_lets_the_rest_gather(runtime: FakeRuntime) -> None:
    async def scenario() -> None:
        runtime.hold()
        async with batching(runtime, lanes=2) as batcher:
            running = [batcher.submit(Kind.TEXT, ids(n), deadline=FOREVER) for n in range(2)]
            waiting = [batcher.submit(Kind.TEXT, ids(n), deadline=FOREVER) for n in range(3, 6)]
            assert batcher.depth(Kind.TEXT) == 3
            runtime.gate.set()
            vectors = await asyncio.gather(*running, *waiting)
        assert runtime.batches == [("text", 1), ("text", 1), ("text", 3)]
        for vector, token in zip(vectors, (0, 1, 3, 4, 5), strict=True):
            np.testing.assert_array_equal(vector, runtime.vector(ids(token).tobytes()))

    run(scenario)


TWO_CORES = SharedCores(total=2, preparing=2, per_batch=1)


def test_lanes_that_share_cores_take_equal_parts(runtime: FakeRuntime) -> None:
    async def scenario() -> None:
        runtime.hold()
        async with batching(runtime, lanes=2, cores=TWO_CORES) as batcher:
            first = batcher.submit(Kind.TEXT, ids(0), deadline=FOREVER)
            second = batcher.submit(Kind.TEXT, ids(1), deadline=FOREVER)
            rest = [batcher.submit(Kind.TEXT, ids(n), deadline=FOREVER) for n in range(2, 12)]
            runtime.gate.set()
            await asyncio.gather(first, second, *rest)
        sizes = [size for _, size in runtime.batches]
        assert sizes[:2] == [1, 1] and sum(sizes) == 12 and max(sizes) == 6  # (10 waiting + 1 computing) / 2

    run(scenario)


def image(number: int) -> np.ndarray[Any, Any]:
    return np.full((3, 8, 8), number, dtype=np.uint8)


async def one_batch_of_10_s(batcher: Batcher, runtime: FakeRuntime, clock: Clock) -> None:
    runtime.hold()
    first = batcher.submit(Kind.IMAGE, image(0), deadline=FOREVER)
    await until_started(runtime)
    clock.now += 10
    runtime.gate.set()
    await first


@pytest.mark.parametrize("way", ["submitted", "failed", "heavy"])
def test_a_small_batch_waits_for_what_the_busy_cores_are_preparing_and_for_nothing_else(
    runtime: FakeRuntime, way: str
) -> None:
    async def scenario() -> None:
        clock = Clock()
        async with batching(runtime, lanes=2, cores=TWO_CORES, clock=clock) as batcher:
            await one_batch_of_10_s(batcher, runtime, clock)
            runtime.hold()
            busy = batcher.submit(Kind.IMAGE, image(1), deadline=FOREVER)
            await until_started(runtime)
            with batcher.expect(Kind.IMAGE) as forget:
                small = batcher.submit(Kind.IMAGE, image(2), deadline=FOREVER)
                assert batcher.depth(Kind.IMAGE) == 1, "a core computes, the other one prepares"
                if way == "submitted":
                    rest = [batcher.submit(Kind.IMAGE, image(3), deadline=FOREVER)]
                elif way == "heavy":
                    forget()
                    assert batcher.depth(Kind.IMAGE) == 0
            assert batcher.depth(Kind.IMAGE) == 0
            runtime.gate.set()
            await asyncio.gather(busy, small, *(rest if way == "submitted" else []))
        assert runtime.batches == [("image", 1), ("image", 1), ("image", 2 if way == "submitted" else 1)]

    run(scenario)


def test_nothing_waits_longer_than_a_batch_takes_nor_while_a_core_is_idle(runtime: FakeRuntime) -> None:
    async def scenario() -> None:
        clock = Clock()
        async with batching(runtime, lanes=2, cores=TWO_CORES, clock=clock) as batcher:
            await one_batch_of_10_s(batcher, runtime, clock)
            runtime.hold()
            with batcher.expect(Kind.IMAGE):  # one core prepares, and the other is idle
                alone = batcher.submit(Kind.IMAGE, image(1), deadline=FOREVER)
                assert batcher.depth(Kind.IMAGE) == 0
                small = batcher.submit(Kind.IMAGE, image(2), deadline=FOREVER)
                assert batcher.depth(Kind.IMAGE) == 1
                clock.now += 10
                with batcher.expect(Kind.IMAGE):
                    pass
                assert batcher.depth(Kind.IMAGE) == 0
            runtime.gate.set()
            await asyncio.gather(alone, small)

    run(scenario)


def test_an_idle_device_starts_at_once_and_what_gathers_meanwhile_is_the_next_batch(
    runtime: FakeRuntime,
) -> None:
    async def scenario() -> None:
        runtime.hold()
        async with batching(runtime) as batcher:
            first = batcher.submit(Kind.TEXT, ids(1), deadline=FOREVER)
            await until_started(runtime)
            rest = [batcher.submit(Kind.TEXT, ids(n), deadline=FOREVER) for n in range(5)]
            runtime.gate.set()
            await asyncio.gather(first, *rest)
        assert runtime.batches == [("text", 1), ("text", 5)]

    run(scenario)


def test_every_item_gets_its_own_vector_whatever_it_was_batched_with(runtime: FakeRuntime) -> None:
    async def scenario() -> None:
        async with batching(runtime, limits=BatchLimits(texts=3)) as batcher:
            futures = [batcher.submit(Kind.TEXT, ids(n), deadline=FOREVER) for n in range(20)]
            vectors = await asyncio.gather(*futures)
        for n, vector in enumerate(vectors):
            np.testing.assert_array_equal(vector, runtime.vector(ids(n).tobytes()))
        assert max(size for _, size in runtime.batches) <= 3

    run(scenario)


def test_batches_are_limited_in_bytes_too(runtime: FakeRuntime) -> None:
    async def scenario() -> None:
        runtime.hold()
        async with batching(runtime, limits=BatchLimits(size_bytes=2 * ids(1).nbytes)) as batcher:
            futures = [batcher.submit(Kind.TEXT, ids(n), deadline=FOREVER) for n in range(5)]
            runtime.gate.set()
            await asyncio.gather(*futures)
        assert runtime.batches == [("text", 1), ("text", 2), ("text", 2)]

    run(scenario)


def test_expired_items_are_answered_and_never_computed(runtime: FakeRuntime) -> None:
    async def scenario() -> None:
        clock = Clock()
        runtime.hold()
        async with batching(runtime, clock=clock) as batcher:
            first = batcher.submit(Kind.TEXT, ids(1), deadline=FOREVER)
            late = batcher.submit(Kind.TEXT, ids(2), deadline=clock.now + 1)
            good = batcher.submit(Kind.TEXT, ids(3), deadline=clock.now + 9)
            clock.now += 5
            runtime.gate.set()
            await asyncio.gather(first, good)
            with pytest.raises(ServeError) as caught:
                await late
            assert caught.value.code is ErrorCode.DEADLINE_EXCEEDED
        assert runtime.batches == [("text", 1), ("text", 1)]

    run(scenario)


def test_withdrawn_items_are_never_computed(runtime: FakeRuntime) -> None:
    async def scenario() -> None:
        runtime.hold()
        async with batching(runtime) as batcher:
            first = batcher.submit(Kind.TEXT, ids(1), deadline=FOREVER)
            gone = batcher.submit(Kind.TEXT, ids(2), deadline=FOREVER)
            kept = batcher.submit(Kind.TEXT, ids(3), deadline=FOREVER)
            gone.cancel()
            runtime.gate.set()
            await asyncio.gather(first, kept)
        assert runtime.batches == [("text", 1), ("text", 1)]

    run(scenario)


def test_an_item_that_the_device_cannot_do_fails_alone(runtime: FakeRuntime) -> None:
    async def scenario() -> None:
        runtime.fail_on = {13}
        runtime.hold()
        async with batching(runtime) as batcher:
            futures = [batcher.submit(Kind.TEXT, ids(n), deadline=FOREVER) for n in range(20)]
            runtime.gate.set()
            results = await asyncio.gather(*futures, return_exceptions=True)
            again = await batcher.submit(Kind.TEXT, ids(7), deadline=FOREVER)
        failed = [n for n, result in enumerate(results) if isinstance(result, ServeError)]
        assert failed == [13]
        np.testing.assert_array_equal(again, runtime.vector(ids(7).tobytes()))

    run(scenario)


def test_an_unforeseen_fault_of_the_engine_fails_its_batch_and_not_the_queue(runtime: FakeRuntime) -> None:
    class Broken(FakeRuntime):
        def encode_texts(self, texts: Any) -> Any:
            if any(13 in row for row in texts):
                raise KeyError("a fault nobody planned for")
            return super().encode_texts(texts)

    async def scenario() -> None:
        engine = Broken()
        async with batching(engine) as batcher:
            with pytest.raises(ServeError) as caught:
                await batcher.submit(Kind.TEXT, ids(13), deadline=FOREVER)
            assert caught.value.code is ErrorCode.INFERENCE_FAILED
            await batcher.submit(Kind.TEXT, ids(1), deadline=FOREVER)

    run(scenario)


def test_vectors_that_are_not_numbers_are_errors(runtime: FakeRuntime) -> None:
    class Nan(FakeRuntime):
        def vector(self, content: bytes) -> Any:
            return super().vector(content) * (np.nan if content == ids(5).tobytes() else 1)

    async def scenario() -> None:
        async with batching(Nan()) as batcher:
            results = await asyncio.gather(
                *(batcher.submit(Kind.TEXT, ids(n), deadline=FOREVER) for n in (4, 5, 6)),
                return_exceptions=True,
            )
        assert [isinstance(result, ServeError) for result in results] == [False, True, False]

    run(scenario)


def test_the_kind_that_has_waited_longest_goes_first(runtime: FakeRuntime) -> None:
    async def scenario() -> None:
        clock = Clock()
        runtime.hold()
        async with batching(runtime, clock=clock) as batcher:
            image = np.zeros((3, 8, 8), dtype=np.uint8)
            futures = [batcher.submit(Kind.TEXT, ids(0), deadline=FOREVER)]
            for kind, payload in ((Kind.IMAGE, image), (Kind.TEXT, ids(1)), (Kind.IMAGE, image)):
                clock.now += 1
                futures.append(batcher.submit(kind, payload, deadline=FOREVER))
            runtime.gate.set()
            await asyncio.gather(*futures)
        assert runtime.batches == [("text", 1), ("image", 2), ("text", 1)]

    run(scenario)


def test_a_budget_refuses_what_does_not_fit_and_frees_what_is_done() -> None:
    budget = Budget(10)
    with budget.reserve(8, deadline=FOREVER):
        with pytest.raises(ServeError) as caught, budget.reserve(3, deadline=FOREVER):
            pass
        assert caught.value.code is ErrorCode.QUEUE_FULL
        assert caught.value.retry_after_s is not None
        with budget.reserve(2, deadline=FOREVER):
            assert budget.items == 10
    with pytest.raises(ServeError) as caught, budget.reserve(11, deadline=FOREVER):
        pass
    assert caught.value.code is ErrorCode.TOO_MANY_ITEMS
    assert budget.items == 0


def test_a_budget_refuses_what_would_be_late_and_says_when_to_return() -> None:
    clock = Clock()
    rate = DrainRate(backlog=1)
    for _ in range(100):  # ten a second
        clock.now += 0.1
        rate.answered(1, outstanding=50, now=clock.now)
    assert rate.per_s(clock.now) == pytest.approx(10, rel=0.02)
    budget = Budget(1000, rate=rate, clock=clock)
    with budget.reserve(30, deadline=FOREVER):
        with budget.reserve(1, deadline=clock.now + 5):
            pass
        with pytest.raises(ServeError) as caught, budget.reserve(1, deadline=clock.now + 2):
            pass
    assert caught.value.code is ErrorCode.QUEUE_FULL
    assert caught.value.retry_after_s == pytest.approx(
        1.5, abs=0.3
    )  # 31 items, of which 16 can be done in time


def test_the_drain_rate_leaves_out_times_without_a_backlog() -> None:
    rate = DrainRate(backlog=8)
    for second in range(100):
        rate.answered(1, outstanding=0, now=float(second))
    assert rate.per_s(99.0) is None


def test_a_rate_measured_while_the_process_got_no_time_is_forgotten() -> None:
    """With 2 items a second, 1 is let in within a second: never the 16 that a new measure needs."""
    clock = Clock()
    rate = DrainRate(backlog=16)
    for _ in range(10):
        clock.now += 0.5
        rate.answered(1, outstanding=50, now=clock.now)
    budget = Budget(1000, rate=rate, clock=clock)

    def most_let_in() -> int:
        held = [budget.reserve(1, deadline=clock.now + 1) for _ in range(40)]
        count = 0
        try:
            for entry in held:
                entry.__enter__()
                count += 1
        except ServeError:
            pass
        for entry in held[:count]:  # the requests fail: what was not answered is not measured
            with suppress(RuntimeError):
                entry.__exit__(RuntimeError, RuntimeError(), None)
        return count

    assert most_let_in() == 1
    clock.now += 6
    assert most_let_in() == 40
