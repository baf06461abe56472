"""Every error that a client of the server can get: one class, one enum of stable codes, the HTTP status of
each.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class ErrorCode(StrEnum):
    """What went wrong, as clients may match on it. Codes are added, never renamed."""

    INVALID_REQUEST = "invalid_request"
    INVALID_JSON = "invalid_json"
    TEXT_EMPTY = "text_empty"
    TEXT_TOO_LONG = "text_too_long"
    TEXT_SPECIAL_TOKEN = "text_special_token"
    TOKEN_IDS_UNSUPPORTED = "token_ids_unsupported"
    DIMENSIONS_UNSUPPORTED = "dimensions_unsupported"
    BASE64_INVALID = "base64_invalid"
    IMAGE_EMPTY = "image_empty"
    IMAGE_TRUNCATED = "image_truncated"
    IMAGE_CORRUPT = "image_corrupt"
    URL_FETCH_DISABLED = "url_fetch_disabled"
    URL_FORBIDDEN = "url_forbidden"
    URL_FETCH_FAILED = "url_fetch_failed"
    UNAUTHORIZED = "unauthorized"
    NOT_FOUND = "not_found"
    MODEL_NOT_FOUND = "model_not_found"
    LABEL_SET_NOT_FOUND = "label_set_not_found"
    METHOD_NOT_ALLOWED = "method_not_allowed"
    REQUEST_TIMEOUT = "request_timeout"
    RELOAD_FAILED = "reload_failed"
    RELOAD_IN_PROGRESS = "reload_in_progress"
    FINGERPRINT_MISMATCH = "fingerprint_mismatch"
    BODY_TOO_LARGE = "body_too_large"
    HEADERS_TOO_LARGE = "headers_too_large"
    IMAGE_TOO_LARGE = "image_too_large"
    TOO_MANY_PIXELS = "too_many_pixels"
    TOO_MANY_ITEMS = "too_many_items"
    LABEL_SETS_FULL = "label_sets_full"
    UNSUPPORTED_MEDIA_TYPE = "unsupported_media_type"
    IMAGE_FORMAT_UNSUPPORTED = "image_format_unsupported"
    IMAGE_ANIMATED = "image_animated"
    QUEUE_FULL = "queue_full"
    RATE_LIMITED = "rate_limited"
    INTERNAL = "internal"
    INFERENCE_FAILED = "inference_failed"
    LOADING = "loading"
    NOT_READY = "not_ready"
    DRAINING = "draining"
    STORAGE_FAILED = "storage_failed"
    DEADLINE_EXCEEDED = "deadline_exceeded"

    @property
    def status(self) -> int:
        """The HTTP status that goes with this code."""
        return _STATUS.get(self, 400)

    @property
    def type(self) -> str:
        """The coarse family, in OpenAI's words, that its clients switch on."""
        if self.status == 401:
            return "authentication_error"
        if self.status == 429:
            return "rate_limit_error"
        return "server_error" if self.status >= 500 else "invalid_request_error"


_STATUS = {
    ErrorCode.UNAUTHORIZED: 401,
    ErrorCode.NOT_FOUND: 404,
    ErrorCode.MODEL_NOT_FOUND: 404,
    ErrorCode.LABEL_SET_NOT_FOUND: 404,
    ErrorCode.METHOD_NOT_ALLOWED: 405,
    ErrorCode.REQUEST_TIMEOUT: 408,
    ErrorCode.RELOAD_FAILED: 409,
    ErrorCode.RELOAD_IN_PROGRESS: 409,
    ErrorCode.FINGERPRINT_MISMATCH: 412,
    ErrorCode.BODY_TOO_LARGE: 413,
    ErrorCode.HEADERS_TOO_LARGE: 413,
    ErrorCode.IMAGE_TOO_LARGE: 413,
    ErrorCode.TOO_MANY_PIXELS: 413,
    ErrorCode.TOO_MANY_ITEMS: 413,
    ErrorCode.LABEL_SETS_FULL: 413,
    ErrorCode.UNSUPPORTED_MEDIA_TYPE: 415,
    ErrorCode.IMAGE_FORMAT_UNSUPPORTED: 415,
    ErrorCode.IMAGE_ANIMATED: 415,
    ErrorCode.QUEUE_FULL: 429,
    ErrorCode.RATE_LIMITED: 429,
    ErrorCode.INTERNAL: 500,
    ErrorCode.INFERENCE_FAILED: 500,
    ErrorCode.LOADING: 503,
    ErrorCode.NOT_READY: 503,
    ErrorCode.DRAINING: 503,
    ErrorCode.STORAGE_FAILED: 503,
    ErrorCode.DEADLINE_EXCEEDED: 504,
}


@dataclass
class ServeError(Exception):
    """An answer other than 200. `message` is for people and never names a class, a path or a stranger's
    content.

    param: the part of the request that is wrong, such as "input[3]" or "labels".
    retry_after_s: when it is worth trying again; sent as Retry-After (whole seconds) and Retry-After-Ms.
    """

    code: ErrorCode
    message: str
    param: str | None = None
    retry_after_s: float | None = None

    def __post_init__(self) -> None:
        super().__init__(self.message)

    def at(self, param: str) -> ServeError:
        """The same error, naming which part of the request it is about."""
        return ServeError(self.code, self.message, param=param, retry_after_s=self.retry_after_s)


def draining() -> ServeError:
    return ServeError(
        ErrorCode.DRAINING, "this server is shutting down; send the request elsewhere", retry_after_s=1.0
    )
