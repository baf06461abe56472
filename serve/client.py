"""A thin, typed client of the server; needs httpx and nothing else of this package.

    with Client("http://127.0.0.1:8000", token="...") as client:
        client.embed(["a red circle", Path("photo.jpg")]).vectors
        client.classify([Path("photo.jpg")], labels=["cat", "dog"])[0].best.label

`AsyncClient` has the same methods to await. Texts are `str`, images `bytes` (the encoded file) or `Path`.
Both retry 429 and 503 when the server says when to come back, as long as the deadline allows.
"""

from __future__ import annotations

import asyncio
import base64
import json
import time
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import httpx

Input = str | bytes | Path
_COME_BACK = frozenset((429, 503))


@dataclass
class ApiError(Exception):
    """An answer other than success. `code` is stable and may be matched on; `param` names the part that is
    wrong.
    """

    status: int
    code: str
    message: str
    param: str | None
    request_id: str | None

    def __str__(self) -> str:
        where = f" ({self.param})" if self.param else ""
        return f"{self.status} {self.code}{where}: {self.message} [request {self.request_id}]"


@dataclass(frozen=True)
class Embeddings:
    """vectors: one unit-norm list of floats for each input, in order."""

    vectors: list[list[float]]
    model: str
    fingerprint: str
    truncated: list[int]


@dataclass(frozen=True)
class Prediction:
    label: str
    probability: float
    logit: float


@dataclass(frozen=True)
class Classification:
    """One input's most probable labels, best first. abstained: even the best was below `abstain_below`."""

    predictions: list[Prediction]
    abstained: bool

    @property
    def best(self) -> Prediction:
        return self.predictions[0]


@dataclass(frozen=True)
class Model:
    id: str
    fingerprint: str
    dimensions: int
    context_length: int
    image_size: tuple[int, int]


@dataclass(frozen=True)
class _Call:
    """One request, and nothing about how it is sent."""

    method: str
    path: str
    body: Mapping[str, Any] | None = None

    def arguments(self, *, headers: Mapping[str, str]) -> dict[str, Any]:
        content = None if self.body is None else json.dumps(self.body).encode()
        kind = {} if content is None else {"Content-Type": "application/json"}
        return {"method": self.method, "url": self.path, "content": content, "headers": {**headers, **kind}}


class _Shared:
    """What both clients do alike: building requests, reading replies, deciding on another try."""

    def __init__(
        self,
        base_url: str,
        *,
        token: str | None,
        model: str | None,
        timeout_s: float,
        if_fingerprint: str | None,
    ) -> None:
        self._base_url = base_url.rstrip("/") + "/"
        self._model = model
        self._timeout_s = timeout_s
        self._headers: dict[str, str] = {}
        if token is not None:
            self._headers["Authorization"] = f"Bearer {token}"
        if if_fingerprint is not None:
            self._headers["If-Model-Fingerprint"] = if_fingerprint

    def _call_headers(self, until: float) -> dict[str, str]:
        left_ms = max(1, round((until - time.monotonic()) * 1000))
        return {**self._headers, "X-Request-Timeout-Ms": str(left_ms)}

    @staticmethod
    def _wait_s(reply: httpx.Response, until: float) -> float | None:
        """How long to wait before another try, or None where there is to be none."""
        after = reply.headers.get("retry-after-ms", "")
        if reply.status_code not in _COME_BACK or not after.isdecimal():
            return None
        wait_s = int(after) / 1000
        return wait_s if time.monotonic() + wait_s < until else None

    @staticmethod
    def _result(reply: httpx.Response) -> Any:
        try:
            body = reply.json()
        except ValueError as error:
            raise ApiError(reply.status_code, "not_json", "the reply is not JSON", None, None) from error
        if reply.is_success:
            return body
        # What stands before the server (a proxy, a gateway) may answer in a shape of its own.
        answer = body if isinstance(body, dict) else {"error": body}
        told = answer.get("error")
        details = told if isinstance(told, dict) else {"message": told}
        raise ApiError(
            reply.status_code,
            details.get("code") or "unknown",
            details.get("message") or reply.reason_phrase,
            details.get("param"),
            answer.get("request_id"),
        )

    def _embed(self, inputs: Sequence[Input], model: str, **options: Any) -> _Call:
        body = {"model": model, "input": [_item(entry) for entry in inputs], "encoding_format": "base64"}
        return _Call("POST", "v1/embeddings", body | _given(options))

    def _classify(self, inputs: Sequence[Input], **options: Any) -> _Call:
        body = {"inputs": [_item(entry) for entry in inputs]}
        return _Call("POST", "v1/classify", body | _given({"model": self._model, **options}))

    def _similarity(self, texts: Sequence[str], images: Sequence[bytes | Path], **options: Any) -> _Call:
        body = {"texts": list(texts), "images": [_item(image) for image in images]}
        return _Call("POST", "v1/similarity", body | _given({"model": self._model, **options}))

    @staticmethod
    def _put_label_set(set_id: str, labels: Sequence[str], templates: Sequence[str] | str | None) -> _Call:
        return _Call(
            "PUT", _set_path(set_id), {"labels": list(labels)} | _given({"templates": _listed(templates)})
        )


def _set_path(set_id: str) -> str:
    return "v1/label-sets/" + quote(set_id, safe="")


def _item(entry: Input) -> dict[str, str]:
    if isinstance(entry, str):
        return {"text": entry}
    data = entry.read_bytes() if isinstance(entry, Path) else entry
    return {"image": "data:application/octet-stream;base64," + base64.b64encode(data).decode("ascii")}


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _listed(value: Sequence[str] | str | None) -> list[str] | str | None:
    return value if value is None or isinstance(value, str) else list(value)


def _embeddings(body: Any) -> Embeddings:
    vectors = [_floats(entry["embedding"]) for entry in body["data"]]
    return Embeddings(vectors, body["model"], body["fingerprint"], body["truncated"])


def _floats(encoded: str) -> list[float]:
    values = array("f", base64.b64decode(encoded))
    if array("H", [1]).tobytes() != b"\x01\x00":  # the wire is little-endian
        values.byteswap()
    return values.tolist()


def _classifications(body: Any) -> list[Classification]:
    return [
        Classification([Prediction(**prediction) for prediction in entry["predictions"]], entry["abstained"])
        for entry in body["data"]
    ]


def _models(body: Any) -> list[Model]:
    return [
        Model(
            entry["id"],
            entry["fingerprint"],
            entry["dimensions"],
            entry["context_length"],
            (entry["image_size"][0], entry["image_size"][1]),
        )
        for entry in body["data"]
    ]


def _first(models: Sequence[Model]) -> str:
    if not models:
        raise ApiError(200, "no_models", "the server is ready and lists no model", None, None)
    return models[0].id


class Client(_Shared):
    """The blocking client. Every method raises ApiError for an answer other than success, httpx.HTTPError for
    none.
    """

    def __init__(
        self,
        base_url: str,
        *,
        token: str | None = None,
        model: str | None = None,
        timeout_s: float = 30.0,
        if_fingerprint: str | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """token: what the server asks for, if it does. model: the one to ask; none: the first that it serves.
        timeout_s: how long a call may take, with the waiting for a busy or loading server. if_fingerprint:
        refuse vectors of any other model (code `fingerprint_mismatch`). transport: httpx's, for tests.
        """
        super().__init__(
            base_url, token=token, model=model, timeout_s=timeout_s, if_fingerprint=if_fingerprint
        )
        self._http = httpx.Client(base_url=self._base_url, transport=transport, timeout=self._timeout_s + 5)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def _send(self, call: _Call) -> Any:
        until = time.monotonic() + self._timeout_s
        while True:
            reply = self._http.request(**call.arguments(headers=self._call_headers(until)))
            wait_s = self._wait_s(reply, until)
            if wait_s is None:
                return self._result(reply)
            time.sleep(wait_s)

    def models(self) -> list[Model]:
        """Those that are loaded."""
        return _models(self._send(_Call("GET", "v1/models")))

    def _first_model(self) -> str:
        models = self.models()
        if not models:  # still loading: unlike the list, this answers 503 until it is done
            self._send(_Call("GET", "readyz"))
            models = self.models()
        return _first(models)

    def embed(
        self, inputs: Sequence[Input], *, dimensions: int | None = None, truncate: bool | None = None
    ) -> Embeddings:
        """Vectors of texts and images, in their order."""
        model = self._model or self._first_model()
        return _embeddings(self._send(self._embed(inputs, model, dimensions=dimensions, truncate=truncate)))

    def classify(
        self,
        inputs: Sequence[Input],
        *,
        labels: Sequence[str] | None = None,
        label_set: str | None = None,
        templates: Sequence[str] | str | None = None,
        top_k: int | None = None,
        multi_label: bool | None = None,
        abstain_below: float | None = None,
    ) -> list[Classification]:
        """The most probable labels of each input."""
        call = self._classify(
            inputs,
            labels=_listed(labels),
            label_set=label_set,
            templates=_listed(templates),
            top_k=top_k,
            multi_label=multi_label,
            abstain_below=abstain_below,
        )
        return _classifications(self._send(call))

    def similarity(self, texts: Sequence[str], images: Sequence[bytes | Path]) -> list[list[float]]:
        """A row for each text, a column for each image: cosines."""
        rows: list[list[float]] = self._send(self._similarity(texts, images))["data"]
        return rows

    def put_label_set(
        self, set_id: str, labels: Sequence[str], *, templates: Sequence[str] | str | None = None
    ) -> None:
        self._send(self._put_label_set(set_id, labels, templates))

    def label_sets(self) -> dict[str, list[str]]:
        """The labels of each registered set."""
        return {entry["id"]: entry["labels"] for entry in self._send(_Call("GET", "v1/label-sets"))["data"]}

    def delete_label_set(self, set_id: str) -> None:
        self._send(_Call("DELETE", _set_path(set_id)))


class AsyncClient(_Shared):
    """The same client for asyncio. Every method raises as Client's does."""

    def __init__(
        self,
        base_url: str,
        *,
        token: str | None = None,
        model: str | None = None,
        timeout_s: float = 30.0,
        if_fingerprint: str | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """The arguments are Client's."""
        super().__init__(
            base_url, token=token, model=model, timeout_s=timeout_s, if_fingerprint=if_fingerprint
        )
        self._http = httpx.AsyncClient(
            base_url=self._base_url, transport=transport, timeout=self._timeout_s + 5
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *details: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def _send(self, call: _Call) -> Any:
        until = time.monotonic() + self._timeout_s
        while True:
            reply = await self._http.request(**call.arguments(headers=self._call_headers(until)))
            wait_s = self._wait_s(reply, until)
            if wait_s is None:
                return self._result(reply)
            await asyncio.sleep(wait_s)

    async def models(self) -> list[Model]:
        """Those that are loaded."""
        return _models(await self._send(_Call("GET", "v1/models")))

    async def _first_model(self) -> str:
        models = await self.models()
        if not models:  # still loading: unlike the list, this answers 503 until it is done
            await self._send(_Call("GET", "readyz"))
            models = await self.models()
        return _first(models)

    async def embed(
        self, inputs: Sequence[Input], *, dimensions: int | None = None, truncate: bool | None = None
    ) -> Embeddings:
        """Vectors of texts and images, in their order."""
        model = self._model or await self._first_model()
        return _embeddings(
            await self._send(self._embed(inputs, model, dimensions=dimensions, truncate=truncate))
        )

    async def classify(
        self,
        inputs: Sequence[Input],
        *,
        labels: Sequence[str] | None = None,
        label_set: str | None = None,
        templates: Sequence[str] | str | None = None,
        top_k: int | None = None,
        multi_label: bool | None = None,
        abstain_below: float | None = None,
    ) -> list[Classification]:
        """The most probable labels of each input."""
        call = self._classify(
            inputs,
            labels=_listed(labels),
            label_set=label_set,
            templates=_listed(templates),
            top_k=top_k,
            multi_label=multi_label,
            abstain_below=abstain_below,
        )
        return _classifications(await self._send(call))

    async def similarity(self, texts: Sequence[str], images: Sequence[bytes | Path]) -> list[list[float]]:
        """A row for each text, a column for each image: cosines."""
        rows: list[list[float]] = (await self._send(self._similarity(texts, images)))["data"]
        return rows

    async def put_label_set(
        self, set_id: str, labels: Sequence[str], *, templates: Sequence[str] | str | None = None
    ) -> None:
        await self._send(self._put_label_set(set_id, labels, templates))

    async def label_sets(self) -> dict[str, list[str]]:
        """The labels of each registered set."""
        return {
            entry["id"]: entry["labels"]
            for entry in (await self._send(_Call("GET", "v1/label-sets")))["data"]
        }

    async def delete_label_set(self, set_id: str) -> None:
        await self._send(_Call("DELETE", _set_path(set_id)))
