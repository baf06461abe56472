"""Everything that one running server owns, put together once: models, queues, pools, label sets, metrics."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from clipstack.errors import ClipstackError
from serve.batching import BatchLimits, Budget, Kind, SharedCores
from serve.bodies import ByteBudget
from serve.decoding import DecodePool
from serve.errors import ErrorCode, ServeError, draining
from serve.gallery import Gallery
from serve.images import ImageLimits
from serve.label_sets import LabelSet, LabelSetStore, MatrixCache, MatrixKey
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
LOADER = "load"  # what the names of the threads that load begin with
IDLE_THREAD_S = 0.5  # in which one that has nothing to do has ended


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
        self._loader = ThreadPoolExecutor(thread_name_prefix=LOADER)
        self._machinery = Machinery(
            device=self._device,
            loader=self._loader,
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
        self.matrices = MatrixCache(settings.label_cache_bytes, is_served=self._is_served)
        self.models = {name: self._served(name, load) for name, load in loaders.items()}
        self.loaded_at: dict[str, float] = {}
        self._ready: tuple[float, asyncio.Task[None]] | None = None
        self._background: set[asyncio.Future[Any]] = set()
        self._warming: dict[asyncio.Future[Any], tuple[Version, MatrixKey]] = {}
        self._one_build = asyncio.Lock()

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
        settings, loop = self.settings, asyncio.get_running_loop()
        self._label_sets = LabelSetStore(
            settings.label_set_path,
            max_sets=settings.max_label_sets,
            max_bytes=settings.max_label_set_bytes,
            on_gone=lambda gone: loop.call_soon_threadsafe(self._label_set_gone, gone),
        )
        if settings.gallery is not None:  # read first: its mistakes show before a model has been loaded
            read = partial(
                Gallery.read,
                settings.gallery,
                max_images=settings.max_gallery_images,
                limits=ImageLimits(settings.max_image_bytes, settings.max_image_pixels),
            )
            self.gallery = await loop.run_in_executor(self._loader, read)
        for model in self.models.values():
            await self.load(model)

    async def load(self, model: ServedModel) -> tuple[Version | None, Version]:
        """Load or reload one model; the version before and the one that answers now. Raises ClipstackError.

        Registered label sets are computed for the new version when they are next asked for.
        """
        result = "failed"
        try:
            before, after = await model.load(partial(self._swapped, model))
            result = "done"
        finally:
            self.metrics.reloads.labels(model.name, result).inc()
        if before is not None and not self._is_served(before.info.fingerprint):
            self.matrices.forget(before.info.fingerprint)
            if self.gallery is not None:
                self.gallery.forget(before.info.fingerprint)
        return before, after

    def _swapped(self, model: ServedModel, old: Version | None, new: Version) -> None:
        """Tell of the version that answers from now on, and give up what was computed for the old one in
        advance: the reload would wait for it.
        """
        if old is not None:
            self.metrics.model_info.remove(model.name, old.info.fingerprint, old.info.engine)
            self._stop_warming(lambda version, key: version is old)
            self.matrices.call_off(old.info.fingerprint)
        self.loaded_at[model.name] = time.time()
        self.metrics.model_info.labels(model.name, new.info.fingerprint, new.info.engine).set(1)
        loaded = {"model": model.name, "fingerprint": new.info.fingerprint, "engine": new.info.engine}
        logger.info("model loaded", extra=loaded)

    def _versions(self) -> list[Version]:
        """Those that answer now."""
        return [model.version for model in self.models.values() if model.is_loaded]

    def _is_served(self, fingerprint: str) -> bool:
        return any(version.info.fingerprint == fingerprint for version in self._versions())

    async def reload(self, model: ServedModel) -> tuple[Version, Version]:
        """Reload one model, to its end even when nobody waits for it any more. Raises ClipstackError,
        ServeError.
        """
        before = model.version
        task = asyncio.ensure_future(self.load(model))
        self.in_background(task)
        try:
            _, after = await asyncio.shield(task)
        finally:
            del task  # an exception holds this frame, and would be held by it
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
        """Compute a registered label set's matrix in its turn, so that its first request need not wait."""
        key = MatrixKey(version.info.fingerprint, labels, templates)
        if (version, key) in self._warming.values():
            return
        task = self.in_background(self._warm(version, key))
        self._warming[task] = (version, key)
        task.add_done_callback(self._warming.pop)

    async def _warm(self, version: Version, key: MatrixKey) -> None:
        """One at a time, and only what is still wanted when its turn comes."""
        async with self._one_build:
            if version not in self._versions():
                return
            if await asyncio.to_thread(self.label_sets.has, key.labels, key.templates):
                await self.matrices.get(key, build_matrix(version, key), keep=False)

    def _stop_warming(self, where: Callable[[Version, MatrixKey], bool]) -> None:
        """What requests wait for as well goes on for them."""
        for task, (version, key) in self._warming.items():
            if where(version, key):
                task.cancel()

    def _label_set_gone(self, gone: LabelSet) -> None:
        """Another set may be the same under another id: its first request then computes the matrix."""
        self._stop_warming(lambda _, key: (key.labels, key.templates) == (gone.labels, gone.templates))

    def in_background(self, work: Awaitable[object]) -> asyncio.Future[object]:
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._background_done)
        return task

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
        self._loader.shutdown(wait=False, cancel_futures=True)  # a model may take minutes to load
        # In a thread: what still runs may take its time, and last replies are on their way out meanwhile.
        await asyncio.to_thread(self.decoder.close)
        await asyncio.to_thread(self._device.shutdown, wait=True, cancel_futures=True)
        if self._label_sets is not None:
            self._label_sets.close()


def is_still_loading() -> bool:
    """Whether a thread loads what nobody waits for any more. Nothing stops it but the process's end."""
    loading = [thread for thread in threading.enumerate() if thread.name.startswith(LOADER)]
    for thread in loading:
        thread.join(IDLE_THREAD_S)
    return any(thread.is_alive() for thread in loading)


def _start_failed() -> ServeError:
    message = "the server could not load what it is to serve; its log has the reason"
    return ServeError(ErrorCode.NOT_READY, message, retry_after_s=60.0)


def _not_ready() -> ServeError:
    return ServeError(
        ErrorCode.NOT_READY, "a known input does not give its known vector in time", retry_after_s=1.0
    )
