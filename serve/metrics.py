"""Prometheus metrics of one app, in a registry of its own."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from serve.batching import Kind

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        name = "clipstack_serve_"
        self.requests = Counter(
            name + "requests", "Answered requests", ("method", "route", "status"), registry=self.registry
        )
        self.latency = Histogram(
            name + "request_seconds", "From a request's first byte to its answer", ("route",),
            buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip
        self.stages = Histogram(
            name + "stage_seconds", "Time in one stage: read, decode, queue, device", ("stage",),
            buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip
        self.rejects = Counter(
            name + "rejects",
            "Requests not answered with 200, by error code",
            ("code",),
            registry=self.registry,
        )
        self.in_flight = Gauge(name + "in_flight", "Requests being worked on", registry=self.registry)
        self.queue_depth = Gauge(
            name + "queue_depth", "Items waiting for the device", ("model", "kind"), registry=self.registry
        )
        self.outstanding = Gauge(
            name + "outstanding_items",
            "Items accepted and not yet answered",
            ("model",),
            registry=self.registry,
        )
        self.inflight_bytes = Gauge(
            name + "inflight_bytes", "Bytes of request bodies held", registry=self.registry
        )
        self.batch_size = Histogram(
            name + "batch_size",
            "Items in a forward pass",
            ("model", "kind"),
            buckets=_SIZES,
            registry=self.registry,
        )
        self.expired = Counter(
            name + "expired_items", "Items dropped uncomputed because their deadline had passed",
            ("model", "kind"),
            registry=self.registry,
        )  # fmt: skip
        self.model_info = Gauge(
            name + "model_info", "1 for the fingerprint and the engine that a model name answers with",
            ("model", "fingerprint", "engine"),
            registry=self.registry,
        )  # fmt: skip
        self.reloads = Counter(name + "reloads", "Model reloads", ("model", "result"), registry=self.registry)

    def render(self) -> bytes:
        return generate_latest(self.registry)


class ModelObserver:
    """A batcher's observer that writes to the metrics under a model's name."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self._sizes = {kind: metrics.batch_size.labels(model, kind) for kind in Kind}
        self._expired = {kind: metrics.expired.labels(model, kind) for kind in Kind}
        self._queue = metrics.stages.labels("queue")
        self._device = metrics.stages.labels("device")

    def batch_done(self, kind: Kind, *, size: int, waited_s: float, device_s: float) -> None:
        self._sizes[kind].observe(size)
        self._queue.observe(waited_s)
        self._device.observe(device_s)

    def expired(self, kind: Kind) -> None:
        self._expired[kind].inc()
