"""Starts ranks in a fraction of a second: a process that has imported everything, and forks.

It reads one job a line from stdin: {"ranks", "call", "argv", "cwd", "env", "out"}. `call` is
"module:function", which gets argv and returns an exit code. Each job has a supervisor, which leads a process
group of its own, as a launcher does. With
"launcher" it ends the other ranks when one fails, as launchers do. OUT gets rank-N.log, pids.json when the
ranks run, and codes.json when all have ended (negative: killed by that signal).
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

import clipstack.checkpoint.export
import clipstack.checkpoint.load
import clipstack.evaluation.command
import clipstack.train
import clipstack.training.engine
import clipstack.training.trainer  # noqa: F401


def main() -> None:
    torch.set_num_threads(1)  # a thread pool would not survive the fork
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for supervisors
    print("ready", flush=True)
    for line in sys.stdin:
        if os.fork() == 0:
            _supervise(json.loads(line))
            os._exit(0)


def _supervise(job: dict[str, Any]) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    out = Path(job["out"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = []
    for rank in range(job["ranks"]):
        pid = os.fork()
        if pid == 0:
            _run_rank(job, rank, port, out)
        pids.append(pid)
    _write(out / "pids.json", [os.getpid(), *pids])
    codes: dict[int, int] = {}
    for _ in pids:
        pid, status = os.wait()
        codes[pid] = os.waitstatus_to_exitcode(status)
        if job["launcher"] and codes[pid] != 0:
            for other in set(pids) - codes.keys():
                os.kill(other, signal.SIGTERM)
    _write(out / "codes.json", [codes[pid] for pid in pids])


def _write(path: Path, value: Any) -> None:
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(value))
    os.replace(beside, path)


def _run_rank(job: dict[str, Any], rank: int, port: int, out: Path) -> None:
    code = 1
    try:
        log = os.open(out / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(job["cwd"])
        os.environ.update(job["env"])
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(job["ranks"]),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        module, function = job["call"].split(":")
        code = getattr(importlib.import_module(module), function)(job["argv"]) or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
