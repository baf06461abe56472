"""A server in a process of its own whose device takes a known time for each batch: its capacity is known.

    python -m tests.serve.timed_server FOLDER

Prints its port. The device sleeps, so that the cores are free for HTTP and for whoever sends the requests.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from serve.app import create_app
from serve.listening import listen
from serve.server import Server, config_of
from serve.settings import Settings
from tests.serve.fakes import FakeRuntime

BATCH = 4
BATCH_S = 0.1
CAPACITY = BATCH / BATCH_S  # texts a second


class TimedRuntime(FakeRuntime):
    """Takes BATCH_S for a batch of any size."""

    def _work(self, kind: str, size: int) -> None:
        super()._work(kind, size)
        time.sleep(BATCH_S)


def serve(folder: str) -> None:
    """Serve until a signal."""
    settings = Settings.model_validate(
        {
            "models": ("fake=unused",), "label_set_file": Path(folder, "sets.sqlite3"),
            "device_lanes": 1, "max_batch_texts": BATCH, "max_queue_items": 1000,
        }
    )  # fmt: skip
    app = create_app(settings, TimedRuntime())
    sockets = listen("127.0.0.1", 0)
    print(sockets[0].getsockname()[1], flush=True)
    Server(config_of(app, settings), app, settings).run(sockets)


@contextmanager
def timed_server(folder: Path) -> Iterator[tuple[int, int]]:
    """(port, process id) of a running one; its session holds that process alone."""
    command = [sys.executable, "-m", "tests.serve.timed_server", str(folder)]
    repository = Path(__file__).resolve().parents[2]
    with subprocess.Popen(
        command, cwd=repository, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            assert process.stdout is not None
            yield int(process.stdout.readline()), process.pid
        finally:
            process.terminate()
    assert process.returncode == 0, "it ends in order"


if __name__ == "__main__":
    serve(sys.argv[1])
