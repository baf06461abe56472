"""What becomes of an exception that an engine raised."""

from __future__ import annotations

import asyncio
import threading

import pytest

from serve.runtime import SelfTestError
from serve.versions import or_refuse


def ring_of_causes() -> None:
    first, second = RuntimeError("first"), ValueError("second")
    first.__cause__, second.__cause__ = second, first
    raise first


def test_exceptions_that_are_each_other_s_cause_are_refused_as_any_other() -> None:
    ended = threading.Event()

    def refuse() -> None:
        with pytest.raises(SelfTestError, match=r"cannot be loaded.*first"):
            asyncio.run(or_refuse(asyncio.to_thread(ring_of_causes), "the model cannot be loaded"))
        ended.set()

    threading.Thread(target=refuse, daemon=True).start()  # a loop without end must not take the tests with it
    assert ended.wait(20)
