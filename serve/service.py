"""Everything that one running server owns, put together once: models, queues, pools, label sets, metrics."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from clipstack.errors import ClipstackError
from serve.batching import BatchLimits, Budget, Kind, SharedCores
from serve.bodies import ByteBudget
from serve.decoding import DecodePool
from serve.errors import ErrorCode, ServeError, draining
from serve.gallery import Gallery
from serve.images import ImageLimits
from serve.label_sets import LabelSetStore, MatrixCache, MatrixKey
from serve.metrics import Metrics, ModelObserver
from serve.operations import build_matrix
from serve.runtime import RuntimeLoader, available_cores
from serve.security import RateLimiter
from serve.settings import Settings
from serve.threads import give_way
from serve.url_fetch import UrlFetcher
from serve.versions import Machinery, ServedModel, Version

logger = logging.getLogger("serve")

READY_FOR_S = 1.0  # /readyz asks the models at most this often
READY_TIMEOUT_S = 10.0


class Service:
    """Made inside the running event loop; `start` loads the models, `close` gives everything back."""

    def __init__(self, settings: Settings, loaders: Mapping[str, RuntimeLoader], *, metrics: Metrics) -> None:
        self.settings = settings
        self.metrics = metrics
        self.bytes = ByteBudget(settings.max_inflight_bytes)
        self.fetcher = UrlFetcher(
            frozenset(host.lower() for host in settings.url_fetch_hosts),
            timeout_s=settings.url_fetch_timeout_s,
            max_bytes=settings.max_image_bytes,
        )
        self.limiter = RateLimiter(settings.rate_limit_per_s, settings.rate_limit_burst)
        self.draining = False
        self.in_flight = 0
        self.answered = 0
        self.load_error: ClipstackError | None = None
        self.gallery: Gallery | None = None
        self._device = ThreadPoolExecutor(
            settings.device_lanes, thread_name_prefix="device", initializer=give_way
        )
        self.decoder = DecodePool(
            settings.decode_threads or max(2, available_cores()),
            ImageLimits(settings.max_image_bytes, settings.max_image_pixels),
            observe=metrics.stages.labels("decode").observe,
        )
        self._machinery = Machinery(
            device=self._device,
            lanes=settings.device_lanes,
            decoder=self.decoder,
            limits=BatchLimits(settings.max_batch_images, settings.max_batch_texts, settings.max_batch_bytes),
            cores=SharedCores(
                total=available_cores(),
                preparing=self.decoder.num_threads,
                per_batch=max(1, (settings.device_threads or available_cores()) // settings.device_lanes),
            ),
            max_text_chars=settings.max_text_chars,
        )
        self._label_sets: LabelSetStore | None = None
        self.matrices = MatrixCache(settings.label_cache_bytes)
        self.models = {name: self._served(name, load) for name, load in loaders.items()}
        self.loaded_at: dict[str, float] = {}
        self._ready: tuple[float, asyncio.Task[None]] | None = None
        self._background: set[asyncio.Future[Any]] = set()

    def _served(self, name: str, load: RuntimeLoader) -> ServedModel:
        settings = self.settings
        return ServedModel(
            name,
            load,
            self._machinery,
            budget=Budget(settings.max_queue_items),
            observer=ModelObserver(self.metrics, name),
        )

    async def start(self) -> None:
        """Load every model. Raises ClipstackError, unless told to load in the background: then `load_error`
        has it.
        """
        loading = asyncio.ensure_future(self._load_all())
        if self.settings.load_in_background:
            self._background.add(loading)
            loading.add_done_callback(self._loaded)
        else:
            await loading

    def _loaded(self, loading: asyncio.Future[None]) -> None:
        """Note what ended the loading. Whatever it was, a server without its models must not look as if it
        were still loading them.
        """
        self._background.discard(loading)
        error = None if loading.cancelled() else loading.exception()
        if error is None:
            return
        if isinstance(error, ClipstackError):
            self.load_error = error
        else:
            self.load_error = ClipstackError(f"the server cannot start ({type(error).__name__}: {error})")
        logger.error("start failed", extra={"reason": str(self.load_error)}, exc_info=error)

    @property
    def is_loaded(self) -> bool:
        """Whether every model has been loaded."""
        return all(model.is_loaded for model in self.models.values())

    @property
    def label_sets(self) -> LabelSetStore:
        """Raises ServeError loading before the file is open."""
        if self._label_sets is None:
            raise ServeError(ErrorCode.LOADING, "the server is still starting", retry_after_s=1.0)
        return self._label_sets

    async def _load_all(self) -> None:
        settings = self.settings
        self._label_sets = LabelSetStore(
            settings.label_set_path, max_sets=settings.max_label_sets, max_bytes=settings.max_label_set_bytes
        )
        if settings.gallery is not None:  # read first: its mistakes show before a model has been loaded
            self.gallery = await asyncio.to_thread(
                Gallery.read,
                settings.gallery,
                max_images=settings.max_gallery_images,
                limits=ImageLimits(settings.max_image_bytes, settings.max_image_pixels),
            )
        for model in self.models.values():
            await self.load(model)

    async def load(self, model: ServedModel) -> tuple[Version | None, Version]:
        """Load or reload one model; the version before and the one that answers now. Raises ClipstackError.

        Registered label sets are computed for the new version when they are next asked for.
        """
        before = model.version if model.is_loaded else None
        result = "failed"
        try:
            after = await model.load()
            result = "done"
        finally:
            self.metrics.reloads.labels(model.name, result).inc()
        self.loaded_at[model.name] = time.time()
        if before is not None:
            self.metrics.model_info.remove(model.name, before.info.fingerprint, before.info.engine)
        if before is not None and before.info.fingerprint != after.info.fingerprint:
            self.matrices.forget(before.info.fingerprint)
        self.metrics.model_info.labels(model.name, after.info.fingerprint, after.info.engine).set(1)
        loaded = {"model": model.name, "fingerprint": after.info.fingerprint, "engine": after.info.engine}
        logger.info("model loaded", extra=loaded)
        return before, after

    async def reload(self, model: ServedModel) -> tuple[Version, Version]:
        """Reload one model, to its end even when nobody waits for it any more. Raises ClipstackError,
        ServeError.
        """
        before = model.version
        task = asyncio.ensure_future(self.load(model))
        self.in_background(task)
        _, after = await asyncio.shield(task)
        return before, after

    def model(self, name: str | None) -> ServedModel:
        """The model of a request; the first where it names none. Raises ServeError model_not_found."""
        if name is None:
            name = next(iter(self.models))
        if name not in self.models:
            message = "this server has no model of that name; GET /v1/models lists them"
            raise ServeError(ErrorCode.MODEL_NOT_FOUND, message, param="model")
        if self.load_error is not None:
            raise _start_failed()
        return self.models[name]

    def warm(self, version: Version, labels: tuple[str, ...], templates: tuple[str, ...]) -> None:
        """Begin to compute a registered label set's matrix, so that its first request need not wait."""
        key = MatrixKey(version.info.fingerprint, labels, templates)
        self.in_background(self.matrices.get(key, build_matrix(version, key), keep=True))

    def in_background(self, work: Awaitable[object]) -> None:
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._background_done)

    def _background_done(self, task: asyncio.Future[object]) -> None:
        self._background.discard(task)
        if not task.cancelled() and task.exception() is not None:
            logger.warning("background work failed", extra={"error": type(task.exception()).__name__})

    async def check_ready(self) -> None:
        """Raises ServeError loading, draining or not_ready. Known inputs go through the real queue of every
        model.
        """
        if self.draining:
            raise draining()
        if self.load_error is not None:
            raise _start_failed()
        now = time.monotonic()
        if self._ready is None or (self._ready[1].done() and now - self._ready[0] > READY_FOR_S):
            self._ready = (now, asyncio.ensure_future(self._probe()))
        await asyncio.shield(self._ready[1])

    async def _probe(self) -> None:
        for model in self.models.values():
            try:
                sound = await model.version.reproduces_canary(deadline=time.monotonic() + READY_TIMEOUT_S)
            except ServeError as error:
                if error.code is ErrorCode.LOADING:
                    raise
                raise _not_ready() from error
            if not sound:
                raise _not_ready()

    def render_metrics(self) -> bytes:
        for name, model in self.models.items():
            self.metrics.outstanding.labels(name).set(model.budget.items)
            for kind in Kind:
                depth = model.version.batcher.depth(kind) if model.is_loaded else 0
                self.metrics.queue_depth.labels(name, kind).set(depth)
        self.metrics.in_flight.set(self.in_flight)
        self.metrics.inflight_bytes.set(self.bytes.held)
        return self.metrics.render()

    async def close(self) -> None:
        for task in list(self._background):
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        await self.matrices.close()
        # In a thread: what still runs may take its time, and last replies are on their way out meanwhile.
        await asyncio.to_thread(self.decoder.close)
        await asyncio.to_thread(self._device.shutdown, wait=True, cancel_futures=True)
        if self._label_sets is not None:
            self._label_sets.close()


def _start_failed() -> ServeError:
    message = "the server could not load what it is to serve; its log has the reason"
    return ServeError(ErrorCode.NOT_READY, message, retry_after_s=60.0)


def _not_ready() -> ServeError:
    return ServeError(
        ErrorCode.NOT_READY, "a known input does not give its known vector in time", retry_after_s=1.0
    )
