"""Fetching by URL: only where allowed, only public addresses, and to the address that was checked."""

from __future__ import annotations

import asyncio
import ipaddress
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from serve.errors import ErrorCode, ServeError
from serve.url_fetch import Address, UrlFetcher, is_public
from tests.serve.conftest import MakeClient
from tests.serve.fakes import FakeRuntime
from tests.serve.pictures import jpeg

LOOPBACK = ipaddress.ip_address("127.0.0.1")


PUBLIC = ("93.184.216.34", "2606:2800:220:1:248:1893:25c8:1946")
INSIDE = (
    "127.0.0.1", "10.1.2.3", "169.254.169.254", "192.168.0.1", "100.64.0.1", "0.0.0.0", "224.0.0.1",
    "255.255.255.255", "::1", "fe80::1", "fd00::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "2002:7f00:1::",
    "64:ff9b::7f00:1", "::",
)  # fmt: skip


@pytest.mark.parametrize("address", [*PUBLIC, *INSIDE])
def test_only_global_addresses_are_public(address: str) -> None:
    assert is_public(ipaddress.ip_address(address)) is (address in PUBLIC)


class Site(BaseHTTPRequestHandler):
    seen: list[str]
    hold: threading.Event

    def do_GET(self) -> None:
        type(self).seen.append(f"{self.headers['host']}{self.path}")
        port = self.server.server_address[1]
        match self.path:
            case "/image.jpg":
                self._send(200, jpeg(1))
            case "/big":
                self._send(200, b"x" * 50_000)
            case "/away":
                self._send(302, location=f"http://elsewhere.test:{port}/image.jpg")
            case "/inside":
                self._send(302, location=f"http://inside.test:{port}/image.jpg")
            case "/loop":
                self._send(302, location="/loop")
            case "/near":
                self._send(302, location="/image.jpg")
            case "/slow":
                type(self).hold.wait(20)
                self._send(200, b"")
            case _:
                self._send(404)

    def _send(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        """Quiet."""


class QuietServer(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that gave up half-way is what some tests are about."""


@contextmanager
def site() -> Iterator[tuple[int, type[Site]]]:
    handler: type[Site] = type("OneSite", (Site,), {"seen": [], "hold": threading.Event()})
    server = QuietServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server.server_address[1], handler
    finally:
        handler.hold.set()
        server.shutdown()
        thread.join()
        server.server_close()


def fetcher(port: int, **changes: Any) -> UrlFetcher:
    async def resolve(host: str, port: int) -> list[Address]:
        inside = ipaddress.ip_address("10.0.0.1")
        known = {"photos.test": [LOOPBACK], "inside.test": [inside], "mixed.test": [LOOPBACK, inside]}
        return known[host]

    options: dict[str, Any] = {
        "hosts": frozenset(("photos.test", "inside.test", "mixed.test")), "timeout_s": 5.0,
        "max_bytes": 20_000,
        "resolve": resolve, "is_allowed": lambda address: address == LOOPBACK, "ports": (port,),
    }  # fmt: skip
    return UrlFetcher(**{**options, **changes})


def fetch(port: int, url: str, **changes: Any) -> bytes:
    return asyncio.run(fetcher(port, **changes).fetch(url))


def test_an_allowed_image_is_fetched_from_the_address_that_was_checked() -> None:
    with site() as (port, handler):
        assert fetch(port, f"http://photos.test:{port}/image.jpg") == jpeg(1)
        assert fetch(port, f"http://photos.test:{port}/near") == jpeg(1)
        assert (
            handler.seen[0] == f"photos.test:{port}/image.jpg"
        )  # the name goes into the header, not to a resolver


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("http://elsewhere.test:{port}/image.jpg", ErrorCode.URL_FORBIDDEN),
        ("http://inside.test:{port}/image.jpg", ErrorCode.URL_FORBIDDEN),
        ("http://mixed.test:{port}/image.jpg", ErrorCode.URL_FORBIDDEN),
        ("http://photos.test:1/image.jpg", ErrorCode.URL_FORBIDDEN),
        ("http://user:pw@photos.test:{port}/image.jpg", ErrorCode.URL_FORBIDDEN),
        ("http://127.0.0.1:{port}/image.jpg", ErrorCode.URL_FORBIDDEN),
        ("file:///etc/passwd", ErrorCode.URL_FORBIDDEN),
        ("gopher://photos.test:{port}/", ErrorCode.URL_FORBIDDEN),
        ("nonsense", ErrorCode.URL_FORBIDDEN),
        ("http://[", ErrorCode.URL_FORBIDDEN),
        ("http://photos.test:{port}/away", ErrorCode.URL_FORBIDDEN),
        ("http://photos.test:{port}/inside", ErrorCode.URL_FORBIDDEN),
        ("http://photos.test:{port}/loop", ErrorCode.URL_FETCH_FAILED),
        ("http://photos.test:{port}/missing", ErrorCode.URL_FETCH_FAILED),
        ("http://photos.test:{port}/big", ErrorCode.IMAGE_TOO_LARGE),
    ],
)
def test_everything_else_is_refused(path: str, code: ErrorCode) -> None:
    with site() as (port, handler), pytest.raises(ServeError) as caught:
        fetch(port, path.format(port=port))
    assert caught.value.code is code
    assert len(handler.seen) <= 4  # the first request and three redirects


def test_a_slow_site_is_given_up() -> None:
    with site() as (port, _), pytest.raises(ServeError) as caught:
        fetch(port, f"http://photos.test:{port}/slow", timeout_s=0.2)
    assert caught.value.code is ErrorCode.URL_FETCH_FAILED


def test_urls_are_off_by_default(make_client: MakeClient, runtime: FakeRuntime) -> None:
    reply = make_client().post(
        "/v1/embeddings", json={"model": "fake", "input": ["a", {"image_url": "http://a.example/b"}]}
    )
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "url_fetch_disabled")
    assert reply.json()["error"]["param"] == "input[1]"
