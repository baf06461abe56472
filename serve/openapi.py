"""The OpenAPI document: what FastAPI knows of the routes, plus bodies, replies, errors and headers."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from clipstack import __version__
from serve import schemas
from serve.errors import ErrorCode

Json = dict[str, Any]
_REF = "#/components/schemas/{model}"
_DESCRIPTION = """\
Zero-shot classification and embeddings of images and texts with CLIP-style models.

`POST /v1/embeddings` takes what OpenAI's clients send. Every error has one shape and a stable `code`.
Requests may carry `X-Request-ID`, `X-Request-Timeout-Ms` (a whole number of milliseconds, answered with 504
when they have passed) and `If-Model-Fingerprint` (answered with 412 when the model is another one).
"""

# What each operation reads and writes. uploads: the form field of multipart uploads, where they are taken.
_Schema = type[BaseModel] | None
_OPERATIONS: dict[tuple[str, str], tuple[_Schema, str | None, dict[int, _Schema]]] = {
    ("post", "/v1/embeddings"): (schemas.EmbeddingsRequest, "input", {200: schemas.EmbeddingsReply}),
    ("post", "/v1/classify"): (schemas.ClassifyRequest, "inputs", {200: schemas.ClassifyReply}),
    ("post", "/v1/similarity"): (schemas.SimilarityRequest, "images", {200: schemas.SimilarityReply}),
    ("get", "/v1/label-sets"): (None, None, {200: schemas.LabelSetList}),
    ("get", "/v1/label-sets/{set_id}"): (None, None, {200: schemas.LabelSetReply}),
    ("put", "/v1/label-sets/{set_id}"): (
        schemas.LabelSetRequest, None, {200: schemas.LabelSetReply, 201: schemas.LabelSetReply},
    ),
    ("delete", "/v1/label-sets/{set_id}"): (None, None, {200: schemas.Deleted}),
    ("get", "/v1/models"): (None, None, {200: schemas.ModelList}),
    ("get", "/v1/models/{model_id}"): (None, None, {200: schemas.Model}),
    ("post", "/v1/models/reload"): (schemas.ReloadRequest, None, {200: schemas.Reloaded}),
    ("get", "/v1/gallery"): (None, None, {200: schemas.GallerySize}),
    ("post", "/v1/gallery/search"): (schemas.GallerySearch, None, {200: schemas.GalleryReply}),
    ("get", "/livez"): (None, None, {200: schemas.Health}),
    ("get", "/readyz"): (None, None, {200: schemas.Health}),
    ("get", "/metrics"): (None, None, {200: None}),
}  # fmt: skip
_OPEN = frozenset(("/livez", "/readyz"))
# X-Request-Timeout-Ms is described in the text above: as a parameter, tools that draw requests from this
# document would
# draw deadlines of a millisecond and count their 504 as faults.
_HEADERS = (
    ("If-Model-Fingerprint", {"type": "string"}, "Answer only with the model of this fingerprint."),
    ("X-Request-ID", {"type": "string"}, "Id of the request in replies and logs; made up if absent."),
)


def describe(app: FastAPI) -> Json:
    """The document of an app, made once."""
    if app.openapi_schema is None:
        document = get_openapi(
            title=app.title,
            version=__version__,
            description=_DESCRIPTION,
            routes=app.routes,
            openapi_version="3.1.0",
        )
        app.openapi_schema = _complete(document)
    return app.openapi_schema


def _complete(document: Json) -> Json:
    components = document.setdefault("components", {})
    components["schemas"] = _component_schemas()
    components["responses"] = {str(status): _error_response(status) for status in _statuses()}
    components["securitySchemes"] = {
        "token": {
            "type": "http",
            "scheme": "bearer",
            "description": "Asked for where the server's settings hold tokens.",
        }
    }
    document["paths"] = {path.replace(":path}", "}"): methods for path, methods in document["paths"].items()}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            _describe_operation(operation, method, path)
    return document


def _component_schemas() -> Json:
    models: set[type[BaseModel]] = {schemas.ErrorReply}
    for asked, _, replies in _OPERATIONS.values():
        models |= {model for model in (asked, *replies.values()) if model is not None}
    ordered = sorted(models, key=lambda model: model.__name__)
    _, definitions = models_json_schema([(model, "validation") for model in ordered], ref_template=_REF)
    schemas_by_name: Json = definitions["$defs"]
    return schemas_by_name


def _describe_operation(operation: Json, method: str, path: str) -> None:
    asked, uploads, replies = _OPERATIONS[method, path]
    if asked is not None:
        operation["requestBody"] = {"required": True, "content": _request_content(asked, uploads)}
        operation.setdefault("parameters", []).extend(
            {"name": name, "in": "header", "required": False, "schema": schema, "description": text}
            for name, schema, text in _HEADERS
        )
    operation["responses"] = {str(status): _reply(path, reply) for status, reply in replies.items()}
    for status in _statuses():
        operation["responses"][str(status)] = {"$ref": f"#/components/responses/{status}"}
    operation["security"] = [] if path in _OPEN else [{"token": []}, {}]


def _request_content(asked: type[BaseModel], uploads: str | None) -> Json:
    content: Json = {"application/json": {"schema": {"$ref": _REF.format(model=asked.__name__)}}}
    if uploads is not None:
        content["multipart/form-data"] = {"schema": _form_schema(asked, uploads)}
    return content


def _form_schema(asked: type[BaseModel], uploads: str) -> Json:
    """The same fields as form parts; `uploads` holds files, in the order of the parts."""
    properties: Json = {}
    for name, field in asked.model_fields.items():
        is_list = name in ("labels", "texts", "templates", "truncated")
        text: Json = {"type": "string", "description": field.description or ""}
        properties[name] = {"type": "array", "items": {"type": "string"}} if is_list else text
    properties[uploads] = {
        "type": "array",
        "minItems": 1,
        "items": {"type": "string", "format": "binary"},
        "description": "Image files, one part each.",
    }
    required = [name for name, field in asked.model_fields.items() if field.is_required()]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _reply(path: str, reply: type[BaseModel] | None) -> Json:
    headers = {"X-Request-ID": {"schema": {"type": "string"}}}
    if reply is None:
        return {
            "description": "Prometheus text format",
            "content": {"text/plain": {"schema": {"type": "string"}}},
        }
    content: Json = {"application/json": {"schema": {"$ref": _REF.format(model=reply.__name__)}}}
    if path == "/v1/embeddings":
        raw = "Little-endian vectors; X-Embedding-Shape and X-Embedding-Dtype say how to read them."
        content["application/octet-stream"] = {
            "schema": {"type": "string", "format": "binary", "description": raw}
        }
        for name in ("X-Embedding-Shape", "X-Embedding-Dtype", "X-Model-Fingerprint", "X-Truncated"):
            headers[name] = {"schema": {"type": "string"}}
    return {"description": "Done", "content": content, "headers": headers}


def _statuses() -> list[int]:
    return sorted({code.status for code in ErrorCode})


def _error_response(status: int) -> Json:
    codes = [code for code in ErrorCode if code.status == status]
    example = {
        "message": "what is wrong and what to do",
        "type": codes[0].type,
        "param": None,
        "code": codes[0],
    }
    return {
        "description": "Codes: " + ", ".join(codes),
        "headers": {"X-Request-ID": {"schema": {"type": "string"}}}
        | ({"Retry-After": {"schema": {"type": "integer"}}} if status in (429, 503) else {}),
        "content": {
            "application/json": {
                "schema": {"$ref": _REF.format(model="ErrorReply")},
                "example": {"error": example, "request_id": "5d0c4e6f"},
            }
        },
    }
