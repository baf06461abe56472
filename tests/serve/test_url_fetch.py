"""Fetching by URL: only where allowed, only public addresses, and to the address that was checked."""

from __future__ import annotations

import asyncio
import ipaddress
import ssl
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast

import httpx
import pytest
from fastapi import FastAPI

from serve.bodies import ByteBudget
from serve.errors import ErrorCode, ServeError
from serve.items import UrlItem
from serve.url_fetch import Address, UrlFetcher, fetch_all, is_public, tls
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
            case "/drip":
                self._send(200, b"x" * 20_001, held_back=1)
            case "/slow":
                type(self).hold.wait(20)
                self._send(200, b"")
            case _:
                self._send(404)

    def _send(self, status: int, body: bytes = b"", *, held_back: int = 0, **headers: str) -> None:
        """held_back: bytes at the end that wait for `hold`."""
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[: len(body) - held_back])
        if held_back:
            type(self).hold.wait(20)
            self.wfile.write(body[-held_back:])

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
    with ByteBudget(1 << 20).account() as account:
        data = asyncio.run(fetcher(port, **changes).fetch(url, account))
        assert account.held == len(data)
    return data


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


def test_forbidden_urls_cost_no_connection_and_tls_is_set_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Counter[str]()

    def counted(name: str, real: Any) -> Any:
        def make(*args: Any, **options: Any) -> Any:
            made[name] += 1
            return real(*args, **options)

        return make

    tls.cache_clear()
    monkeypatch.setattr("httpx.create_ssl_context", counted("tls", httpx.create_ssl_context))
    monkeypatch.setattr("ssl.create_default_context", counted("default tls", ssl.create_default_context))
    monkeypatch.setattr("httpx.AsyncClient", counted("client", httpx.AsyncClient))
    with site() as (port, _):
        for _ in range(3):
            with pytest.raises(ServeError):
                fetch(port, "http://elsewhere.test/image.jpg")
        assert not made
        for _ in range(3):
            fetch(port, f"http://photos.test:{port}/image.jpg")
    assert (made["client"], made["tls"]) == (3, 1) and made["default tls"] <= 1


def test_fetched_bytes_are_held_as_they_arrive() -> None:
    """A site that sends its last byte late must not fill the memory with what nobody has counted."""

    async def scenario(port: int, handler: type[Site]) -> None:
        budget = ByteBudget(35_000)
        fetching = fetcher(port, max_bytes=100_000)
        url = f"http://photos.test:{port}/drip"
        with budget.account() as first, budget.account() as second:
            early = asyncio.ensure_future(fetching.fetch(url, first))
            async with asyncio.timeout(20):
                while budget.held < 20_000:
                    await asyncio.sleep(0.01)
                with pytest.raises(ServeError) as caught:
                    await fetching.fetch(url, second)
            assert caught.value.code is ErrorCode.QUEUE_FULL
            assert not early.done() and budget.held <= 35_000
            handler.hold.set()
            assert len(await early) == 20_001
        assert budget.held == 0

    with site() as (port, handler):
        asyncio.run(scenario(port, handler))


def test_all_requests_share_the_slots_for_fetching(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.url_fetch.CONCURRENT_FETCHES", 3)
    begun: list[str] = []

    async def scenario() -> None:
        go_on = asyncio.Event()

        async def resolve(host: str, port: int) -> list[Address]:
            begun.append(host)
            await go_on.wait()
            return []

        fetching = fetcher(80, resolve=resolve)
        items = [UrlItem("http://photos.test/image.jpg")] * 4
        with ByteBudget(1 << 20).account() as account:
            requests = [fetch_all(items, fetching, account, param="input") for _ in range(3)]
            waiting = asyncio.gather(*requests, return_exceptions=True)
            for _ in range(100):  # steps of the loop, of which each fetch takes a few to begin
                await asyncio.sleep(0)
            assert len(begun) == 3
            go_on.set()
            for error in await waiting:
                assert isinstance(error, ServeError) and error.code is ErrorCode.URL_FORBIDDEN

    asyncio.run(scenario())


def test_the_deadline_of_a_request_holds_for_fetching_too(
    make_client: MakeClient, runtime: FakeRuntime
) -> None:
    client = make_client()
    service = cast(FastAPI, client.app).state.service
    with site() as (port, handler):
        service.fetcher = fetcher(port)
        asked = {"model": "fake", "input": [{"image_url": f"http://photos.test:{port}/slow"}] * 3}
        reply = client.post("/v1/embeddings", json=asked, headers={"x-request-timeout-ms": "200"})
        assert not handler.hold.is_set()
    assert (reply.status_code, reply.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert service.bytes.held == 0


def test_urls_are_off_by_default(make_client: MakeClient, runtime: FakeRuntime) -> None:
    reply = make_client().post(
        "/v1/embeddings", json={"model": "fake", "input": ["a", {"image_url": "http://a.example/b"}]}
    )
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "url_fetch_disabled")
    assert reply.json()["error"]["param"] == "input[1]"
