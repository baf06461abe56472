"""A served model name, the version of it that answers now, and how a new version takes over without a request
lost.
"""

from __future__ import annotations

import asyncio
import logging
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import numpy as np

from clipstack.errors import ClipstackError
from serve.batching import (
    Batcher,
    BatchLimits,
    BatchObserver,
    Budget,
    Clock,
    Kind,
    SharedCores,
    deadline_exceeded,
)
from serve.decoding import DecodePool
from serve.errors import ErrorCode, ServeError
from serve.items import ImageItem, Item, TextItem
from serve.runtime import Float32, Runtime, RuntimeLoader, SelfTestError, TokenIds, Tokens, UInt8
from serve.threads import sealed
from serve.zero_shot import prompts_of

logger = logging.getLogger("serve")

CANARY_TEXT = "a photo of a canary"
CANARY_TOLERANCE = 1e-3  # largest difference of any component; vectors are unit-norm
# Texts up to these are tokenised in the event loop: cheaper than a trip to the pool.
INLINE_TEXTS = 8
INLINE_CHARS = 2000
CHECKED_LABELS = 256  # at a time: their prompts are in memory at once
FOREVER = float("inf")
T = TypeVar("T")


@dataclass(frozen=True)
class Encoded:
    """vectors (N, D); num_tokens of all texts together; cut: indices of texts that were shortened, on
    request.
    """

    vectors: Float32
    num_tokens: int
    cut: tuple[int, ...]


@dataclass(frozen=True)
class Canary:
    """Known inputs with the vectors that this version gave for them when it was accepted."""

    image: UInt8
    text: TokenIds
    image_vector: Float32
    text_vector: Float32


def self_test(runtime: Runtime) -> Canary:
    """Encode known inputs alone and among others. Raises SelfTestError unless the vectors hold together."""
    image, text = canary_image(runtime), runtime.tokenize(CANARY_TEXT, truncate=True).ids
    other = runtime.tokenize("something else, and longer, to stand beside it in the batch", truncate=True).ids
    alone = np.concatenate([runtime.encode_images([image]), runtime.encode_texts([text])])
    among = np.concatenate(
        [runtime.encode_images([image[:, ::-1].copy(), image])[1:], runtime.encode_texts([other, text])[1:]]
    )
    if alone.shape != (2, runtime.info.dimensions):
        raise SelfTestError(
            f"self-test: vectors of shape {alone.shape[1:]}, not ({runtime.info.dimensions},)"
        )
    if not np.isfinite(alone).all():
        raise SelfTestError("self-test: a vector holds values that are not numbers; the weights are damaged")
    if np.abs(np.linalg.norm(alone, axis=-1) - 1).max() > CANARY_TOLERANCE:
        raise SelfTestError("self-test: vectors are not unit-norm")
    if np.abs(alone - among).max() > CANARY_TOLERANCE:
        raise SelfTestError("self-test: a vector depends on what else is in its batch")
    return Canary(image, text, alone[0], alone[1])


async def or_refuse(work: Awaitable[T], what: str) -> T:
    """The result of `work`. Raises ClipstackError for whatever went wrong in it.

    An engine raises what it likes. Its exception is asked for, not caught, so that none is missed.
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait([task])
    finally:
        task.cancel()  # nobody waits for it any more
    error = task.exception()
    if error is None:
        return task.result()
    _let_go(error)
    # This frame goes with the exception. If it held the exception in turn, both would live on, and with them
    # what the callers' frames hold: the refused model and the one that answers.
    del task, work
    try:
        if isinstance(error, ClipstackError):
            raise error
        raise SelfTestError(f"{what} ({type(error).__name__}: {error})") from error
    finally:
        del error


def _let_go(error: BaseException | None) -> None:
    """Empty the frames that it came through: they hold the refused model for as long as it lives."""
    seen = set()
    while error is not None and id(error) not in seen:  # causes may form a ring
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def canary_image(runtime: Runtime) -> UInt8:
    """A smooth picture with an edge in it, from a formula."""
    rows, columns = np.mgrid[0:96, 0:128]
    picture = np.stack([rows * 2, columns * 2, (rows * columns) % 256], axis=-1).astype(np.uint8)
    picture[20:60, 30:70] = (250, 220, 20)
    return runtime.prepare_image(picture)


@dataclass(frozen=True)
class Machinery:
    """What all versions of all models share."""

    device: Executor
    loader: Executor
    """Not asyncio's own: the end of the event loop would wait for a model that is still being loaded."""
    lanes: int
    """Batches of one model that the device computes side by side."""
    decoder: DecodePool
    limits: BatchLimits
    cores: SharedCores
    """Those of a device that is the CPU."""
    max_text_chars: int


class Version:
    """One loaded model with its queue. A request holds a lease on one version from its first item to its
    reply.
    """

    def __init__(
        self,
        runtime: Runtime,
        canary: Canary,
        batcher: Batcher,
        machinery: Machinery,
        *,
        clock: Clock = time.monotonic,
    ) -> None:
        self.runtime = runtime
        self.info = runtime.info
        self.canary = canary
        self.batcher = batcher
        self._decoder = machinery.decoder
        self._max_chars = machinery.max_text_chars
        self.clock = clock
        self._leases = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @contextmanager
    def lease(self) -> Iterator[Version]:
        self._leases += 1
        self._idle.clear()
        try:
            yield self
        finally:
            self._leases -= 1
            if self._leases == 0:
                self._idle.set()

    async def drained(self) -> None:
        """Return when no request holds this version."""
        await self._idle.wait()

    async def encode(self, items: Sequence[Item], *, deadline: float, truncate: bool, param: str) -> Encoded:
        """Vectors of the items in their order. Raises the ServeError of the first item that fails, naming it.

        Whatever ends this call (an error, the deadline, a client that left) withdraws its items from the
        queue.
        """
        async with until(deadline, self.clock):
            tokens = await self._tokenize(items, truncate=truncate, param=param, deadline=deadline)
            slots = asyncio.Semaphore(self._decoder.num_threads)
            parts = [
                self._encode_text(tokens[index].ids, deadline)
                if isinstance(item, TextItem)
                else asyncio.ensure_future(self._encode_image(item, f"{param}[{index}]", slots, deadline))
                for index, item in enumerate(items)
            ]
            vectors = await gather_or_withdraw(parts)
        return Encoded(
            vectors=np.stack(vectors),
            num_tokens=sum(text.count for text in tokens.values()),
            cut=tuple(index for index, text in tokens.items() if text.was_cut),
        )

    async def _tokenize(
        self, items: Sequence[Item], *, truncate: bool, param: str, deadline: float
    ) -> dict[int, Tokens]:
        texts = {index: item.text for index, item in enumerate(items) if isinstance(item, TextItem)}
        work = partial(
            self._tokenize_all,
            texts,
            truncate=truncate,
            param_of=lambda index: f"{param}[{index}]",
            deadline=deadline,
        )
        if len(texts) <= INLINE_TEXTS and sum(map(len, texts.values())) <= INLINE_CHARS:
            return work()
        return await self._decoder.run(work, deadline=deadline)

    def _tokenize_all(
        self, texts: Mapping[int, str], *, truncate: bool, param_of: Callable[[int], str], deadline: float
    ) -> dict[int, Tokens]:
        """Stops at the deadline: to clean a text can take quadratic time, as with nested entities."""
        done = {}
        for index, text in texts.items():
            if self.clock() >= deadline:
                raise deadline_exceeded()
            try:
                done[index] = self._tokenize_one(text, truncate=truncate)
            except ServeError as error:
                raise error.at(param_of(index)) from error
        return done

    def _tokenize_one(self, text: str, *, truncate: bool) -> Tokens:
        if len(text) <= self._max_chars:
            return self.runtime.tokenize(text, truncate=truncate)
        if not truncate:
            message = f"the text has {len(text)} characters; this server reads {self._max_chars}"
            raise ServeError(ErrorCode.TEXT_TOO_LONG, message)
        return replace(self.runtime.tokenize(text[: self._max_chars], truncate=True), was_cut=True)

    def _encode_text(self, ids: TokenIds, deadline: float) -> asyncio.Future[Float32]:
        return self.batcher.submit(Kind.TEXT, ids, deadline=deadline)

    async def _encode_image(
        self, item: Item, param: str, slots: asyncio.Semaphore, deadline: float
    ) -> Float32:
        assert isinstance(item, ImageItem), "URLs are fetched before items are encoded"
        try:
            with self.batcher.expect(Kind.IMAGE) as forget:
                async with slots:
                    image = await self._decoder.prepare(
                        item.data, self.runtime, deadline=deadline, on_heavy=forget
                    )
                vector = self.batcher.submit(Kind.IMAGE, image, deadline=deadline)
            return await vector
        except ServeError as error:
            raise error.at(param) from error

    async def encode_prompts(
        self, prompts: Sequence[str], *, first_label: int, per_label: int, chunk: int
    ) -> Float32:
        """Prompts of a classifier, `per_label` for each label from `first_label` on -> (N, D). No deadline.

        A chunk at a time, so that they never fill the queue.
        """
        rows = []
        for start in range(0, len(prompts), chunk):
            texts = {index: prompts[index] for index in range(start, min(start + chunk, len(prompts)))}
            tokens = await self._tokenize_prompts(
                texts, first_label=first_label, per_label=per_label, deadline=FOREVER
            )
            rows += await gather_or_withdraw(
                [self._encode_text(text.ids, FOREVER) for text in tokens.values()]
            )
        return np.stack(rows)

    async def check_labels(self, labels: Sequence[str], templates: Sequence[str], *, deadline: float) -> None:
        """Raises ServeError text_too_long naming a label that does not fit into the context with every
        template.
        """
        longest = await self._decoder.run(self._most_tokens, templates, deadline=deadline)
        for start in range(0, len(labels), CHECKED_LABELS):
            part = prompts_of(tuple(labels[start : start + CHECKED_LABELS]), (longest,))
            await self._tokenize_prompts(
                dict(enumerate(part)), first_label=start, per_label=1, deadline=deadline
            )

    def _most_tokens(self, templates: Sequence[str]) -> str:
        """The template that leaves least room for a label."""
        return max(templates, key=lambda text: self._tokenize_one(text, truncate=True).count)

    async def _tokenize_prompts(
        self, prompts: Mapping[int, str], *, first_label: int, per_label: int, deadline: float
    ) -> dict[int, Tokens]:
        name = partial(_label_param, first_label=first_label, per_label=per_label)
        work = partial(self._tokenize_all, prompts, truncate=False, param_of=name, deadline=deadline)
        return await self._decoder.run(work, deadline=deadline)

    async def reproduces_canary(self, *, deadline: float) -> bool:
        """Whether the known inputs, sent through the real queue, give their known vectors again."""
        futures = [
            self.batcher.submit(Kind.IMAGE, self.canary.image, deadline=deadline),
            self.batcher.submit(Kind.TEXT, self.canary.text, deadline=deadline),
        ]
        async with until(deadline, self.clock):
            image, text = await gather_or_withdraw(futures)
        difference = max(
            np.abs(image - self.canary.image_vector).max(), np.abs(text - self.canary.text_vector).max()
        )
        return bool(difference <= CANARY_TOLERANCE)


def _label_param(prompt: int, *, first_label: int, per_label: int) -> str:
    return f"labels[{first_label + prompt // per_label}]"


@asynccontextmanager
async def until(deadline: float, clock: Clock) -> AsyncIterator[None]:
    """Raise ServeError deadline_exceeded when the body takes longer. An infinite deadline never passes."""
    left_s = deadline - clock()
    try:
        async with asyncio.timeout(max(left_s, 0.0) if left_s != FOREVER else None):
            yield
    except TimeoutError as late:
        raise deadline_exceeded() from late


async def gather_or_withdraw(parts: Sequence[asyncio.Future[Float32]]) -> list[Float32]:
    """All results in order; on the first failure, or when this call is cancelled, none is left."""
    if len(parts) == 1:
        return [await parts[0]]
    try:
        return await asyncio.gather(*parts)
    finally:
        for part in parts:
            part.cancel()


class ServedModel:
    """One model name: its current version, its budget of outstanding items, and how to load it again."""

    def __init__(
        self,
        name: str,
        load: RuntimeLoader,
        machinery: Machinery,
        *,
        budget: Budget,
        observer: BatchObserver,
    ) -> None:
        self.name = name
        self.budget = budget
        self._load = load
        self._machinery = machinery
        self._observer = observer
        self._version: Version | None = None
        self._reloading = asyncio.Lock()

    @property
    def version(self) -> Version:
        """The version that answers now. Raises ServeError loading before there is one."""
        if self._version is None:
            raise ServeError(ErrorCode.LOADING, "the model is still loading", retry_after_s=1.0)
        return self._version

    @property
    def is_loaded(self) -> bool:
        return self._version is not None

    async def load(
        self, on_swap: Callable[[Version | None, Version], None]
    ) -> tuple[Version | None, Version]:
        """Load, self-test, and put the new version in place; the old one, if any, answers until then. Returns
        both when no request holds the old one any more.

        on_swap: called with the old and the new version as soon as the new one answers. Raises
        ClipstackError, with the old version still in place; ServeError reload_in_progress for a second
        caller.
        """
        if self._reloading.locked():
            raise ServeError(ErrorCode.RELOAD_IN_PROGRESS, "this model is being reloaded already")
        async with self._reloading:
            shared = self._machinery
            loop = asyncio.get_running_loop()
            # No name for these futures: an exception holds this frame, and would be held by it.
            runtime = await or_refuse(
                loop.run_in_executor(shared.loader, sealed(self._load)), "the model cannot be loaded"
            )
            canary = await or_refuse(
                loop.run_in_executor(shared.device, sealed(self_test), runtime),
                "self-test: the model cannot encode",
            )
            batcher = Batcher(
                runtime,
                device=shared.device,
                lanes=shared.lanes,
                limits=shared.limits,
                cores=shared.cores if runtime.info.device == "cpu" else None,
                observer=self._observer,
            )
            old, new = self._version, Version(runtime, canary, batcher, shared)
            self._version = new
            on_swap(old, new)
            if old is not None:
                await old.drained()
            return old, new
