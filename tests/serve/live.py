"""A real server on 127.0.0.1 and a free port, in a thread of the test, that stops with its block."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI

from serve.protocol import GuardedProtocol
from serve.server import KEEP_ALIVE_S


class _ThreadedServer(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.is_up = threading.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.is_up.set()


@contextmanager
def live_server(app: FastAPI) -> Iterator[str]:
    """The server's base URL, once it answers."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = _ThreadedServer(
        uvicorn.Config(
            app,
            http=GuardedProtocol,
            log_config=None,
            access_log=False,
            ws="none",
            timeout_keep_alive=KEEP_ALIVE_S,
        )
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        assert server.is_up.wait(60), "the server did not start"
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()
