"""Samples that could not be used: told once, in quarantine.jsonl, and counted, since too many end a run."""

from __future__ import annotations

import fcntl
import json
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from data_pipelines.errors import DataError

MIN_DRAWS_FOR_RATE = 1000
"""The rate of bad samples is taken over at least so many draws: the first bad one must not end a run."""


class BadSample(NamedTuple):
    """Shard, key and reason are a line of quarantine.jsonl. `key` is None where a shard is damaged and nobody
    knows which keys it held."""

    shard: str
    key: str | None
    reason: str
    removed: bool = False
    """Left out because a removal list says so, not because it is broken."""


@dataclass
class BadRate:
    """Counts draws and bad ones, and stops a run that has too many."""

    limit: float
    draws: int = 0
    bad: int = 0
    last: BadSample | None = field(default=None, repr=False)

    def count(self, draws: int, bad: Iterable[BadSample]) -> None:
        """Raises DataError above the limit. Removed samples are not bad."""
        self.draws += draws
        for sample in bad:
            if not sample.removed:
                self.bad += 1
                self.last = sample
        if self.last is not None and self.bad > self.limit * max(self.draws, MIN_DRAWS_FOR_RATE):
            last = f"{self.last.shard}/{self.last.key} ({self.last.reason})"
            raise DataError(
                f"data.max_bad_fraction = {self.limit}: {self.bad} of {self.draws} samples "
                f"could not be used, the last of them {last}; see quarantine.jsonl, "
                "or run `clipstack data verify` on the shards"
            )


class Quarantine:
    """quarantine.jsonl: each bad sample once, whatever the ranks, epochs and restarts that meet it.

    Lines that the disk refuses are shown on stderr and wait in memory: a full disk is no reason to stop
    training, and nothing is lost unseen.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._seen: set[tuple[str, str | None, str]] = set()
        self._read_to = 0
        self._pending: dict[tuple[str, str | None, str], BadSample] = {}

    def add(self, samples: Iterable[BadSample]) -> None:
        """Append those that are not there yet. Safe for several processes."""
        if self._path is None:
            return
        new = {
            _identity(sample): sample
            for sample in samples
            if _identity(sample) not in self._seen and _identity(sample) not in self._pending
        }
        self._pending |= new
        if new:
            error = self.write_pending()
            if error is not None:
                _show_unwritten(self._path, error, new.values())

    def write_pending(self) -> OSError | None:
        """Write the lines that wait; why they have to wait on, or None."""
        if self._path is None or not self._pending:
            return None
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a+b", buffering=0) as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                self._catch_up(file.fileno())
                lines = [_line(bad) for name, bad in self._pending.items() if name not in self._seen]
                _append_whole(file.fileno(), b"".join(lines))
        except OSError as error:
            return error
        self._seen |= self._pending.keys()
        self._pending.clear()
        return None

    def _catch_up(self, fd: int) -> None:
        """Learn what other processes, or a run before this one, have written."""
        data = os.pread(fd, os.fstat(fd).st_size - self._read_to, self._read_to)
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):  # a torn last line of a run that was killed
            os.ftruncate(fd, self._read_to + len(whole))
        self._read_to += len(whole)
        for line in whole.splitlines():
            record = json.loads(line)
            self._seen.add(
                (record["shard"], record["key"], record["reason"] if record["key"] is None else "")
            )


def _append_whole(fd: int, data: bytes) -> None:
    """Append all of `data`, or nothing. Raises OSError."""
    size = os.fstat(fd).st_size
    try:
        while data:
            data = data[os.write(fd, data) :]
    except OSError:
        os.ftruncate(fd, size)
        raise


def _show_unwritten(path: Path, error: OSError, samples: Iterable[BadSample]) -> None:
    print(f"{path}: cannot be written ({error.strerror}); these lines wait until it can:", file=sys.stderr)
    for sample in samples:
        print(_line(sample).decode().rstrip(), file=sys.stderr, flush=True)


def _identity(sample: BadSample) -> tuple[str, str | None, str]:
    # Several damages of one shard have no key to tell them apart.
    return sample.shard, sample.key, sample.reason if sample.key is None else ""


def _line(sample: BadSample) -> bytes:
    record = {"shard": sample.shard, "key": sample.key, "reason": sample.reason}
    return (json.dumps(record, ensure_ascii=False) + "\n").encode()
