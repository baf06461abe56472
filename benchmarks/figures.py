"""What runs are compared by: rates, spreads, ratios round by round, and on what machine they came about."""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.running import Ran
from benchmarks.trainers import StepLine


def steady_rate(ran: Ran, *, batch_size: int, skip: int, tail: int) -> float:
    """Samples a second between two steps, by when their lines arrived.

    Left out are the first `skip` lines (start, first allocations, batches that the loader had ready) and the
    last `tail` (a loader that has nothing more to do leaves its core to the rest).
    """
    last = len(ran.lines) - 1 - tail
    if last <= skip:
        raise ValueError(f"{len(ran.lines)} lines are too few to leave out {skip} and {tail}")
    steps = ran.lines[last].step - ran.lines[skip].step
    return steps * batch_size / (ran.arrived_s[last] - ran.arrived_s[skip])


def logged_seconds(lines: Sequence[StepLine], *, batch_size: int) -> float:
    """Seconds of training by the trainer's own log, which has a line for each step: from the first wait for
    data to the end of the last step."""
    if [line.step for line in lines] != list(range(1, len(lines) + 1)):
        raise ValueError("the log does not have one line for each step")
    return sum(batch_size / line.rate for line in lines)


@dataclass(frozen=True)
class Spread:
    """Median, least and most of some figures."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.least:.3g}-{self.most:.3g})"


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """Ours by theirs, round by round."""
    return Spread.of([a / b for a, b in zip(ours, theirs, strict=True)])


def alternating(names: Sequence[str], rounds: int) -> Iterator[tuple[int, str]]:
    """(round, name): A B, B A, A B, ..., so that a drift of the machine hits all alike."""
    for number in range(rounds):
        for name in names if number % 2 == 0 else names[::-1]:
            yield number, name


def versions(python: str) -> dict[str, str]:
    """Versions of what matters in an environment."""
    code = (
        "import importlib.metadata as m, json, platform\n"
        "names = ('torch', 'torchvision', 'open_clip_torch', 'webdataset', 'transformers', 'deepspeed')\n"
        "have = {d.metadata['Name'].lower().replace('-', '_'): d.version for d in m.distributions()}\n"
        "print(json.dumps({'python': platform.python_version(), **{n: have[n] for n in names if n in have}}))"
    )
    found: dict[str, str] = json.loads(subprocess.check_output([python, "-c", code], text=True))
    return found


def machine() -> dict[str, Any]:
    """The processor, how many cores of it there are, and how busy it was just now."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return {
        "processor": names[0] if names else "unknown",
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
    }
