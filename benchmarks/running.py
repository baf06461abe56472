"""Runs a trainer to its end and notes from outside what it costs: the same ruler for both."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.trainers import MODEL_NAME, ROOT, Job, StepLine

POLL_S = 0.01


@dataclass(frozen=True)
class Ran:
    """A finished training: its lines, when each arrived and what it cost.

    arrived_s: seconds from the start of the process; cpu_s: processor time of all its processes, start and
    end included; device_memory_gib: the most that the GPU held, None on a CPU.
    """

    lines: list[StepLine]
    arrived_s: list[float]
    wall_s: float
    cpu_s: float
    command: list[str]
    log: Path
    device_memory_gib: float | None = None


@dataclass
class _Tail:
    """The lines of a growing file, each once and whole."""

    path: Path
    _read: int = 0
    _rest: str = field(default="")

    def new_lines(self) -> list[str]:
        if not self.path.exists() or self.path.stat().st_size == self._read:
            return []
        with self.path.open("rb") as file:
            file.seek(self._read)
            data = file.read()
        self._read += len(data)
        *whole, self._rest = (self._rest + data.decode("utf-8", errors="replace")).split("\n")
        return whole


def run(command: Sequence[str], log: Path, parse: Callable[[str], StepLine | None], job: Job) -> Ran:
    """Run a trainer to its end, noting from outside when each line of its log arrives: the same ruler for
    both.

    Raises RuntimeError with the end of its output where it fails.
    """
    output = log.parents[1] / "output.txt"
    output.parent.mkdir(parents=True, exist_ok=True)
    command = [*_binding(job.cores), *command]
    tail, lines, arrived, memory = _Tail(log), [], [], _Memory(job.device)
    began = time.perf_counter()
    with output.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT, env=_environ(job))
        try:
            cpu_s = None
            while cpu_s is None:
                cpu_s = _cpu_s_of_ended(process)
                now = time.perf_counter() - began
                for line in filter(None, map(parse, tail.new_lines())):
                    lines.append(line)
                    arrived.append(now)
                memory.look()
                time.sleep(POLL_S)
        finally:
            if process.returncode is None:
                process.terminate()
                process.wait(60)
    wall_s = time.perf_counter() - began
    if process.returncode != 0 or not lines:
        end = output.read_text(encoding="utf-8", errors="replace")[-3000:]
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{end}")
    return Ran(lines, arrived, wall_s, cpu_s, list(command), log, memory.most_gib)


def _cpu_s_of_ended(process: subprocess.Popen[bytes]) -> float | None:
    """Processor seconds of a process and of the children that it waited for; None while it runs."""
    pid, status, usage = os.wait4(process.pid, os.WNOHANG)
    if pid == 0:
        return None
    process.returncode = os.waitstatus_to_exitcode(status)
    return usage.ru_utime + usage.ru_stime


def _binding(cores: Sequence[int]) -> list[str]:
    taskset = shutil.which("taskset")
    return [taskset, "-c", ",".join(map(str, cores))] if cores and taskset else []


def _environ(job: Job) -> dict[str, str]:
    quiet = {"DS_ACCELERATOR": "cpu"} if job.device == "cpu" else {}
    threads = {"OMP_NUM_THREADS": str(job.threads), "MKL_NUM_THREADS": str(job.threads)}
    return {**os.environ, **quiet, **threads, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


class _Memory:
    """The most memory that the GPU held, asked of the driver once a second, so that both are asked alike."""

    def __init__(self, device: str) -> None:
        self.most_gib: float | None = None
        self._tool = shutil.which("nvidia-smi") if device == "cuda" else None
        self._next = 0.0

    def look(self) -> None:
        if self._tool is None or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + 1.0
        asked = [self._tool, "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        used = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()
        self.most_gib = max(self.most_gib or 0.0, max(map(float, used)) / 1024)


def hidden(text: str, folders: Mapping[str, Path | str]) -> str:
    """`text` with this machine's paths replaced by what they are; the longest first, as one may lie in
    another."""
    for name, path in sorted(folders.items(), key=lambda item: -len(str(item[1]))):
        text = text.replace(str(path), name)
    return text


def keep_logs(folder: Path, ran: Ran, out: Path, folders: Mapping[str, Path | str]) -> None:
    """Copy what tells how a trainer was run, its log and its recipe or parameters, without this machine's
    paths."""
    out.mkdir(parents=True, exist_ok=True)
    written = (
        ran.log,
        ran.log.with_name("params.txt"),
        folder / "recipe.toml",
        folder / f"{MODEL_NAME}.json",
    )
    for path in filter(Path.is_file, written):
        text = path.read_text(encoding="utf-8", errors="replace")
        (out / path.name).write_text(hidden(text, folders), encoding="utf-8")
