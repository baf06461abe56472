"""A real server on 127.0.0.1 and a free port, in a thread of the test, that stops with its block."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI

from serve.server import Server, config_of
from serve.settings import Settings


def wait_until(condition: Callable[[], object], *, timeout_s: float = 20) -> None:
    """Return when `condition` holds."""
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.005)


class ThreadedServer(Server):
    """Our server, which says when it is up."""

    def __init__(self, config: uvicorn.Config, app: FastAPI, settings: Settings) -> None:
        super().__init__(config, app, settings)
        self.is_up = threading.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.is_up.set()


@contextmanager
def live_server(app: FastAPI, settings: Settings | None = None) -> Iterator[str]:
    """The server's base URL, once it answers."""
    with threaded_server(app, settings or Settings()) as (url, _, _):
        yield url


@contextmanager
def threaded_server(
    app: FastAPI, settings: Settings
) -> Iterator[tuple[str, ThreadedServer, threading.Thread]]:
    """Base URL, server and thread of a server that answers. It stops at once at the end of the block."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = ThreadedServer(config_of(app, settings), app, settings)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        assert server.is_up.wait(60), "the server did not start"
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", server, thread
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()
