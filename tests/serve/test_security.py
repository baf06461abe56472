"""Tokens, rate limits, and what is told of requests that were no HTTP."""

from __future__ import annotations

import hmac
import logging
import socket
from pathlib import Path
from unittest.mock import patch

import pytest

from serve.app import create_app
from serve.errors import ErrorCode, ServeError
from serve.protocol import MAX_HEAD_BYTES
from serve.security import MAX_CALLERS, RateLimiter, bearer_token, caller_of, hash_token
from serve.settings import Settings
from tests.serve.fakes import FakeRuntime
from tests.serve.live import live_server


def test_bearer_headers() -> None:
    assert bearer_token("Bearer abc") == bearer_token("bearer  abc ") == "abc"
    for header in (None, "", "abc", "Basic abc", "Bearer", "Bearer "):
        assert bearer_token(header) is None


def test_every_known_hash_is_compared_in_constant_time_even_after_a_match() -> None:
    hashes = tuple(hash_token(name) for name in ("one", "two", "three"))
    with patch("serve.security.hmac.compare_digest", wraps=hmac.compare_digest) as compare:
        assert caller_of("one", hashes) == hash_token("one")
        assert compare.call_count == 3
    with pytest.raises(ServeError) as caught:
        caller_of("four", hashes)
    assert caught.value.code is ErrorCode.UNAUTHORIZED
    with pytest.raises(ServeError):
        caller_of(None, hashes)


def test_a_bucket_fills_with_time() -> None:
    now = [0.0]
    limiter = RateLimiter(2.0, 3, clock=lambda: now[0])
    for _ in range(3):
        limiter.take("a")
    with pytest.raises(ServeError) as caught:
        limiter.take("a")
    assert caught.value.retry_after_s == pytest.approx(0.5)
    limiter.take("b")
    now[0] = 0.5
    limiter.take("a")
    with pytest.raises(ServeError):
        limiter.take("a")
    now[0] = 100.0
    for _ in range(3):
        limiter.take("a")


def test_buckets_do_not_grow_without_bound() -> None:
    limiter = RateLimiter(1.0, 1)
    for caller in range(MAX_CALLERS + 500):
        limiter.take(str(caller))
    assert len(limiter._buckets) == MAX_CALLERS


def test_what_never_reaches_the_application_is_counted_and_logged_as_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Late heads, large heads, and what is no HTTP are what attacks are made of."""
    caplog.set_level(logging.INFO, "serve.requests")
    monkeypatch.setattr("serve.protocol.HEAD_TIMEOUT_S", 0.3)
    settings = Settings(label_set_file=tmp_path / "sets.sqlite3")
    large = b"GET / HTTP/1.1\r\nX: ".ljust(MAX_HEAD_BYTES + 1, b"a")
    refusals = {b"hello\r\n\r\n": (400, "invalid_request"), b"GET": (408, "request_timeout")}
    refusals[large] = (413, "headers_too_large")
    app = create_app(settings, FakeRuntime())
    with live_server(app) as url:
        address = url.removeprefix("http://").split(":")
        for sent, (status, _) in refusals.items():
            with socket.create_connection((address[0], int(address[1])), timeout=30) as connection:
                connection.sendall(sent)
                assert connection.recv(12) == f"HTTP/1.1 {status}".encode()
        with socket.create_connection((address[0], int(address[1])), timeout=30) as silent:
            assert silent.recv(12) == b"HTTP/1.1 408"  # and nothing is counted: no request was begun
        counted = app.state.service.render_metrics().decode()
    for status, code in refusals.values():
        assert f'clipstack_serve_rejects_total{{code="{code}"}} 1.0' in counted
        assert f'requests_total{{method="other",route="other",status="{status}"}} 1.0' in counted
    lines = [vars(record) for record in caplog.records if record.name == "serve.requests"]
    assert [(line["status"], line["code"]) for line in lines] == list(refusals.values())
