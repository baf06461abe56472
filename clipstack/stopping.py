"""SIGTERM and SIGINT: asked for by a scheduler, a launcher or the keyboard, looked at once a step."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOPPED = 3
"""Exit code of a run that stopped early and can be resumed."""


class StopRequest:
    """Set by the first signal. A rank alone must not leave: the ranks agree on it at their next step, and
    save."""

    def __init__(self) -> None:
        self.is_set = False
        self._leaves_at_once = False

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
        process."""
        self._leaves_at_once = True
        try:
            yield
        finally:
            self._leaves_at_once = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._leaves_at_once:
            os._exit(STOPPED)
        self.is_set = True
