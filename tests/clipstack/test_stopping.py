"""A rank ends with its launcher, from its first line on, and with no shell."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clipstack.launching import REPOSITORY, wait_until

RANK = """
import signal, sys
from clipstack.stopping import end_with_launcher
end_with_launcher()
print("ready", flush=True)
signal.pause()
"""
LAUNCHER = """
import subprocess, sys
rank = subprocess.Popen([sys.executable, "-c", sys.argv[1]])
print(rank.pid, flush=True)
rank.wait()
"""


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("RANK", "CROSS_RANK"):
        monkeypatch.delenv(name, raising=False)
    yield


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def orphaned(**environment: str) -> int:
    """The pid of a rank whose parent was killed once the rank was at work."""
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, RANK],
        stdout=subprocess.PIPE, text=True, cwd=REPOSITORY, env={**os.environ, **environment},
    )  # fmt: skip
    assert launcher.stdout is not None
    pid = int(launcher.stdout.readline())
    assert launcher.stdout.readline() == "ready\n"
    launcher.kill()
    launcher.wait()
    return pid


@pytest.mark.usefixtures("clean_environment")
def test_a_rank_ends_with_its_launcher_and_a_background_job_outlives_its_shell() -> None:
    rank, job = orphaned(RANK="0"), orphaned()
    wait_until(lambda: not is_alive(rank), 10, "the end of the rank")
    assert is_alive(job)
    os.kill(job, signal.SIGKILL)


@pytest.mark.usefixtures("clean_environment")
def test_a_rank_whose_launcher_has_died_before_its_first_line_ends_at_once() -> None:
    """DeepSpeed's launch.py tells its ranks of itself; here none is among the ancestors."""
    command = [sys.executable, "-c", RANK]
    environment = {**os.environ, "RANK": "0", "CROSS_RANK": "0"}
    ended = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=30
    )
    assert ended.returncode == 3 and "the launcher is gone" in ended.stderr
