"""A pool of threads that turns encoded images into prepared ones, beside the device."""

from __future__ import annotations

import asyncio
import binascii
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import pybase64

from serve.batching import Clock, deadline_exceeded
from serve.errors import ErrorCode, ServeError
from serve.images import ImageHeader, ImageLimits, decode_pixels, read_header
from serve.runtime import CROWD, Runtime, UInt8
from serve.threads import give_way

HEAVY_PIXELS = 4_000_000
_DATA_URI_HEAD = re.compile(r"data:[^,]*;base64", re.IGNORECASE)
MAX_HEAD_CHARS = 1000  # of a data URI: its media type and parameters
T = TypeVar("T")


@dataclass(frozen=True)
class _Heavy:
    """An image whose header was accepted and whose decode should wait for a heavy slot."""

    data: bytes
    header: ImageHeader


class DecodePool:
    """Small images are decoded as they come; large ones at most half of the threads at a time.

    So a stream of huge images slows itself down and leaves threads for everybody else.
    """

    def __init__(
        self,
        num_threads: int,
        limits: ImageLimits,
        *,
        observe: Callable[[float], None] = lambda seconds: None,
        clock: Clock = time.monotonic,
    ) -> None:
        self.num_threads = num_threads
        self._limits = limits
        self._observe = observe
        self._clock = clock
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="decode", initializer=give_way)
        self._heavy_slots = asyncio.Semaphore(max(1, num_threads // 2))

    async def prepare(
        self,
        data: bytes | str,
        runtime: Runtime,
        *,
        deadline: float,
        on_heavy: Callable[[], None] = lambda: None,
    ) -> UInt8:
        """Encoded image (base64 where it is text) -> prepared image. Raises ServeError.

        on_heavy: called when the image turns out to be a large one.
        """
        result = await self.run(self._light, data, runtime, deadline=deadline)
        if isinstance(result, _Heavy):
            on_heavy()
            return await self._run_heavy(result, runtime, deadline=deadline)
        return result

    async def _run_heavy(self, image: _Heavy, runtime: Runtime, *, deadline: float) -> UInt8:
        """The slot is free again when the thread is: a caller that leaves does not stop it."""
        loop = asyncio.get_running_loop()
        await self._heavy_slots.acquire()
        work = self._threads.submit(self._in_time, deadline, self._decode, (image, runtime))
        work.add_done_callback(lambda _: loop.call_soon_threadsafe(self._heavy_slots.release))
        return await asyncio.wrap_future(work)

    async def run(self, function: Callable[..., T], *args: object, deadline: float) -> T:
        """Run in the pool unless the deadline has passed by the time a thread is free."""
        return await asyncio.get_running_loop().run_in_executor(
            self._threads, self._in_time, deadline, function, args
        )

    def _in_time(self, deadline: float, function: Callable[..., T], args: tuple[object, ...]) -> T:
        started = self._clock()
        if started >= deadline:
            raise deadline_exceeded()
        with CROWD.preparing():
            result = function(*args)
        self._observe(self._clock() - started)
        return result

    def _light(self, data: bytes | str, runtime: Runtime) -> UInt8 | _Heavy:
        raw = decode_base64(data) if isinstance(data, str) else data
        header = read_header(raw, self._limits)
        heavy = _Heavy(raw, header)
        return heavy if header.pixels > HEAVY_PIXELS else self._decode(heavy, runtime)

    def _decode(self, image: _Heavy, runtime: Runtime) -> UInt8:
        return runtime.prepare_image(decode_pixels(image.data, image.header))

    def close(self) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)


def decode_base64(text: str) -> bytes:
    """The bytes of `data:image/...;base64,...` or of base64 alone. Raises ServeError base64_invalid."""
    start = 0
    if text[:5].lower() == "data:":
        comma = text.find(",", 0, MAX_HEAD_CHARS)
        if comma < 0 or _DATA_URI_HEAD.fullmatch(text, 0, comma) is None:
            message = "a data URI of an image looks like data:image/jpeg;base64,..."
            raise ServeError(ErrorCode.BASE64_INVALID, message)
        start = comma + 1
    try:
        return pybase64.b64decode(text[start:], validate=True)
    except (binascii.Error, ValueError) as error:
        raise ServeError(ErrorCode.BASE64_INVALID, "the image is not valid base64") from error
