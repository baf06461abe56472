"""The process: uvicorn around the app, stopped so that nothing it accepted is lost and it exits 0."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

import uvicorn
from fastapi import FastAPI

from serve.listening import BACKLOG
from serve.protocol import GuardedProtocol
from serve.service import Service
from serve.settings import Settings

logger = logging.getLogger("serve")

LAST_WORDS_S = 0.2  # for requests on connections that were made before the port closed
UVICORN_WAIT_S = 0.1


KEEP_ALIVE_S = 75
"""Longer than clients and proxies keep idle connections (httpx 5 s, load balancers 60 s): the side that sends
requests must be the one that closes, or a request under way meets a closed connection."""


class Server(uvicorn.Server):
    """uvicorn's server, with a shutdown in three steps.

    SIGTERM first makes the app answer new requests with 503 and close their connections, for `drain_delay_s`
    and until what was accepted is answered; then the port closes; then the process ends with status 0, where
    uvicorn would raise the signal again.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        app: FastAPI,
        settings: Settings,
        *,
        on_ready: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(config)
        self._on_ready = on_ready
        self._app = app
        self._settings = settings
        self._stop_asked_at: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A first signal drains; a second SIGINT gives up what is still running."""
        if self._stop_asked_at is None:
            self._stop_asked_at = time.monotonic()
        elif sig == signal.SIGINT:
            self.should_exit = self.force_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second; whether to close the port now."""
        if self._service.load_error is not None:
            return True
        if self._on_ready is not None and self._service.is_loaded:
            self._on_ready()
            self._on_ready = None
        if self._stop_asked_at is not None:
            self._begin_drain()
            waited_s = time.monotonic() - self._stop_asked_at
            drained = self._service.in_flight == 0 and waited_s >= self._settings.drain_delay_s
            if drained or self._grace_left_s() == 0:
                return True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the port, answer what had reached it by then, and only then close the connections."""
        for connection in await self._close_port(sockets or []):
            try:
                await asyncio.get_running_loop().connect_accepted_socket(self._protocol, connection)
            except OSError:  # it has gone
                connection.close()
        if self._stop_asked_at is not None:
            await asyncio.sleep(min(LAST_WORDS_S, self._grace_left_s()))
        # uvicorn hands it to asyncio, which takes fractions of a second; what is left then is cancelled.
        self.config.timeout_graceful_shutdown = self._grace_left_s()  # type: ignore[assignment]
        await super().shutdown(sockets)

    async def _close_port(self, sockets: list[socket.socket]) -> list[socket.socket]:
        """The connections that nobody had taken from the port's queue: closing it would reset them, with the
        requests in them. So the port is held open by a second handle until the queue is empty.
        """
        handles = []
        with suppress(OSError):  # no handle is left: then the queue is lost, as it always was
            handles = [listener.dup() for listener in sockets]
        for server in self.servers:
            server.close()
        for listener in sockets:
            listener.close()
        await asyncio.sleep(0)  # the event loop lets go of the port
        waiting = []
        for handle in handles:
            handle.setblocking(False)
            for _ in range(BACKLOG):  # as many as the queue holds: more keep coming under load
                try:
                    waiting.append(handle.accept()[0])
                except ConnectionAbortedError:
                    continue  # it has gone while it waited
                except OSError:  # the queue is empty, or no handle is left
                    break
            handle.close()
        return waiting

    def _protocol(self) -> asyncio.Protocol:
        return GuardedProtocol(
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )

    def _grace_left_s(self) -> float:
        """What the drain has left of the grace period, less the wait that uvicorn's shutdown begins with."""
        since_s = 0.0 if self._stop_asked_at is None else time.monotonic() - self._stop_asked_at
        return max(0.0, self._settings.grace_s - since_s - UVICORN_WAIT_S)

    def _begin_drain(self) -> None:
        if not self._service.draining:
            self._service.draining = True
            logger.info("draining", extra={"in_flight": self._service.in_flight})

    @property
    def _service(self) -> Service:
        service: Service = self._app.state.service
        return service


def run_server(
    app: FastAPI,
    settings: Settings,
    sockets: list[socket.socket],
    *,
    on_ready: Callable[[], None] | None = None,
) -> int:
    """Serve on listening sockets until a signal. on_ready: called once, when every model is loaded. Returns
    the exit status; raises ClipstackError for mistakes of the user.
    """
    server = Server(config_of(app, settings), app, settings, on_ready=on_ready)
    logger.info("listening", extra={"addresses": [listener.getsockname()[:2] for listener in sockets]})
    server.run(sockets)
    service: Service | None = getattr(app.state, "service", None)
    if service is None or not server.started:
        return 1
    if service.load_error is not None:
        raise service.load_error
    logger.info("stopped", extra={"answered": service.answered})
    return 0


def config_of(app: FastAPI, settings: Settings) -> uvicorn.Config:
    """uvicorn's side of the settings. X-Forwarded-For and -Proto count only from a trusted proxy."""
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=bool(settings.trusted_proxies),
        forwarded_allow_ips=list(settings.trusted_proxies),
        timeout_keep_alive=KEEP_ALIVE_S,
        ws="none",
        lifespan="on",
        http=GuardedProtocol,
    )
