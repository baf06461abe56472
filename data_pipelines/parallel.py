"""Work spread over processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from threading import Thread
from typing import TypeVar

from data_pipelines.errors import ShardError

T = TypeVar("T")
R = TypeVar("R")


def default_processes() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def exit_with_parent() -> None:
    """In a worker: end when the parent is gone, however it ended. A pool's workers would wait for it for
    ever."""
    parent = parent_process()
    assert parent is not None, "for worker processes only"
    Thread(target=_exit_after, args=(parent.sentinel,), daemon=True).start()


def _exit_after(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)


def map_processes(function: Callable[[T], R], work: Sequence[T], *, processes: int) -> Iterator[R]:
    """`function` of each piece, in order, in fresh processes; in this one where one is enough. Raises
    ShardError.

    `function` must be importable: a module's own, or a `functools.partial` of one.
    """
    if processes <= 1 or len(work) <= 1:
        yield from map(function, work)
        return
    # Fresh processes: polars and the image libraries keep threads, which a fork would break.
    context = get_context("spawn")
    with ProcessPoolExecutor(
        min(processes, len(work)), mp_context=context, initializer=exit_with_parent
    ) as pool:
        try:
            yield from pool.map(function, work)
        except BrokenProcessPool as error:
            raise ShardError("a worker died (out of memory?); try again with fewer --processes") from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
