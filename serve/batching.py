"""Work-conserving dynamic batching in plain asyncio: a bounded queue in front of one device.

An idle device starts at once with whatever waits. While it is busy the queue fills, and what has gathered by
the time it is free is the next batch. Nobody waits for a batch to fill up, and nothing polls. A device may
have several lanes: batches that it computes side by side.

A CPU is its own decoder: while its cores are busy with images that are about to come, a batch that were begun
now would only slow those down, and be a small one. So there a lane leaves what waits for a moment longer, and
takes no more than its share.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from serve.errors import ErrorCode, ServeError
from serve.runtime import Float32, Runtime

logger = logging.getLogger("serve.batching")

Payload = npt.NDArray[Any]
Clock = Callable[[], float]
# Share of a request's time that the queue before it may be expected to take; the rest is for its own
# computation.
SAFE_SHARE = 0.8


class Kind(StrEnum):
    IMAGE = "image"
    TEXT = "text"


@dataclass(frozen=True)
class BatchLimits:
    images: int = 32
    texts: int = 64
    size_bytes: int = 64 * 1024 * 1024

    def items(self, kind: Kind) -> int:
        return self.images if kind is Kind.IMAGE else self.texts


@dataclass(frozen=True)
class SharedCores:
    """Cores that compute batches and prepare items as well."""

    total: int
    preparing: int  # threads that prepare
    per_batch: int  # threads of one batch while all lanes are busy

    def are_busy(self, *, coming: int, batches: int) -> bool:
        """Whether none is idle with `coming` items in preparation and `batches` being computed."""
        return min(coming, self.preparing) + batches * self.per_batch >= self.total


class BatchObserver(Protocol):
    """What the metrics want to hear from a batcher."""

    def batch_done(self, kind: Kind, *, size: int, waited_s: float, device_s: float) -> None: ...

    def expired(self, kind: Kind) -> None: ...


class SilentObserver:
    def batch_done(self, kind: Kind, *, size: int, waited_s: float, device_s: float) -> None:
        """Nobody listens."""

    def expired(self, kind: Kind) -> None:
        """Nobody listens."""


@dataclass(eq=False)
class _Item:
    kind: Kind
    payload: Payload
    deadline: float
    queued_at: float
    result: asyncio.Future[Float32]


class DrainRate:
    """Items answered per second while there was a backlog: what the whole pipeline can do, not what was asked
    of it.

    Intervals that began with fewer than `backlog` items outstanding say nothing about capacity and are left
    out. A rate that nothing has confirmed for `memory_s` is forgotten: while the process got no time it may
    have been so low that no backlog is let in any more, by which it would ever be measured again.
    """

    def __init__(self, *, backlog: int = 16, memory_s: float = 5.0) -> None:
        self._backlog = backlog
        self._memory_s = memory_s
        self._items = 0.0
        self._seconds = 0.0
        self._since: float | None = None
        self._confirmed_at = -math.inf

    def answered(self, count: int, *, outstanding: int, now: float) -> None:
        """Note `count` items answered at `now`, with `outstanding` still to do."""
        if self._since is not None:
            elapsed_s = now - self._since
            keep = math.exp(-elapsed_s / self._memory_s)
            self._items = self._items * keep + count
            self._seconds = self._seconds * keep + elapsed_s
            self._confirmed_at = now
        self._since = now if outstanding >= self._backlog else None

    def per_s(self, now: float) -> float | None:
        """None until a backlog was seen for a while, and when the last is long ago."""
        if now - self._confirmed_at > self._memory_s:
            self._items = self._seconds = 0.0
        return self._items / self._seconds if self._seconds > 0.05 and self._items > 0 else None


class Budget:
    """How many items one model may have accepted and not yet answered.

    A request is refused at the door when its items do not fit, or when at the rate measured they would only
    be computed after its deadline: serving it late would take the device from requests that can still make
    it.
    """

    def __init__(
        self, max_items: int, *, rate: DrainRate | None = None, clock: Clock = time.monotonic
    ) -> None:
        self.max_items = max_items
        self.items = 0
        self._rate = rate or DrainRate()
        self._clock = clock

    @contextmanager
    def reserve(self, count: int, *, deadline: float) -> Iterator[None]:
        """Hold room for `count` items. Raises ServeError queue_full, saying when to come back."""
        self._admit(count, time_left_s=deadline - self._clock())
        self.items += count
        answered = False
        try:
            yield
            answered = True
        finally:
            self.items -= count
            if answered:
                self._rate.answered(count, outstanding=self.items, now=self._clock())

    def _admit(self, count: int, *, time_left_s: float) -> None:
        if count > self.max_items:
            message = f"{count} items in one request; this server holds {self.max_items} at once: send fewer"
            raise ServeError(ErrorCode.TOO_MANY_ITEMS, message)
        if self.items + count > self.max_items:
            raise self._full(self.items + count - self.max_items)
        rate = self._rate.per_s(self._clock())
        if rate is not None and self.items > 0 and self.items + count > rate * time_left_s * SAFE_SHARE:
            raise self._full(max(1, round(self.items + count - rate * time_left_s * SAFE_SHARE)))

    def _full(self, overflow: int) -> ServeError:
        rate = self._rate.per_s(self._clock())
        wait_s = overflow / rate if rate else 1.0
        message = "the queue is full; try again after the time in Retry-After"
        return ServeError(ErrorCode.QUEUE_FULL, message, retry_after_s=min(max(wait_s, 0.05), 60.0))


class Batcher:
    """Queues of one model in front of the device thread. All methods belong to the event loop's thread."""

    def __init__(
        self,
        runtime: Runtime,
        *,
        device: Executor,
        lanes: int = 1,
        limits: BatchLimits | None = None,
        cores: SharedCores | None = None,
        observer: BatchObserver | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        """cores: where items are prepared by the same cores that compute, those."""
        self._runtime = runtime
        self._device = device
        self._lanes = lanes
        self._limits = limits or BatchLimits()
        self._cores = cores
        self._observer = observer or SilentObserver()
        self._clock = clock
        self._queues: dict[Kind, deque[_Item]] = {kind: deque() for kind in Kind}
        self._running = 0  # batches
        self._computing = dict.fromkeys(Kind, 0)  # items in them
        self._coming = dict.fromkeys(Kind, 0)  # items that are being prepared
        self._last_batch_s = 0.0

    def submit(self, kind: Kind, payload: Payload, *, deadline: float) -> asyncio.Future[Float32]:
        """Queue one item; the future gives its vector (D,) or a ServeError. Cancel it to withdraw."""
        result = asyncio.get_running_loop().create_future()
        self._queues[kind].append(_Item(kind, payload, deadline, self._clock(), result))
        self._fill_lanes()
        return result

    @contextmanager
    def expect(self, kind: Kind) -> Iterator[Callable[[], None]]:
        """Say that an item is being prepared, until it is submitted or given up within the block.

        Gives a function to call when it will take so long that nothing should wait for it.
        """
        is_expected = True

        def forget() -> None:
            nonlocal is_expected
            if is_expected:
                is_expected = False
                self._coming[kind] -= 1
                self._fill_lanes()

        self._coming[kind] += 1
        try:
            yield forget
        finally:
            forget()

    def depth(self, kind: Kind) -> int:
        return len(self._queues[kind])

    @property
    def busy(self) -> bool:
        return self._running > 0

    def _fill_lanes(self) -> None:
        """Hand the device what has gathered, if anything still wants it."""
        while self._running < self._lanes and (kind := self._next_kind()) is not None:
            batch = self._take(kind, self._share(kind))
            if batch:
                self._start(kind, batch)

    def _next_kind(self) -> Kind | None:
        """The kind that has waited longest, of those with items that should not wait for more."""
        ready = [kind for kind, queue in self._queues.items() if queue and not self._may_gather(kind)]
        return min(ready, key=lambda kind: self._queues[kind][0].queued_at, default=None)

    def _share(self, kind: Kind) -> int:
        """Most items of the next batch. Lanes that share cores get equal parts: if one took all, the other
        would compute the rest as it trickles in, one or two at a time, which costs twice as much an item.
        """
        most = self._limits.items(kind)
        if self._cores is None:
            return most
        known = len(self._queues[kind]) + self._coming[kind] + self._computing[kind]
        return min(most, math.ceil(known / self._lanes))

    def _may_gather(self, kind: Kind) -> bool:
        """Whether a small batch may wait: more is coming, the cores have work without it, and it has waited
        for less time than a batch takes.
        """
        queue, coming = self._queues[kind], self._coming[kind]
        if self._cores is None or coming == 0 or len(queue) >= self._share(kind):
            return False
        is_recent = self._clock() - queue[0].queued_at < self._last_batch_s
        return is_recent and self._cores.are_busy(coming=coming, batches=self._running)

    def _take(self, kind: Kind, most: int) -> list[_Item]:
        """The next items of a kind, in order of arrival; the withdrawn and the expired are left out."""
        queue, batch, size_bytes, now = self._queues[kind], list[_Item](), 0, self._clock()
        while queue and len(batch) < most:
            item = queue[0]
            if batch and size_bytes + item.payload.nbytes > self._limits.size_bytes:
                break
            queue.popleft()
            if item.result.done():
                continue
            if now >= item.deadline:
                self._observer.expired(kind)
                item.result.set_exception(deadline_exceeded())
                continue
            batch.append(item)
            size_bytes += item.payload.nbytes
        return batch

    def _start(self, kind: Kind, batch: list[_Item]) -> None:
        self._running += 1
        self._computing[kind] += len(batch)
        started = self._clock()
        encode = self._runtime.encode_images if kind is Kind.IMAGE else self._runtime.encode_texts
        loop = asyncio.get_running_loop()
        work = self._device.submit(_encode_apart, encode, [item.payload for item in batch])
        work.add_done_callback(lambda done: _call_soon(loop, self._finish, kind, batch, started, done))

    def _finish(self, kind: Kind, batch: list[_Item], started: float, work: Future[list[_Outcome]]) -> None:
        """Keep the device busy first, then give out what it made."""
        now = self._clock()
        self._running -= 1
        self._computing[kind] -= len(batch)
        self._last_batch_s = now - started
        self._fill_lanes()
        waited_s = started - min(item.queued_at for item in batch)
        self._observer.batch_done(kind, size=len(batch), waited_s=waited_s, device_s=now - started)
        # A future's exception is asked for, not raised: whatever an engine does, the queue goes on.
        outcomes: Sequence[_Outcome] = work.result() if work.exception() is None else [None] * len(batch)
        for item, vector in zip(batch, outcomes, strict=True):
            if item.result.done():
                continue
            if vector is None:
                item.result.set_exception(inference_failed())
            else:
                item.result.set_result(vector)


_Outcome = Float32 | None  # None: this item cannot be encoded


def _encode_apart(
    encode: Callable[[Sequence[Payload]], Float32], payloads: Sequence[Payload]
) -> list[_Outcome]:
    """Vectors of a batch, in the device thread. A batch that fails is halved until only the item to blame
    fails.
    """
    try:
        return [row if bool(np.isfinite(row).all()) else None for row in encode(payloads)]
    except (RuntimeError, ValueError, ArithmeticError, MemoryError) as error:
        logger.warning("batch failed", extra={"items": len(payloads), "error": type(error).__name__})
    if len(payloads) == 1:
        return [None]
    middle = len(payloads) // 2
    return _encode_apart(encode, payloads[:middle]) + _encode_apart(encode, payloads[middle:])


def _call_soon(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *args: Any) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(function, *args)


def deadline_exceeded() -> ServeError:
    return ServeError(
        ErrorCode.DEADLINE_EXCEEDED, "the request's deadline passed before its answer was ready"
    )


def inference_failed() -> ServeError:
    return ServeError(ErrorCode.INFERENCE_FAILED, "the model could not encode this item")
