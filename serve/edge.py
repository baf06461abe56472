"""The outermost layer of every request: its id, its caller, security headers, metrics, one log line, and an
orderly end.
"""

from __future__ import annotations

import asyncio
import logging
import random
import re
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, TypeVar

import pydantic_core
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.errors import ErrorCode, ServeError, draining
from serve.security import bearer_token, caller_of
from serve.service import Service

logger = logging.getLogger("serve.requests")

OPEN_PATHS = frozenset(("/", "/docs", "/openapi.json", "/livez", "/readyz"))
OPEN_FOLDER = "/static/"
ALIVE_PATHS = frozenset(("/livez", "/readyz", "/metrics"))
ADMIN_PATHS = frozenset(("/v1/models/reload",))
CLIENT_LEFT = 499  # as nginx logs a client that closed its connection; never sent
LINGER_S = 5.0
LINGER_BYTES = 64 * 1024 * 1024
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
T = TypeVar("T")


@dataclass
class Trace:
    """What is known of one request, for its log line and its errors. Lives in scope["state"]["trace"]."""

    request_id: str
    arrived_at: float
    status: int = 0
    code: ErrorCode | None = None
    fields: dict[str, Any] = field(default_factory=dict)


def trace_of(scope: Scope) -> Trace:
    trace: Trace = scope["state"]["trace"]
    return trace


class Edge:
    """ASGI middleware around the whole app."""

    def __init__(self, app: ASGIApp, service_of: Any) -> None:
        self._app = app
        self._service_of = service_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        service: Service = self._service_of()
        scope["root_path"] = service.settings.root_path or scope.get("root_path", "")
        trace = Trace(_request_id(Headers(scope=scope)), time.monotonic())
        scope.setdefault("state", {})["trace"] = trace
        method = scope["method"]
        if method == "HEAD":  # whatever answers GET; what holds the connection sends the head alone
            scope = {**scope, "method": "GET"}
        body = _BodyWatch(receive, Headers(scope=scope))
        reply = _Reply(send, trace, body, service)
        service.in_flight += 1
        try:
            await self._app(scope, body.receive, reply.send)
        except ClientDisconnect:
            trace.status = CLIENT_LEFT
        except asyncio.CancelledError:
            # The grace period is over. Cancelling asks for an end, and an answer is one.
            if not service.draining or trace.status != 0:
                raise
            await error_response(draining(), trace)(scope, body.receive, reply.send)
        finally:
            service.in_flight -= 1
            service.answered += 1
            if trace.status == 0:  # a fault of ours, on its way to the layer outside of this that answers it
                trace.status, trace.code = ErrorCode.INTERNAL.status, ErrorCode.INTERNAL
            level = logging.DEBUG if scope["path"] in ALIVE_PATHS else logging.INFO
            route = getattr(scope.get("route"), "path", "other")
            record(service, trace, method if method in _METHODS else "other", route, level=level)


def record(service: Service, trace: Trace, method: str, route: str, *, level: int = logging.INFO) -> None:
    """Count a request that is done with, and write its log line."""
    seconds = time.monotonic() - trace.arrived_at
    service.metrics.requests.labels(method, route, str(trace.status)).inc()
    service.metrics.latency.labels(route).observe(seconds)
    if trace.code is not None:
        service.metrics.rejects.labels(trace.code).inc()
    logger.log(
        level,
        "request",
        extra={
            "request_id": trace.request_id,
            "method": method,
            "route": route,
            "status": trace.status,
            "duration_ms": round(seconds * 1000, 2),
            "code": trace.code,
            **trace.fields,
        },
    )


class Cors(CORSMiddleware):
    """Starlette's, with refusals in the one shape of errors."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and _is_preflight(scope) and "origin" in Headers(scope=scope):
            answer = self.preflight_response(Headers(scope=scope))
            if answer.status_code != HTTPStatus.OK:
                message = "this server's settings do not allow that origin, method or header"
                refusal = error_response(ServeError(ErrorCode.INVALID_REQUEST, message), trace_of(scope))
                for name in ("access-control-allow-origin", "vary"):
                    if name in answer.headers:
                        refusal.headers[name] = answer.headers[name]
                await refusal(scope, receive, send)
                return
        await super().__call__(scope, receive, send)


class Admission:
    """ASGI middleware inside of CORS, so that a browser's page may read why it was refused."""

    def __init__(self, app: ASGIApp, service_of: Any) -> None:
        self._app = app
        self._service_of = service_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                admit(self._service_of(), scope)
            except ServeError as error:
                await error_response(error, trace_of(scope))(scope, receive, send)
                return
        await self._app(scope, receive, send)


_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE"))


def _request_id(headers: Headers) -> str:
    given = headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else new_request_id()


def new_request_id() -> str:
    return f"{random.getrandbits(128):032x}"


def admit(service: Service, scope: Scope) -> None:
    """Raises ServeError draining, unauthorized or rate_limited. What is not on a list of open paths needs a
    token.
    """
    path = route_path(scope)
    if service.draining and path not in ALIVE_PATHS:
        raise draining()
    if path in OPEN_PATHS or path.startswith(OPEN_FOLDER) or _is_preflight(scope):
        return
    settings = service.settings
    token = bearer_token(Headers(scope=scope).get("authorization"))
    if path in ADMIN_PATHS:
        if not settings.admin_token_hashes:
            raise ServeError(
                ErrorCode.UNAUTHORIZED, "no admin token is set on this server, so nobody may do this"
            )
        caller = caller_of(token, settings.admin_token_hashes)
    elif settings.token_hashes:
        caller = caller_of(token, settings.token_hashes + settings.admin_token_hashes)
    else:
        caller = str((scope.get("client") or ("",))[0])
    if path not in ALIVE_PATHS:
        service.limiter.take(caller)


def route_path(scope: Scope) -> str:
    """The path below root_path, whether or not the proxy took the prefix away."""
    root, path = scope.get("root_path", ""), str(scope["path"])
    return path.removeprefix(root) if root and path.startswith(root + "/") else path


def _is_preflight(scope: Scope) -> bool:
    return scope["method"] == "OPTIONS" and "access-control-request-method" in Headers(scope=scope)


def json_bytes(value: Any) -> bytes:
    return pydantic_core.to_json(value)


def error_response(error: ServeError, trace: Trace) -> Response:
    """The one shape that every error has."""
    trace.code = error.code
    headers = {}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, round(error.retry_after_s + 0.5)))
        headers["Retry-After-Ms"] = str(max(1, round(error.retry_after_s * 1000)))
    if error.code is ErrorCode.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    content = error_body(error, trace.request_id)
    return Response(content, error.code.status, headers, media_type="application/json")


def error_body(error: ServeError, request_id: str) -> bytes:
    """The JSON of an error."""
    body = {"message": error.message, "type": error.code.type, "param": error.param, "code": error.code}
    return json_bytes({"error": body, "request_id": request_id})


@dataclass
class _BodyWatch:
    """`receive` that knows whether the client still has body to send."""

    _receive: Receive
    headers: Headers
    finished: bool = False

    def __post_init__(self) -> None:
        self.finished = "content-length" not in self.headers and "transfer-encoding" not in self.headers

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] != "http.request" or not message.get("more_body", False):
            self.finished = True
        return message

    async def discard(self) -> None:
        """Read what is left, up to a limit: a client that is still sending would otherwise never see the
        reply.
        """
        if "expect" in self.headers:
            return
        size_bytes = 0
        try:
            async with asyncio.timeout(LINGER_S):
                while not self.finished and size_bytes < LINGER_BYTES:
                    size_bytes += len((await self.receive()).get("body", b""))
        except TimeoutError:
            return


@dataclass
class _Reply:
    """`send` that adds every reply's headers, and ends connections that must not be used again."""

    _send: Send
    trace: Trace
    body: _BodyWatch
    service: Service

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            if not self.body.finished and message["status"] != ErrorCode.REQUEST_TIMEOUT.status:
                await self.body.discard()
            self.trace.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["X-Request-ID"] = self.trace.request_id
            headers["X-Content-Type-Options"] = "nosniff"
            headers.setdefault("Cache-Control", "no-store")
            if self.service.draining or not self.body.finished:
                headers["Connection"] = "close"
        await self._send(message)


async def unless_client_leaves(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client closes its connection. Raises ClientDisconnect
    then.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.cancel()
            await asyncio.wait({task})
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
