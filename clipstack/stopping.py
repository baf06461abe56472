"""SIGTERM and SIGINT: asked for by a scheduler, a launcher or the keyboard, looked at once a step.

A launcher that dies has the kernel send SIGTERM to its ranks (`end_with_launcher`). `deepspeed` stands one
generation higher, above launch.py, which does not notice its death: the ranks look for it themselves.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

STOPPED = 3
"""Exit code of a run that stopped early and can be resumed."""
_PR_SET_PDEATHSIG = 1


class StopRequest:
    """Set by the first signal. A rank alone must not leave: the ranks agree on it at their next step, and
    save."""

    def __init__(self) -> None:
        self._signalled = False
        self._runner = _deepspeed_runner()

    @property
    def is_set(self) -> bool:
        return self._signalled or (self._runner is not None and self._runner.is_gone())

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the two signals inside this block."""
        before = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def leaving_at_once(self) -> Iterator[None]:
        """Inside this block there is nothing to save, and perhaps nobody to agree with: a signal ends the
        process.

        A thread does it, since the main one may be waiting for other ranks inside a library, where Python's
        handlers do not run.
        """
        heard, told = os.pipe()
        os.set_blocking(told, False)
        before = signal.set_wakeup_fd(told)  # the number of each signal is written there at once
        threading.Thread(target=_leave_when_told, args=(heard,), daemon=True, name="stop").start()
        if self._signalled:  # between the handlers and the line above
            os._exit(STOPPED)
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            os.close(told)  # which ends the thread

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True


def _leave_when_told(heard: int) -> None:
    while told := os.read(heard, 1):
        if told[0] in (signal.SIGTERM, signal.SIGINT):
            os._exit(STOPPED)
    os.close(heard)


def end_with_launcher() -> None:
    """Have the kernel send SIGTERM when the launcher dies, so that no rank trains on alone (Linux).

    The first thing that a rank does: one whose launcher dies before that is noticed by nobody. Without a
    launcher nothing is asked for: a shell that ends must not take its background job along.
    """
    if "RANK" not in os.environ or sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent or _is_orphan():
        print("the launcher is gone; so is this rank", file=sys.stderr, flush=True)
        os._exit(STOPPED)


def _is_orphan() -> bool:
    """Whether DeepSpeed's launch.py has started this rank and is no more: it sets CROSS_RANK."""
    return "CROSS_RANK" in os.environ and not any(map(_is_deepspeeds, _ancestors()))


def _ancestors() -> Iterator[int]:
    pid: int | None = os.getppid()
    while pid:
        yield pid
        pid = _parent_of(pid)


def _is_deepspeeds(pid: int) -> bool:
    try:
        return b"deepspeed.launcher.launch" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


@dataclass(frozen=True)
class _Runner:
    """The process above launch.py."""

    launcher: int
    pid: int

    def is_gone(self) -> bool:
        return _parent_of(self.launcher) not in (self.pid, None)


def _deepspeed_runner() -> _Runner | None:
    """Only where our parent is DeepSpeed's launch.py: elsewhere a grandparent may come and go as it likes."""
    launcher = os.getppid()
    runner = _parent_of(launcher)
    return _Runner(launcher, runner) if _is_deepspeeds(launcher) and runner else None


def _parent_of(pid: int) -> int | None:
    """None where it cannot be told."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return int(stat.rpartition(")")[2].split()[1])  # PID (NAME) STATE PPID
