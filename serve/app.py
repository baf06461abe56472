"""`create_app`: the FastAPI application of a set of settings, put together from its layers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.responses import Response

from serve import pages, routes
from serve.bodies import param_of
from serve.edge import Admission, Cors, Edge, error_response, trace_of
from serve.errors import ErrorCode, ServeError
from serve.metrics import Metrics
from serve.openapi import describe
from serve.runtime import Runtime, RuntimeLoader
from serve.service import Service
from serve.settings import Settings


def create_app(settings: Settings, runtime: Runtime | None = None) -> FastAPI:
    """The application. `runtime`: serve this one, as the only model, instead of loading `settings.models`.

    Raises ConfigError when there is nothing to serve. Models are loaded when the app starts.
    """
    loaders = loaders_of(settings, runtime)
    app: FastAPI = FastAPI(
        title="clipstack serve",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # a client that is redirected may lose its body, or send it elsewhere
        lifespan=partial(_lifespan, settings=settings, loaders=loaders),
        middleware=[
            Middleware(Edge, service_of=lambda: app.state.service),
            *_cors(settings),
            Middleware(Admission, service_of=lambda: app.state.service),
        ],
        exception_handlers={
            ServeError: _serve_error,
            RequestValidationError: _validation_error,
            HTTPException: _http_error,
            Exception: _unforeseen,
        },
    )
    app.include_router(routes.router)
    app.include_router(pages.router)
    app.openapi = partial(describe, app)  # type: ignore[method-assign]
    return app


def loaders_of(settings: Settings, runtime: Runtime | None) -> dict[str, RuntimeLoader]:
    """How each model is loaded, by name. Raises ConfigError when there is none."""
    if runtime is not None:
        name = settings.models[0].id if settings.models else "model"
        return {name: lambda: runtime}
    settings.check_models()
    from serve.loading import loader_of  # torch takes seconds to import; a fake runtime needs none

    return {spec.id: loader_of(spec, settings) for spec in settings.models}


@asynccontextmanager
async def _lifespan(
    app: FastAPI, *, settings: Settings, loaders: Mapping[str, RuntimeLoader]
) -> AsyncIterator[dict[str, Service]]:
    """What it yields is known to each connection: some requests never reach the application."""
    service = Service(settings, loaders, metrics=Metrics())
    app.state.service = service
    try:
        await service.start()
        yield {"service": service}
    finally:
        service.draining = True
        await service.close()


def _cors(settings: Settings) -> list[Middleware]:
    if not settings.cors_origins:
        return []
    exposed = (
        "X-Request-ID",
        "X-Embedding-Shape",
        "X-Embedding-Dtype",
        "X-Model-Fingerprint",
        "Retry-After",
        "Retry-After-Ms",
    )
    return [
        Middleware(
            Cors,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST", "PUT", "DELETE"],
            allow_headers=[
                "Authorization",
                "Content-Type",
                "X-Request-ID",
                "X-Request-Timeout-Ms",
                "If-Model-Fingerprint",
            ],
            expose_headers=list(exposed),
        )
    ]


async def _serve_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServeError)
    return error_response(error, trace_of(request.scope))


async def _validation_error(request: Request, error: Exception) -> Response:
    """FastAPI's own checks, of path parameters, in the one shape."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    refused = ServeError(
        ErrorCode.INVALID_REQUEST, str(first["msg"]), param=param_of(tuple(first["loc"][1:]))
    )
    return error_response(refused, trace_of(request.scope))


async def _http_error(request: Request, error: Exception) -> Response:
    """Starlette's own answers: no such path, no such method on it."""
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        refused = ServeError(ErrorCode.METHOD_NOT_ALLOWED, "this path does not take this method")
    elif error.status_code == 404:
        refused = ServeError(ErrorCode.NOT_FOUND, "no such path; GET /docs lists them")
    else:
        refused = ServeError(ErrorCode.INVALID_REQUEST, "the request cannot be read")
    response = error_response(refused, trace_of(request.scope))
    response.headers.update(error.headers or {})
    return response


async def _unforeseen(request: Request, error: Exception) -> Response:
    """A fault of ours. The client learns the request id and nothing else; the log has type and place."""
    trace = trace_of(request.scope)
    response = error_response(
        ServeError(ErrorCode.INTERNAL, "an internal error; the log has it under this id"), trace
    )
    response.headers["X-Request-ID"] = trace.request_id
    return response
