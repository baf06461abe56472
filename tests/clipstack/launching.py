"""Ranks for the tests: forked in a fraction of a second (see zygote.py), watched, signalled, waited for."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
POLL_S = 0.01


def wait_until(condition: Callable[[], Any], timeout_s: float, what: str) -> Any:
    """The first true value of `condition`; AssertionError after `timeout_s`."""
    end = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < end, f"{what}: not within {timeout_s} s"
        time.sleep(POLL_S)
    return value


@dataclass(frozen=True)
class Ended:
    """codes: exit code of each rank, negative for a signal. logs: what each rank printed."""

    codes: list[int]
    logs: list[str]

    @property
    def text(self) -> str:
        return "\n".join(self.logs)


class Job:
    """Some ranks at work."""

    def __init__(self, out: Path, ranks: int) -> None:
        self.out, self._ranks = out, ranks

    @property
    def pids(self) -> list[int]:
        """Of the ranks, once they run."""
        return self._all_pids()[1:]

    def _all_pids(self) -> list[int]:
        path = self.out / "pids.json"
        wait_until(path.exists, 60, "start of the ranks")
        pids: list[int] = json.loads(path.read_text())
        return pids

    def send(self, rank: int, number: signal.Signals) -> None:
        os.kill(self.pids[rank], number)

    def has_ended(self) -> bool:
        return (self.out / "codes.json").exists()

    def log(self, rank: int) -> str:
        path = self.out / f"rank-{rank}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def wait(self, timeout_s: float = 120) -> Ended:
        try:
            wait_until(self.has_ended, timeout_s, f"end of the ranks:\n{self.log(0)}\n{self.log(1)}")
        except AssertionError:
            self.destroy()
            raise
        codes = json.loads((self.out / "codes.json").read_text())
        return Ended(codes, [self.log(rank) for rank in range(self._ranks)])

    def destroy(self) -> None:
        """End whatever is left, by the process group that is this job's own."""
        if not self.has_ended():
            os.killpg(self._all_pids()[0], signal.SIGKILL)


class Zygote:
    """Makes jobs. One for all tests of a module is enough."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.clipstack.zygote"],
            cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        )  # fmt: skip
        assert self._process.stdout is not None
        while self._process.stdout.readline() != "ready\n":  # imports may print
            assert self._process.poll() is None

    def start(
        self, call: str, argv: Sequence[object] = (), *, ranks: int = 2, cwd: Path | None = None,
        env: Mapping[str, str] | None = None, launcher: bool = False,
    ) -> Job:  # fmt: skip
        self._count += 1
        out = self._folder / f"job-{self._count}"
        out.mkdir()
        job = {
            "ranks": ranks, "call": call, "argv": [str(a) for a in argv], "cwd": str(cwd or REPOSITORY),
            "env": dict(env or {}), "launcher": launcher,
            "out": str(out),
        }  # fmt: skip
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return Job(out, ranks)

    def run(
        self,
        call: str,
        argv: Sequence[object] = (),
        *,
        ranks: int = 2,
        timeout_s: float = 120,
        **options: Any,
    ) -> Ended:
        return self.start(call, argv, ranks=ranks, **options).wait(timeout_s)

    def train(self, *argv: object, ranks: int = 2, timeout_s: float = 120, **options: Any) -> Ended:
        """Run the training command to its end."""
        return self.run("clipstack.train:main", argv, ranks=ranks, timeout_s=timeout_s, **options)

    def start_training(self, *argv: object, ranks: int = 2, **options: Any) -> Job:
        return self.start("clipstack.train:main", argv, ranks=ranks, **options)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)
