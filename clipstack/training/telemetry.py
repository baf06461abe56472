"""How fast a run is: throughput, time spent waiting, memory, and the share of the device's peak that is
used."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

GIB = 2**30


class Clock:
    """What happened since the last reading, on this rank."""

    def __init__(self, device: torch.device, *, peak_s_per_sample: float | None = None) -> None:
        """peak_s_per_sample: what a sample would take if all devices worked at their peak; None where that is
        unknown."""
        self._device, self._peak_s = device, peak_s_per_sample
        self._reset()

    def _reset(self) -> None:
        self._start, self._samples = time.perf_counter(), 0
        self._waited_s, self._saving_s = 0.0, 0.0

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._waited_s += time.perf_counter() - start

    @contextmanager
    def saving(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._saving_s += time.perf_counter() - start

    def count(self, samples: int) -> None:
        self._samples += samples

    def read(self) -> dict[str, float]:
        elapsed = time.perf_counter() - self._start
        out = {
            "samples_per_s": self._samples / elapsed,
            "data_wait_fraction": self._waited_s / elapsed,
            "checkpoint_wait_fraction": self._saving_s / elapsed,
            "memory_gib": peak_memory_bytes(self._device) / GIB,
        }
        if self._peak_s is not None:
            out["mfu"] = self._samples * self._peak_s / elapsed
        self._reset()
        return out


def peak_memory_bytes(device: torch.device) -> int:
    """The most that this process has held: on the GPU, or in main memory where it trains on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
