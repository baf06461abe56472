"""The threads that compute go after the event loop, in the pools of the real server."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from pathlib import Path

import pytest

from serve.app import create_app
from serve.runtime import SelfTestError
from serve.threads import NICENESS, sealed
from tests.serve.fakes import FakeRuntime
from tests.serve.test_server import settings_in


def niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


@pytest.mark.skipif(sys.platform != "linux", reason="niceness belongs to the process there")
def test_decoders_and_lanes_give_way_to_the_event_loop(tmp_path: Path) -> None:
    app = create_app(settings_in(tmp_path), FakeRuntime())

    async def seen() -> list[int]:
        async with app.router.lifespan_context(app):
            service = app.state.service
            loop = asyncio.get_running_loop()
            computing = [await loop.run_in_executor(service._device, niceness) for _ in range(3)]
            decoding = await loop.run_in_executor(service.decoder._threads, niceness)
            return [niceness(), *computing, decoding]

    before = niceness()
    event_loop, *others = asyncio.run(seen())
    assert event_loop == before and set(others) == {min(19, before + NICENESS)}


def test_what_asyncio_s_futures_refuse_comes_out_of_a_thread_all_the_same() -> None:
    def broken() -> int:
        return next(iter(()))

    async def awaited() -> int:
        return await asyncio.wait_for(asyncio.to_thread(sealed(broken)), 10)

    with pytest.raises(RuntimeError, match="StopIteration"):
        asyncio.run(awaited())


def test_a_loader_that_runs_out_of_items_ends_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a server that says for ever that it is loading."""

    def broken() -> FakeRuntime:
        return next(iter(()))

    monkeypatch.setattr("serve.app.loaders_of", lambda settings, runtime: {"fake": broken})
    app = create_app(settings_in(tmp_path))

    async def start() -> None:
        async with asyncio.timeout(10), app.router.lifespan_context(app):
            pass

    with pytest.raises(SelfTestError, match="StopIteration"):
        asyncio.run(start())
