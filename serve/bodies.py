"""Reading a request: its body within limits of bytes and time, JSON or an upload as one dictionary, its
headers' wishes.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, get_args

import jiter
from pydantic import BaseModel, ValidationError
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from serve.errors import ErrorCode, ServeError
from serve.settings import Settings

B = TypeVar("B", bound=BaseModel)
MAX_PARTS = 5000  # of an upload; how many may be images or texts is checked with the items
# Lists, objects, names and values of a JSON body, by the marks that make them; those inside of texts count
# with them. Three bytes make a list of some 80 bytes in memory, so that a body within its limit could fill
# the memory and hold the event loop for seconds while it is parsed.
MAX_MARKS = 200_000
MAX_JSON_ERROR_CHARS = 300  # it may quote a name of the client's
MAX_PARAM_CHARS = 200  # of a field's name in an error: unknown names are the client's, and may be long


class ByteBudget:
    """Bytes of request bodies that the process holds. One budget for all models: memory is one, too."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.held = 0

    def check_room(self, more_bytes: int) -> None:
        """Raises ServeError queue_full when the process would hold too much with `more_bytes`."""
        if self.held + more_bytes > self.max_bytes:
            message = (
                "the server holds too many bytes of other requests; try again after the time in Retry-After"
            )
            raise ServeError(ErrorCode.QUEUE_FULL, message, retry_after_s=1.0)

    @contextmanager
    def account(self) -> Iterator[ByteAccount]:
        account = ByteAccount(self)
        try:
            yield account
        finally:
            self.held -= account.held


@dataclass
class ByteAccount:
    budget: ByteBudget
    held: int = 0

    def hold(self, more_bytes: int) -> None:
        """Hold this much more. Raises ServeError queue_full when the process holds too much."""
        self.budget.check_room(more_bytes)
        self.budget.held += more_bytes
        self.held += more_bytes


async def read_body(request: Request, account: ByteAccount, settings: Settings) -> bytes:
    """The whole body. Raises ServeError body_too_large, queue_full, request_timeout and others.

    What is only announced is held against nobody else: a client may never send it.
    """
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise ServeError(ErrorCode.UNSUPPORTED_MEDIA_TYPE, "compressed request bodies are not taken")
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal():
        _check_size(int(announced), settings)
        account.budget.check_room(int(announced))
    body = bytearray()
    try:
        async with asyncio.timeout(settings.body_timeout_s):
            async for chunk in request.stream():
                _check_size(len(body) + len(chunk), settings)
                account.hold(len(chunk))
                body += chunk
    except TimeoutError as error:
        message = f"the body did not arrive within {settings.body_timeout_s:g} s"
        raise ServeError(ErrorCode.REQUEST_TIMEOUT, message) from error
    return bytes(body)


def _check_size(size_bytes: int, settings: Settings) -> None:
    if size_bytes > settings.max_body_bytes:
        message = f"the body is larger than this server takes ({settings.max_body_bytes} bytes)"
        raise ServeError(ErrorCode.BODY_TOO_LARGE, message)


async def parse_body(
    request: Request, body: bytes, schema: type[B], *, uploads: str | None, settings: Settings
) -> B:
    """JSON or multipart/form-data as `schema`. `uploads`: the field that uploaded files go to, as bytes, in
    order.
    """
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind == "application/json" or kind.endswith("+json"):
        return validated(schema, _parse_json(body), strict=True)
    if kind == "multipart/form-data" and uploads is not None:
        fields = await _parse_multipart(request.headers, body, schema, uploads, settings)
        return validated(schema, fields, strict=False)
    taken = "application/json" if uploads is None else "application/json or multipart/form-data"
    raise ServeError(ErrorCode.UNSUPPORTED_MEDIA_TYPE, f"this path takes {taken}")


def _parse_json(body: bytes) -> Any:
    if len(body) > MAX_MARKS and sum(map(body.count, (b"[", b"{", b":", b","))) > MAX_MARKS:
        message = f"the body holds more than {MAX_MARKS} brackets, colons and commas: send several requests"
        raise ServeError(ErrorCode.TOO_MANY_ITEMS, message)
    try:
        # Of two equal names some readers believe the first and some the last: a proxy that checks one of them
        # and a server that acts on the other is a hole, so such a body is refused.
        return jiter.from_json(body, allow_inf_nan=False, cache_mode="keys", catch_duplicate_keys=True)
    except ValueError as error:
        raise ServeError(
            ErrorCode.INVALID_JSON, f"the body is not valid JSON: {error}"[:MAX_JSON_ERROR_CHARS]
        ) from error


def validated(schema: type[B], value: Any, *, strict: bool) -> B:
    """`value` as `schema`. Raises ServeError invalid_request naming the first field that is wrong."""
    if not isinstance(value, dict):
        raise ServeError(ErrorCode.INVALID_REQUEST, "the body is a JSON object")
    # Before pydantic, which would collect an error for every unknown name.
    unknown = next((name for name in value if name not in schema.model_fields), None)
    if unknown is not None:
        raise ServeError(ErrorCode.INVALID_REQUEST, "there is no such field", param=param_of((unknown,)))
    try:
        return schema.model_validate(value, strict=strict)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        raise ServeError(ErrorCode.INVALID_REQUEST, first["msg"], param=param_of(first["loc"])) from error


def param_of(location: tuple[int | str, ...]) -> str | None:
    """("input", 3) -> "input[3]"."""
    name = ""
    for part in location:
        name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else str(part)
    return name[:MAX_PARAM_CHARS] or None


class _InMemoryMultiPart(MultiPartParser):
    """Starlette's parser on a body that is in memory already: nothing is spooled to disk.

    It forgets a part that was not finished, so `is_whole` says whether the closing boundary came.
    """

    spool_max_size = 1 << 40
    is_whole = False

    @property
    def _charset(self) -> str:
        """Of names and fields: UTF-8, whatever codec the client names. Some take quadratic time."""
        return "utf-8"

    @_charset.setter
    def _charset(self, value: str) -> None:
        """Where Starlette would take the client's."""

    def on_end(self) -> None:
        self.is_whole = True


async def _parse_multipart(
    headers: Headers, body: bytes, schema: type[BaseModel], uploads: str, settings: Settings
) -> dict[str, Any]:
    """Files and fields named like `uploads` make one list in the order of the parts; other fields keep their
    names.
    """
    parser = _InMemoryMultiPart(
        headers,
        _one_chunk(body),
        max_files=MAX_PARTS,
        max_fields=MAX_PARTS,
        max_part_size=settings.max_body_bytes,
    )
    try:
        form = await parser.parse()
    except (MultiPartException, UnicodeDecodeError, ValueError) as error:
        raise ServeError(
            ErrorCode.INVALID_REQUEST, "the multipart body cannot be read, or has too many parts"
        ) from error
    if not parser.is_whole:
        await form.close()
        message = "the multipart body ends before its closing boundary; it was probably cut in transfer"
        raise ServeError(ErrorCode.INVALID_REQUEST, message)
    fields: dict[str, Any] = {}
    twice: str | None = None
    for name, part in form.multi_items():
        if isinstance(part, UploadFile):
            fields.setdefault(uploads, []).append(await part.read())
        elif name == uploads or _takes_list(schema, name):
            fields.setdefault(name, []).append(part)
        elif name in fields:
            twice = name
        else:
            fields[name] = part
    await form.close()
    if twice is not None:
        message = "this field takes one value and is given twice"
        raise ServeError(ErrorCode.INVALID_REQUEST, message, param=param_of((twice,)))
    if fields.get("templates") in (["openai"], ["simple"]):
        fields["templates"] = fields["templates"][0]
    return fields


def _takes_list(schema: type[BaseModel], name: str) -> bool:
    field = schema.model_fields.get(name)
    return field is not None and (field.annotation is Any or Any in get_args(field.annotation))


async def _one_chunk(body: bytes) -> AsyncGenerator[bytes, None]:
    yield body


def deadline_of(headers: Headers, arrived_at: float, settings: Settings) -> float:
    """When the request's answer is no longer wanted. Raises ServeError invalid_request for a header that is
    no number.
    """
    wish = headers.get("x-request-timeout-ms")
    if wish is None:
        return arrived_at + settings.request_timeout_ms / 1000
    if not (wish.isascii() and wish.isdecimal() and 0 < len(wish) < 10 and int(wish) > 0):
        raise ServeError(
            ErrorCode.INVALID_REQUEST,
            "X-Request-Timeout-Ms is a whole number of milliseconds",
            param="X-Request-Timeout-Ms",
        )
    return arrived_at + min(int(wish), settings.max_request_timeout_ms) / 1000


def wants_bytes(headers: Headers) -> str | None:
    """ "float32" or "float16" where the client accepts raw vectors, else None."""
    for entry in headers.get("accept", "").split(","):
        kind, *parameters = (part.strip().lower() for part in entry.split(";"))
        if kind == "application/octet-stream":
            return "float16" if "dtype=float16" in parameters else "float32"
    return None
