"""Who may call: bearer tokens compared in constant time, and a token bucket for each caller."""

from __future__ import annotations

import hashlib
import hmac
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from serve.errors import ErrorCode, ServeError

MAX_CALLERS = 10_000  # rate-limit buckets kept; beyond it the least recent caller starts afresh


def hash_token(token: str) -> str:
    """What the settings hold of a token. Tokens are long and random, so one round of SHA-256 is enough."""
    return hashlib.sha256(token.encode()).hexdigest()


def bearer_token(authorization: str | None) -> str | None:
    """The token of an Authorization header, or None."""
    scheme, _, token = (authorization or "").partition(" ")
    return token.strip() or None if scheme.lower() == "bearer" else None


def caller_of(token: str | None, hashes: tuple[str, ...]) -> str:
    """The hash of the caller's token. Raises ServeError unauthorized. Every entry is compared, whatever the
    first say.
    """
    given = hash_token(token or "")
    matches = [hmac.compare_digest(given, known) for known in hashes]
    if token is None:
        raise ServeError(
            ErrorCode.UNAUTHORIZED, "no bearer token; send the header Authorization: Bearer TOKEN"
        )
    if not any(matches):
        raise ServeError(ErrorCode.UNAUTHORIZED, "this bearer token is not known here")
    return given


@dataclass
class _Bucket:
    tokens: float
    filled_at: float


class RateLimiter:
    """`burst` requests at once, then `per_s` a second, for each caller apart."""

    def __init__(self, per_s: float, burst: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_s = per_s
        self._burst = burst
        self._clock = clock
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()

    def take(self, caller: str) -> None:
        """Count one request. Raises ServeError rate_limited, saying when the next one may come."""
        if self._per_s == 0:
            return
        now = self._clock()
        bucket = self._buckets.setdefault(caller, _Bucket(float(self._burst), now))
        self._buckets.move_to_end(caller)
        if len(self._buckets) > MAX_CALLERS:
            self._buckets.popitem(last=False)
        bucket.tokens = min(float(self._burst), bucket.tokens + (now - bucket.filled_at) * self._per_s)
        bucket.filled_at = now
        if bucket.tokens < 1:
            wait_s = (1 - bucket.tokens) / self._per_s
            raise ServeError(
                ErrorCode.RATE_LIMITED, "this caller's rate limit is used up", retry_after_s=wait_s
            )
        bucket.tokens -= 1
