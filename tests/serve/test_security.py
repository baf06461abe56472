"""Tokens and rate limits."""

from __future__ import annotations

import hmac
from unittest.mock import patch

import pytest

from serve.errors import ErrorCode, ServeError
from serve.security import MAX_CALLERS, RateLimiter, bearer_token, caller_of, hash_token


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
