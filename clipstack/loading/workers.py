"""Loader processes: requests through torch's DataLoader, answered in order and ahead of time."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch.utils.data import DataLoader, Dataset, IterableDataset

from clipstack.errors import DataError, WorkerError
from data_pipelines.stream.quarantine import BadSample

PREFETCHED_BATCHES = 4
"""Batches that each worker has under way."""

_PR_SET_PDEATHSIG = 1

Ranges = tuple[tuple[int, int], ...]
"""Positions [low, high) that make a batch: what a worker is asked for."""


class Made(NamedTuple):
    """What a worker hands over for one request: a batch, or the error that ends the run."""

    value: Any
    bad: list[BadSample]
    error: DataError | None = None


class Workers:
    """Runs requests through torch's DataLoader: in order, ahead of time, in processes that end with this
    one."""

    def __init__(
        self, dataset: Dataset[Made] | IterableDataset[Made], workers: int, *, pin_memory: bool
    ) -> None:
        self._dataset, self._count, self._pin_memory = dataset, workers, pin_memory
        self._iterator: Any = None
        self._runs = 0

    def run(self, requests: Iterable[Ranges] | None) -> Iterator[Made]:
        """Answers in order. A new run ends the one before. Raises DataError that a worker met, or for its
        death."""
        self.close()
        self._iterator = self._start(requests)
        self._runs += 1
        run = self._runs
        while run == self._runs and self._iterator is not None:
            try:
                made: Made = next(self._iterator)
            except StopIteration:
                self.close()
                return
            except (RuntimeError, OSError, EOFError) as error:
                if not self._count or not _is_death(error):
                    raise
                self.close()
                raise WorkerError(
                    f"data.workers = {self._count}: a loader process died ({_first_line(error)}); "
                    "most likely it was killed for want of memory: fewer workers need less"
                ) from error
            if made.error is not None:
                self.close()
                raise made.error
            yield made

    def close(self) -> None:
        """End the processes: torch does so when the last reference to its iterator goes."""
        self._iterator = None

    def _start(self, requests: Iterable[Ranges] | None) -> Any:
        loader = DataLoader(
            self._dataset,
            batch_size=None,
            sampler=requests,
            num_workers=self._count,
            collate_fn=_as_it_is,
            pin_memory=self._pin_memory,
            prefetch_factor=PREFETCHED_BATCHES if self._count else None,
            worker_init_fn=_WorkerStart(os.getpid(), threading.current_thread() is threading.main_thread()),
            multiprocessing_context="fork" if self._count else None,
        )
        # torch's SIGCHLD handler raises wherever the main thread happens to be; a dead worker is reported
        # here instead.
        with _sigchld_kept():
            return iter(loader)


def _is_death(error: Exception) -> bool:
    """Whether torch's loader failed for want of a worker: it says so, or cannot reach it for a batch it
    announced."""
    if isinstance(error, RuntimeError):
        return "DataLoader worker" in str(error) and "Caught" not in str(error)
    return "in DataLoader worker process" not in str(error)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


@dataclass(frozen=True)
class _WorkerStart:
    parent: int
    from_main_thread: bool

    def __call__(self, worker: int) -> None:
        # The launcher signals the whole group; the trainer still needs batches to finish its step and save.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if self.from_main_thread:  # the signal is tied to the life of the thread that forked
            ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != self.parent:
                os._exit(1)


@contextmanager
def _sigchld_kept() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before)


def _as_it_is(made: Any) -> Any:
    return made
