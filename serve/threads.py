"""Threads: which go first on busy cores, and what may not come out of one."""

from __future__ import annotations

import functools
import os
import sys
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

NICENESS = 2
"""One step is about a quarter more processor time for the other. Not more than it takes: a thread that holds
the interpreter and gets no core, because other programs want it, holds up the event loop as well."""


def give_way() -> None:
    """Let the event loop go before the calling thread, which computes, wherever cores are short.

    Five computing threads on two cores would leave the loop a fifth of them. Requests then wait unread, where
    no limit and no deadline sees them. On Linux niceness belongs to a thread; elsewhere nothing is done.
    """
    if sys.platform == "linux":
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + NICENESS)


def sealed(function: Callable[P, T]) -> Callable[P, T]:
    """The same, to be run in a thread and awaited: a StopIteration comes out as a RuntimeError.

    asyncio's futures refuse that exception alone, so whoever awaits it would wait for ever.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except StopIteration as error:
            raise RuntimeError("StopIteration") from error

    return run
