"""`clipstack serve` as a process of its own, with its log, stopped at the end of its block."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]


class ServerProcess:
    """The process, its lines of log as they come, and its base URL."""

    def __init__(self, arguments: list[str], state: Path, **environ: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.lines: list[dict[str, Any]] = []
        self._news = threading.Condition()
        command = [sys.executable, "-m", "serve.cli", "--port", str(port), *arguments]
        self.process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env={**os.environ, "XDG_STATE_HOME": str(state), "OMP_NUM_THREADS": "1", **environ},
            stderr=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            entry = json.loads(line) if line.startswith("{") else {"event": line.strip()}
            with self._news:
                self.lines.append(entry)
                self._news.notify_all()
        with self._news:
            self._news.notify_all()

    def wait_for(self, event: str, *, timeout_s: float = 60) -> dict[str, Any]:
        """The first log line of an event; returns as soon as it is written."""

        def found() -> dict[str, Any] | None:
            return next((line for line in self.lines if line["event"] == event), None)

        with self._news:
            assert self._news.wait_for(lambda: found() or self.process.poll() is not None, timeout_s), (
                self.lines
            )
            line = found()
        assert line is not None, self.lines
        return line

    def stop(self, signal_number: int, *, timeout_s: float = 60) -> int:
        """Send a signal and return the exit status."""
        self.process.send_signal(signal_number)
        return self.wait(timeout_s=timeout_s)

    def wait(self, *, timeout_s: float = 60) -> int:
        status = self.process.wait(timeout_s)
        self._reader.join(timeout_s)
        return status


@contextmanager
def server_process(*arguments: str, state: Path, **environ: str) -> Iterator[ServerProcess]:
    server = ServerProcess(list(arguments), state, **environ)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
        server.wait()
