"""What the process does around the application: the port, the bounds of HTTP itself, the time to stop."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from clipstack.cli import main
from clipstack.errors import ConfigError
from serve.app import create_app
from serve.listening import listen, url_of
from serve.protocol import MAX_HEAD_BYTES
from serve.server import Server, config_of
from serve.settings import Settings
from tests.serve.fakes import FakeRuntime
from tests.serve.live import live_server, threaded_server

REPOSITORY = Path(__file__).resolve().parents[2]
OK = b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n"
QUESTION = b'{"model": "fake", "input": "a"}'
ASK = b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%b" % (len(QUESTION), QUESTION)


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


def test_a_taken_port_is_named_before_anything_heavy_is_imported() -> None:
    code = "import sys; from clipstack.cli import main; print(main(), {*sys.modules} & {'torch', 'uvicorn'})"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = subprocess.run(
            [sys.executable, "-c", code, "serve", "--model", "ViT-B-32", "--port", port],
            capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
    assert done.stdout == "2 set()\n"
    assert done.stderr.count("\n") == 1 and f"port = {port}: cannot listen there" in done.stderr


@pytest.mark.parametrize(
    ("host", "shown"), [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("::1", "[::1]")]
)
def test_the_address_for_a_browser(host: str, shown: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        assert url_of(host, [listener]) == f"http://{shown}:{listener.getsockname()[1]}/"


SAYS_WHEN_LOADED = """
import signal, sys
from pathlib import Path
from serve.app import create_app
from serve.listening import listen
from serve.server import run_server
from tests.serve.fakes import FakeRuntime
from tests.serve.test_server import settings_in
folder = Path(sys.argv[1])
app = create_app(settings_in(folder, load_in_background=True), FakeRuntime())
def stop():
    print("loaded" if app.state.service.is_loaded else "not loaded")
    signal.raise_signal(signal.SIGTERM)
sys.exit(run_server(app, settings_in(folder), listen("127.0.0.1", 0), on_ready=stop))
"""


def test_it_says_once_that_every_model_is_loaded(tmp_path: Path) -> None:
    """In a process of its own, since it is signalled."""
    done = subprocess.run(
        [sys.executable, "-c", SAYS_WHEN_LOADED, str(tmp_path)],
        cwd=REPOSITORY, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "loaded\n"), done.stderr


@pytest.mark.parametrize("on_terminal", [True, False])
def test_a_terminal_is_told_what_happens(
    on_terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def served(app: object, settings: object, sockets: object, *, on_ready: Callable[[], None] | None) -> int:
        if on_ready is not None:
            on_ready()
        return 0

    monkeypatch.setattr("serve.app.create_app", lambda settings: None)
    monkeypatch.setattr("serve.server.run_server", served)
    monkeypatch.setattr("serve.logs.configure_logging", lambda level: None)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: on_terminal)
    monkeypatch.setenv("GOMP_SPINCOUNT", "0")
    assert main(["serve", "--model", "a=x", "--port", "0"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (2 if on_terminal else 0)
    if on_terminal:
        assert lines[0] == "loading a ..."
        assert re.fullmatch(r"ready: http://127\.0\.0\.1:\d+/", lines[1])


GRACE_S = 1.0


@pytest.mark.parametrize("share", [0.5, 0.8, None], ids=["half", "late", "never"])
def test_a_request_has_the_whole_grace_period_and_no_more(tmp_path: Path, share: float | None) -> None:
    """It is answered when the device is done within the grace period, and with 503 when that is over."""
    runtime = FakeRuntime()
    settings = settings_in(tmp_path, grace_s=GRACE_S, drain_delay_s=0)
    with threaded_server(create_app(settings, runtime), settings) as (url, server, thread):
        runtime.hold()
        try:
            with connect(url) as connection:
                connection.sendall(ASK)
                assert runtime.started.wait(10)
                asked_at = time.monotonic()
                server.handle_exit(signal.SIGTERM, None)
                if share is not None:
                    time.sleep(share * GRACE_S)
                    runtime.gate.set()
                    assert b"200 OK" in connection.recv(65536)
                    assert time.monotonic() - asked_at < GRACE_S
                else:
                    assert refusal(until_closed(connection)) == (503, "draining")
                    assert GRACE_S <= time.monotonic() - asked_at < GRACE_S + 0.6
        finally:
            runtime.gate.set()
        thread.join(10)
        assert not thread.is_alive()


def callers(url: str, *forwarded: str) -> list[int]:
    """Statuses of one request for each X-Forwarded-For. With a burst of 1 the second of a caller gets 429."""
    return [
        httpx.get(f"{url}/v1/models", headers={"x-forwarded-for": entry}).status_code for entry in forwarded
    ]


def test_forwarded_addresses_count_only_from_a_trusted_proxy(tmp_path: Path) -> None:
    limited = {"rate_limit_per_s": 0.001, "rate_limit_burst": 1}
    alone = settings_in(tmp_path, **limited)
    with live_server(create_app(alone, FakeRuntime()), alone) as url:
        assert callers(url, "10.0.0.1", "10.0.0.2") == [200, 429]
    elsewhere = settings_in(tmp_path, **limited, trusted_proxies=("192.0.2.1",))
    with live_server(create_app(elsewhere, FakeRuntime()), elsewhere) as url:
        assert callers(url, "10.0.0.1", "10.0.0.2") == [200, 429]
    behind = settings_in(tmp_path, **limited, trusted_proxies=("127.0.0.1",))
    with live_server(create_app(behind, FakeRuntime()), behind) as url:
        assert callers(url, "10.0.0.1", "10.0.0.2", "10.0.0.1") == [200, 200, 429]
        # What a client writes there itself stands to the left of what the proxy adds, and counts nothing.
        assert callers(url, "10.9.9.8, 10.0.0.3", "10.9.9.9, 10.0.0.3") == [200, 429]


def test_nothing_else_that_a_proxy_could_say_is_read(tmp_path: Path) -> None:
    settings = settings_in(tmp_path, trusted_proxies=("127.0.0.1",), token_hashes=("0" * 64,))
    claims = {
        "x-forwarded-host": "evil.example", "x-forwarded-prefix": "/livez", "x-original-url": "/livez",
        "forwarded": "for=1.2.3.4;host=evil.example", "x-http-method-override": "GET",
    }  # fmt: skip
    with live_server(create_app(settings, FakeRuntime()), settings) as url:
        reply = httpx.get(f"{url}/v1/models", headers=claims)
        assert reply.status_code == 401 and "evil" not in str(reply.headers) + reply.text


def test_head_sends_a_head_alone_over_a_connection_that_goes_on(url: str) -> None:
    with connect(url) as connection:
        connection.sendall(
            b"HEAD /livez HTTP/1.1\r\nHost: a\r\n\r\n"
            + OK.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
        )
        first, second, body = until_closed(connection).split(b"\r\n\r\n")
    assert b"200 OK" in first and b"200 OK" in second and json.loads(body) == {"status": "ok"}
    length = f"content-length: {len(body)}".encode()
    assert length in first.lower() and length in second.lower()


class AskedAtTheLastMoment(Server):
    """A client connects and asks after the event loop has last looked at the port, before the port closes."""

    async def on_tick(self, counter: int) -> bool:
        self.handle_exit(signal.SIGTERM, None)
        self.client = socket.create_connection(self.address, timeout=30)
        self.client.sendall(OK)
        return True


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_a_connection_that_waits_when_the_port_closes_is_answered(loop: str, tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    app = create_app(settings, FakeRuntime())
    config = config_of(app, settings)
    config.loop = loop
    (listener,) = listen("127.0.0.1", 0)
    server = AskedAtTheLastMoment(config, app, settings)
    server.address = listener.getsockname()
    server.run([listener])
    with server.client as client:
        assert until_closed(client).startswith(b"HTTP/1.1 200")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(server.address, timeout=5)
