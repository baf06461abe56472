"""HTTP/1.1 as uvicorn reads it, with bounds that it leaves to a proxy: how large and how late a head may be.

What cannot be read as HTTP never reaches the application, so its error is made here, in the shape of all.
"""

from __future__ import annotations

import asyncio
import time
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serve.edge import Trace, error_body, new_request_id, record
from serve.errors import ErrorCode, ServeError

MAX_HEAD_BYTES = 64 * 1024
HEAD_TIMEOUT_S = 10.0


class GuardedProtocol(HttpToolsProtocol):
    """One connection. uvicorn itself keeps whatever a client sends of a head, for as long as it likes."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._unparsed_bytes = 0  # received since the last sign of progress: a whole head, a piece of a body
        self._head_timer: asyncio.TimerHandle | None = None
        self._began_at = time.monotonic()  # waiting for the head that is being read, or was last

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._unparsed_bytes += len(data)
        super().data_received(data)
        if self._unparsed_bytes > MAX_HEAD_BYTES:
            message = f"the headers are larger than this server takes ({MAX_HEAD_BYTES} bytes)"
            self._refuse(ServeError(ErrorCode.HEADERS_TOO_LARGE, message))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._head_timer is None:
            self._expect_head()

    def on_headers_complete(self) -> None:
        self._stop_timer()
        self._unparsed_bytes = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._unparsed_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._unparsed_bytes = 0
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(ServeError(ErrorCode.INVALID_REQUEST, "this is not a valid HTTP request"))

    def _unsupported_upgrade_warning(self) -> None:
        """A client may ask for another protocol; it is answered in this one, which is no news for the log."""

    def _expect_head(self) -> None:
        self._began_at = time.monotonic()
        self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._head_is_late)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        message = f"the request did not begin, or its headers did not end, within {HEAD_TIMEOUT_S:g} s"
        self._refuse(ServeError(ErrorCode.REQUEST_TIMEOUT, message))

    def _refuse(self, error: ServeError) -> None:
        """Answer and close; only close where the answer would fall into one that is being sent."""
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete:
            status = HTTPStatus(error.code.status)
            trace = Trace(new_request_id(), self._began_at, status.value, error.code)
            content = error_body(error, trace.request_id)
            head = (
                f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(content)}\r\nX-Request-ID: {trace.request_id}\r\n"
                "Connection: close\r\n\r\n"
            )
            self.transport.write(head.encode("ascii") + content)
            if self._unparsed_bytes:  # a browser connects before it knows what to ask
                record(self.app_state["service"], trace, "other", "other")
        self.transport.close()
