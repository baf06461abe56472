"""The page at / and the API's reference at /docs: files of this package, nothing from elsewhere."""

from __future__ import annotations

from importlib import resources

from fastapi import APIRouter
from starlette.responses import Response

from serve.errors import ErrorCode, ServeError

router = APIRouter(include_in_schema=False)

_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
# Pages run nothing and load nothing but what this server sends; images that were dropped are shown from
# memory.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_FILES = {
    entry.name: entry.read_bytes()
    for entry in resources.files("serve").joinpath("static").iterdir()
    if entry.name.rpartition(".")[2] in _TYPES
}


def _send(name: str) -> Response:
    if name not in _FILES:
        raise ServeError(ErrorCode.NOT_FOUND, "no such page")
    headers = {
        "Content-Security-Policy": _POLICY,
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return Response(
        _FILES[name], headers=headers, media_type=_TYPES[name.rpartition(".")[2]] + "; charset=utf-8"
    )


@router.get("/")
async def page() -> Response:
    return _send("index.html")


@router.get("/docs")
async def reference() -> Response:
    return _send("docs.html")


@router.get("/static/{name}")
async def asset(name: str) -> Response:
    return _send(name)
