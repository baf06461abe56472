"""The pool that decodes: its slots for large images."""

from __future__ import annotations

import asyncio
import threading

import pytest

from serve.decoding import DecodePool
from serve.images import ImageLimits
from serve.runtime import UInt8
from tests.serve.fakes import FakeRuntime
from tests.serve.pictures import jpeg


def test_a_heavy_slot_is_free_when_its_thread_is_and_not_when_the_client_leaves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("serve.decoding.HEAVY_PIXELS", 0)  # every image is a large one
    entered = threading.Semaphore(0)

    class Slow(FakeRuntime):
        def prepare_image(self, pixels: UInt8) -> UInt8:
            entered.release()
            assert self.gate.wait(30)
            return super().prepare_image(pixels)

    async def scenario() -> None:
        runtime, pool = Slow(), DecodePool(4, ImageLimits())
        runtime.hold()

        def prepare() -> asyncio.Future[UInt8]:
            return asyncio.ensure_future(pool.prepare(jpeg(1), runtime, deadline=float("inf")))

        left = [prepare(), prepare()]
        for _ in left:
            assert await asyncio.to_thread(entered.acquire, timeout=10)
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        third = prepare()
        try:
            assert not await asyncio.to_thread(entered.acquire, timeout=0.3)
        finally:
            runtime.gate.set()
        assert (await asyncio.wait_for(third, 10)).shape == (3, 8, 8)
        await asyncio.to_thread(pool.close)

    asyncio.run(scenario())
