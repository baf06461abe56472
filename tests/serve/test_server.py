"""What the process does around the application: the port, the bounds of HTTP itself, the time to stop."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from clipstack.errors import ConfigError
from serve.app import create_app
from serve.protocol import MAX_HEAD_BYTES
from serve.server import Server, listen
from serve.settings import Settings
from tests.serve.fakes import FakeRuntime
from tests.serve.live import live_server

OK = b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n"


def settings_in(folder: Path, **values: Any) -> Settings:
    return Settings.model_validate(
        {"models": ("fake=unused",), "label_set_file": folder / "sets.sqlite3", **values}
    )


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    with live_server(create_app(settings_in(tmp_path), FakeRuntime())) as base:
        yield base


def connect(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=30)


def until_closed(connection: socket.socket) -> bytes:
    received = b""
    while part := connection.recv(65536):
        received += part
    return received


def refusal(reply: bytes) -> tuple[int, str]:
    """Status and code of an error, whose shape is checked."""
    head, _, body = reply.partition(b"\r\n\r\n")
    value = json.loads(body)
    assert set(value) == {"error", "request_id"}
    assert set(value["error"]) == {"message", "type", "param", "code"}
    assert value["request_id"].encode() in head
    return int(head.split()[1]), value["error"]["code"]


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"hello\r\n\r\n",
        b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    ],
)
def test_what_is_no_http_gets_an_error_of_the_one_shape(url: str, request_bytes: bytes) -> None:
    with connect(url) as connection:
        connection.sendall(request_bytes)
        assert refusal(until_closed(connection)) == (400, "invalid_request")


@pytest.mark.parametrize(
    "start",
    [
        b"GET /livez HTTP/1.1\r\nX: ",
        b"GET /livez?",
        b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX: ",
    ],
    ids=["header", "path", "trailer"],
)
def test_headers_without_end_are_cut_off(url: str, start: bytes) -> None:
    with connect(url) as connection:
        connection.sendall(start)
        sent = 0
        try:
            while sent < 64 * MAX_HEAD_BYTES:
                sent += connection.send(b"a" * 16_384)
        except OSError:
            pass
        assert sent < 64 * MAX_HEAD_BYTES, "the server took it all"
    assert httpx.get(f"{url}/livez").status_code == 200


def test_large_but_sound_headers_and_slow_chunks_are_taken(url: str) -> None:
    assert httpx.get(f"{url}/livez", headers={"x-large": "a" * 30_000}).status_code == 200
    body = b'{"model": "fake", "input": "' + b"a " * 3 + b'"}' + b" " * 100_000
    pieces = (body[at : at + 100] for at in range(0, len(body), 100))
    reply = httpx.post(
        f"{url}/v1/embeddings", content=pieces, headers={"content-type": "application/json"}, timeout=60
    )
    assert reply.status_code == 200, reply.text


def test_a_head_that_is_late_is_refused_and_an_idle_connection_is_not(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.protocol.HEAD_TIMEOUT_S", 0.3)
    with connect(url) as silent, connect(url) as slow, connect(url) as idle:
        idle.sendall(OK)
        assert b"200 OK" in idle.recv(65536)
        slow.sendall(OK[:-2])
        assert refusal(until_closed(silent)) == (408, "request_timeout")
        assert refusal(until_closed(slow)) == (408, "request_timeout")
        idle.sendall(OK + OK)
        received = b""
        while received.count(b"200 OK") < 2:
            received += idle.recv(65536)
        idle.sendall(OK[:-2])
        assert refusal(until_closed(idle)) == (408, "request_timeout")


def test_a_port_that_is_taken_is_named_with_what_to_do() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"port = {port}.*in use.*--port"):
            listen("127.0.0.1", port)
    with pytest.raises(ConfigError, match=r"host = '203\.0\.113\.7'.*--host"):
        listen("203.0.113.7", 0)
    for listener in listen("localhost", 0):
        listener.close()


def test_the_time_that_draining_took_is_part_of_the_grace_period(tmp_path: Path) -> None:
    settings = settings_in(tmp_path, grace_s=10)
    app = create_app(settings, FakeRuntime())
    server = Server(uvicorn.Config(app), app, settings)
    server.servers, server.force_exit = [], True
    server._stop_asked_at = time.monotonic() - 8
    asyncio.run(server.shutdown())
    assert server.config.timeout_graceful_shutdown is not None
    assert 1 <= server.config.timeout_graceful_shutdown <= 2
