"""The process: uvicorn around the app, stopped so that nothing it accepted is lost and it exits 0."""

from __future__ import annotations

import asyncio
import errno
import logging
import signal
import socket
import time
from types import FrameType

import uvicorn
from fastapi import FastAPI

from clipstack.errors import ConfigError
from serve.protocol import GuardedProtocol
from serve.service import Service
from serve.settings import Settings

logger = logging.getLogger("serve")

BACKLOG = 2048
_NO_SUCH_ADDRESS = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)  # a name may have addresses that this host lacks
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

    def __init__(self, config: uvicorn.Config, app: FastAPI, settings: Settings) -> None:
        super().__init__(config)
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
        if self._stop_asked_at is not None:
            self._begin_drain()
            waited_s = time.monotonic() - self._stop_asked_at
            drained = self._service.in_flight == 0 and waited_s >= self._settings.drain_delay_s
            if drained or self._grace_left_s() == 0:
                return True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the port, answer what had reached it by then, and only then close the connections."""
        for server in self.servers:
            server.close()
        if self._stop_asked_at is not None:
            await asyncio.sleep(min(LAST_WORDS_S, self._grace_left_s()))
        # uvicorn hands it to asyncio, which takes fractions of a second; what is left then is cancelled.
        self.config.timeout_graceful_shutdown = self._grace_left_s()  # type: ignore[assignment]
        await super().shutdown(sockets)

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


def listen(host: str, port: int) -> list[socket.socket]:
    """Sockets on every address of `host`. Raises ConfigError where there is none, or one is taken."""
    sockets: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, address in dict.fromkeys((entry[0], entry[4]) for entry in found):
            try:
                sockets.append(socket.create_server((str(address[0]), port), family=family, backlog=BACKLOG))
            except OSError as error:
                if error.errno not in _NO_SUCH_ADDRESS or (not sockets and len(found) == 1):
                    raise
    except OSError as error:
        for listener in sockets:
            listener.close()
        reason = error.strerror or "no such address"
        raise ConfigError(
            f"host = {host!r}, port = {port}: cannot listen there ({reason}); choose another --host or --port"
        ) from error
    return sockets


def run_server(app: FastAPI, settings: Settings) -> int:
    """Serve until a signal. Returns the exit status; raises ClipstackError for mistakes of the user."""
    server = Server(config_of(app, settings), app, settings)
    sockets = listen(settings.host, settings.port)
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
