"""How long commands say where they are: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, TextIO

LINE_EVERY_S = 5.0


class Progress:
    """Counts `total` pieces of work on stderr: `with Progress("build", total, unit="shards") as p:
    p.advance()`."""

    def __init__(self, label: str, total: int, *, unit: str, stream: TextIO | None = None) -> None:
        self._label, self._total, self._unit = label, total, unit
        self._stream = sys.stderr if stream is None else stream
        self._done = 0
        self._said = -1
        self._next_line = time.monotonic() + LINE_EVERY_S
        self._bar: Any = None
        if self._stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc=label, unit=f" {unit}", file=self._stream, dynamic_ncols=True)

    def advance(self, count: int = 1) -> None:
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        elif time.monotonic() >= self._next_line:
            self._say()

    def _say(self) -> None:
        self._next_line = time.monotonic() + LINE_EVERY_S
        if self._done != self._said:
            self._said = self._done
            print(f"{self._label}: {self._done}/{self._total} {self._unit}", file=self._stream, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        else:
            self._say()
