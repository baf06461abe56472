"""HTTP of the API: each route reads its request, calls one operation on one version, writes the reply."""

from __future__ import annotations

import asyncio
import base64
import logging
import sqlite3
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import numpy as np
from fastapi import APIRouter, Path, Request
from starlette.responses import Response

from clipstack.errors import ClipstackError
from serve import schemas
from serve.bodies import ByteAccount, deadline_of, parse_body, read_body, wants_bytes
from serve.edge import json_bytes, trace_of, unless_client_leaves
from serve.errors import ErrorCode, ServeError
from serve.items import Item, parse_items, parse_labels, too_many
from serve.label_sets import LabelSet
from serve.operations import Question, check_dimensions, classify, compare, embed, shorten
from serve.runtime import Float32
from serve.service import Service
from serve.url_fetch import fetch_all
from serve.versions import Encoded, ServedModel, Version, until
from serve.zero_shot import parse_templates

SET_ID = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
SetId = Annotated[str, Path(pattern=SET_ID, examples=["pets"])]
router = APIRouter()
logger = logging.getLogger("serve")
T = TypeVar("T")
S = TypeVar("S", bound=schemas.Request)


@dataclass(frozen=True)
class Call:
    """What a route needs besides its parsed body."""

    request: Request
    service: Service
    deadline: float
    account: ByteAccount

    def choose(self, name: str | None) -> tuple[ServedModel, Version]:
        """The model asked for and its version. Raises ServeError model_not_found, loading,
        fingerprint_mismatch.
        """
        model = self.service.model(name)
        version = model.version
        wanted = self.request.headers.get("if-model-fingerprint")
        if wanted is not None and wanted.strip('"') != version.info.fingerprint:
            message = (
                "the model has another fingerprint than If-Model-Fingerprint asks for; GET /v1/models has it"
            )
            raise ServeError(ErrorCode.FINGERPRINT_MISMATCH, message, param="If-Model-Fingerprint")
        return model, version

    async def items(self, value: Any, modality: schemas.Modality, param: str) -> list[Item]:
        """The typed inputs, fetched where they are URLs. Raises ServeError."""
        items = parse_items(value, modality=modality, param=param, settings=self.service.settings)
        self.note(items=len(items))
        async with until(self.deadline, time.monotonic):
            return await fetch_all(items, self.service.fetcher, self.account, param=param)

    def note(self, **fields: Any) -> None:
        """Add to the request's log line."""
        trace_of(self.request.scope).fields.update(fields)


def service_of(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


async def _with_body(
    request: Request,
    schema: type[S],
    answer: Callable[[Call, S], Awaitable[Response]],
    *,
    uploads: str | None = None,
) -> Response:
    """Read and check the body, then answer it unless the client leaves first."""
    service, arrived_at = service_of(request), trace_of(request.scope).arrived_at
    deadline = deadline_of(request.headers, arrived_at, service.settings)
    with service.bytes.account() as account:
        body = await read_body(request, account, service.settings)
        service.metrics.stages.labels("read").observe(time.monotonic() - arrived_at)
        asked = await parse_body(request, body, schema, uploads=uploads, settings=service.settings)
        call = Call(request, service, deadline, account)
        return await unless_client_leaves(request.receive, _as_coroutine(answer(call, asked)))


async def _as_coroutine(answer: Awaitable[Response]) -> Response:
    return await answer


@router.post("/v1/embeddings")
async def create_embeddings(request: Request) -> Response:
    """Vectors of texts and images. A superset of OpenAI's embeddings."""
    return await _with_body(request, schemas.EmbeddingsRequest, _embeddings, uploads="input")


async def _embeddings(call: Call, asked: schemas.EmbeddingsRequest) -> Response:
    model, version = call.choose(asked.model)
    with version.lease():
        check_dimensions(asked.dimensions, version)
        items = await call.items(asked.input, asked.modality, "input")
        encoded = await embed(version, items, model.budget, deadline=call.deadline, truncate=asked.truncate)
    encoded = shorten(encoded, asked.dimensions, version)
    call.note(model=model.name)
    dtype = wants_bytes(call.request.headers)
    if dtype is not None:
        return _raw_reply(encoded, dtype, model, version)
    vectors = _as_base64(encoded.vectors) if asked.encoding_format == "base64" else encoded.vectors.tolist()
    data = [
        {"object": "embedding", "index": index, "embedding": vector} for index, vector in enumerate(vectors)
    ]
    return _reply(model, version, data, encoded)


def _as_base64(vectors: Float32) -> list[str]:
    return [base64.b64encode(row.astype("<f4").tobytes()).decode("ascii") for row in vectors]


def _raw_reply(encoded: Encoded, dtype: str, model: ServedModel, version: Version) -> Response:
    headers = {
        "X-Embedding-Shape": ",".join(str(size) for size in encoded.vectors.shape),
        "X-Embedding-Dtype": dtype,
        "X-Model": model.name,
        "X-Model-Fingerprint": version.info.fingerprint,
        "X-Prompt-Tokens": str(encoded.num_tokens),
        "X-Truncated": ",".join(str(index) for index in encoded.cut),
    }
    content = encoded.vectors.astype(np.dtype(dtype).newbyteorder("<")).tobytes()
    return Response(content, headers=headers, media_type="application/octet-stream")


def _reply(model: ServedModel, version: Version, data: Any, encoded: Encoded) -> Response:
    body = {
        "object": "list",
        "data": data,
        "model": model.name,
        "fingerprint": version.info.fingerprint,
        "usage": {"prompt_tokens": encoded.num_tokens, "total_tokens": encoded.num_tokens},
        "truncated": encoded.cut,
    }
    return json_response(body)


def json_response(body: Any, status: int = 200) -> Response:
    return Response(json_bytes(body), status, media_type="application/json")


@router.post("/v1/classify")
async def create_classification(request: Request) -> Response:
    """Zero-shot classification: how probable each label, given in words, is for each input."""
    return await _with_body(request, schemas.ClassifyRequest, _classification, uploads="inputs")


async def _classification(call: Call, asked: schemas.ClassifyRequest) -> Response:
    model, version = call.choose(asked.model)
    with version.lease():
        question = await _question(call.service, asked)
        items = await call.items(asked.inputs, asked.modality, "inputs")
        done = await classify(
            version,
            items,
            question,
            model.budget,
            call.service.matrices,
            call.service.decoder,
            deadline=call.deadline,
            truncate=asked.truncate,
        )
    call.note(model=model.name)
    data = [
        {"index": index, "predictions": predictions, "abstained": abstained}
        for index, (predictions, abstained) in enumerate(zip(done.predictions, done.abstained, strict=True))
    ]
    return _reply(model, version, data, done.encoded)


async def _question(service: Service, asked: schemas.ClassifyRequest) -> Question:
    """Labels and templates of the request or of its label set. Raises ServeError."""
    settings = service.settings
    if (asked.labels is None) == (asked.label_set is None):
        raise ServeError(ErrorCode.INVALID_REQUEST, "give either labels or label_set", param="labels")
    is_registered = asked.label_set is not None and asked.templates is None
    if asked.label_set is not None:
        known = await _stored(service.label_sets.get, asked.label_set)
        labels, templates = known.labels, known.templates
        if asked.templates is not None:
            templates = parse_templates(
                asked.templates, limit=settings.max_templates, max_chars=settings.max_text_chars
            )
    else:
        labels = parse_labels(
            asked.labels, param="labels", limit=settings.max_labels, max_chars=settings.max_text_chars
        )
        templates = parse_templates(
            asked.templates, limit=settings.max_templates, max_chars=settings.max_text_chars
        )
    if not is_registered:
        _check_prompts(labels, templates, settings.max_prompts)
    return Question(
        labels,
        templates,
        is_registered=is_registered,
        top_k=asked.top_k,
        multi_label=asked.multi_label,
        abstain_below=asked.abstain_below,
    )


def _check_prompts(labels: tuple[str, ...], templates: tuple[str, ...], limit: int) -> None:
    """Raises ServeError too_many_items."""
    if (count := len(labels) * len(templates)) > limit:
        raise too_many(count, "prompts (labels x templates)", limit).at("labels")


@router.post("/v1/similarity")
async def create_similarity(request: Request) -> Response:
    """Cosine of every text with every image."""
    return await _with_body(request, schemas.SimilarityRequest, _similarity, uploads="images")


async def _similarity(call: Call, asked: schemas.SimilarityRequest) -> Response:
    model, version = call.choose(asked.model)
    with version.lease():
        texts = await call.items(_as_list(asked.texts, "texts"), "text", "texts")
        images = await call.items(_as_list(asked.images, "images"), "image", "images")
        done = await compare(
            version, texts, images, model.budget, deadline=call.deadline, truncate=asked.truncate
        )
    call.note(model=model.name, items=len(texts) + len(images))
    return _reply(model, version, done.cosines.tolist(), done.encoded)


def _as_list(value: Any, param: str) -> list[Any]:
    if not isinstance(value, list):
        raise ServeError(ErrorCode.INVALID_REQUEST, "this is a list", param=param)
    return value


@router.get("/v1/label-sets")
async def list_label_sets(request: Request) -> Response:
    """All registered label sets."""
    sets = await _stored(service_of(request).label_sets.list)
    return json_response({"object": "list", "data": [_label_set(entry) for entry in sets]})


@router.get("/v1/label-sets/{set_id}")
async def get_label_set(request: Request, set_id: SetId) -> Response:
    """One registered label set."""
    return json_response(_label_set(await _stored(service_of(request).label_sets.get, set_id)))


@router.put("/v1/label-sets/{set_id}")
async def put_label_set(request: Request, set_id: SetId) -> Response:
    """Register labels and templates under an id; 201 where the id is new. The classifier is computed in the
    background.
    """

    async def store(call: Call, asked: schemas.LabelSetRequest) -> Response:
        settings, service = call.service.settings, call.service
        labels = parse_labels(
            asked.labels,
            param="labels",
            limit=settings.max_label_set_labels,
            max_chars=settings.max_text_chars,
        )
        templates = parse_templates(
            asked.templates, limit=settings.max_templates, max_chars=settings.max_text_chars
        )
        _check_prompts(labels, templates, settings.max_label_set_prompts)
        versions = [model.version for model in service.models.values()]
        for version in versions:
            await version.check_labels(labels, templates, deadline=call.deadline)
        entry = LabelSet(set_id, labels, templates)
        is_new = await _stored(service.label_sets.put, entry)
        for version in versions:
            service.warm(version, labels, templates)
        return json_response(_label_set(entry), 201 if is_new else 200)

    return await _with_body(request, schemas.LabelSetRequest, store)


@router.delete("/v1/label-sets/{set_id}")
async def delete_label_set(request: Request, set_id: SetId) -> Response:
    """Forget a label set."""
    await _stored(service_of(request).label_sets.delete, set_id)
    return json_response({"id": set_id, "object": "label_set", "deleted": True})


async def _stored(action: Callable[..., T], *args: object) -> T:
    """Use the label sets' file in a thread: a disk that is slow, or a lock, must not hold up other requests.

    Raises ServeError storage_failed where the file cannot be read or written just now.
    """
    try:
        return await asyncio.to_thread(action, *args)
    except sqlite3.Error as error:
        logger.error("label sets: the file cannot be used", extra={"reason": str(error)})
        message = "the label sets cannot be read or stored just now; the server's log has the reason"
        raise ServeError(ErrorCode.STORAGE_FAILED, message, retry_after_s=5.0) from error


def _label_set(entry: LabelSet) -> dict[str, Any]:
    return {"id": entry.id, "object": "label_set", "labels": entry.labels, "templates": entry.templates}


@router.get("/v1/models")
async def list_models(request: Request) -> Response:
    """The served models, what they are and with which fingerprint they answer."""
    service = service_of(request)
    data = [_model(service, model) for model in service.models.values() if model.is_loaded]
    return json_response({"object": "list", "data": data})


@router.get("/v1/models/{model_id:path}")
async def get_model(request: Request, model_id: Annotated[str, Path(examples=["demo"])]) -> Response:
    """One served model."""
    service = service_of(request)
    return json_response(_model(service, service.model(model_id)))


def _model(service: Service, model: ServedModel) -> dict[str, Any]:
    info = model.version.info
    gate = None if info.gate is None else {"image": info.gate.image, "text": info.gate.text}
    return {
        "id": model.name,
        "object": "model",
        "created": int(service.loaded_at[model.name]),
        "owned_by": "clipstack",
        "fingerprint": info.fingerprint,
        "dimensions": info.dimensions,
        "nested_dimensions": info.nested_dimensions,
        "context_length": info.context_length,
        "image_size": info.image_size,
        "probabilities": info.probabilities,
        "engine": info.engine,
        "device": info.device,
        "dtype": info.dtype,
        "parameters": info.parameters,
        "gate": gate,
    }


@router.post("/v1/models/reload")
async def reload_model(request: Request) -> Response:
    """Load a model again from where it came, test it, put it in place of the running one. Needs an admin
    token.

    No request is dropped, and where anything about the new model is wrong the old one stays.
    """

    async def reload(call: Call, asked: schemas.ReloadRequest) -> Response:
        model = call.service.model(asked.model)
        try:
            before, after = await call.service.reload(model)
        except ClipstackError as error:
            call.note(reload_error=str(error))
            message = "the model could not be loaded, so the old one goes on; the server's log has the reason"
            raise ServeError(ErrorCode.RELOAD_FAILED, message) from error
        body = {
            "model": model.name,
            "fingerprint": after.info.fingerprint,
            "previous_fingerprint": before.info.fingerprint,
            "changed": before.info.fingerprint != after.info.fingerprint,
        }
        return json_response(body)

    return await _with_body(request, schemas.ReloadRequest, reload)


@router.get("/livez")
async def livez() -> Response:
    """The process answers."""
    return json_response({"status": "ok"})


@router.get("/readyz")
async def readyz(request: Request) -> Response:
    """Known inputs, sent through the real queue of every model, give their known vectors."""
    await service_of(request).check_ready()
    return json_response({"status": "ok"})


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Prometheus metrics."""
    return Response(
        service_of(request).render_metrics(), media_type="text/plain; version=0.0.4; charset=utf-8"
    )


@router.get("/v1/gallery")
async def get_gallery(request: Request) -> Response:
    """How many pictures the server's gallery holds."""
    gallery = service_of(request).gallery
    return json_response({"count": 0 if gallery is None else len(gallery.pictures)})


@router.post("/v1/gallery/search")
async def search_gallery(request: Request) -> Response:
    """The pictures of the server's gallery that are nearest to a text."""
    return await _with_body(request, schemas.GallerySearch, _search)


async def _search(call: Call, asked: schemas.GallerySearch) -> Response:
    gallery = call.service.gallery
    if gallery is None:
        raise ServeError(ErrorCode.NOT_FOUND, "this server has no gallery")
    model, version = call.choose(asked.model)
    with version.lease():
        items = await call.items(asked.text, "text", "text")
        encoded = await embed(
            version, items, model.budget, deadline=call.deadline, truncate=True, param="text"
        )
        async with until(call.deadline, version.clock):  # the first search encodes the pictures
            hits = await gallery.search(version, encoded.vectors[0], asked.top_k)
    data = [{"name": hit.name, "similarity": cosine, "thumbnail": hit.thumbnail} for hit, cosine in hits]
    return json_response({"data": data, "model": model.name, "fingerprint": version.info.fingerprint})
