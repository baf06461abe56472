"""The inputs of a request as typed items, parsed from JSON or from the parts of an upload."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from serve.errors import ErrorCode, ServeError
from serve.settings import Settings

Modality = Literal["text", "image"]


@dataclass(frozen=True)
class TextItem:
    text: str


@dataclass(frozen=True)
class ImageItem:
    """An encoded image: bytes as uploaded, or text still in base64 (decoded beside the device, not in the
    loop).
    """

    data: bytes | str


@dataclass(frozen=True)
class UrlItem:
    url: str


Item = TextItem | ImageItem | UrlItem

_TOKEN_IDS = (
    "arrays of token ids are not supported, since they belong to another model's tokenizer: send text "
    "(LangChain: OpenAIEmbeddings(check_embedding_ctx_length=False))"
)
_SHAPE = (
    'each input is a string, {"text": ...}, {"image": "data:image/jpeg;base64,..."} or {"image_url": ...}'
)


def parse_items(value: Any, *, modality: Modality, param: str, settings: Settings) -> list[Item]:
    """Items in their order. A text alone is a list of one. Raises ServeError naming the entry, such as
    input[3].
    """
    entries = value if isinstance(value, list) else [value]
    if not entries:
        raise ServeError(ErrorCode.INVALID_REQUEST, "no input; send at least one", param=param)
    if len(entries) > settings.max_texts + settings.max_images:
        raise too_many(len(entries), "inputs", settings.max_texts + settings.max_images).at(param)
    if any(isinstance(entry, int) and not isinstance(entry, bool) for entry in entries):
        raise ServeError(ErrorCode.TOKEN_IDS_UNSUPPORTED, _TOKEN_IDS, param=param)
    named = isinstance(value, list)
    items = [
        _parse_item(entry, modality, f"{param}[{index}]" if named else param)
        for index, entry in enumerate(entries)
    ]
    check_counts(items, param=param, settings=settings)
    return items


def _parse_item(entry: Any, modality: Modality, param: str) -> Item:
    match entry:
        case str():
            return _plain(entry, modality, param)
        case bytes():
            return ImageItem(entry)
        case {"text": str(text), **rest} if not rest:
            return _text(text, param)
        case {"image": str(image), **rest} if not rest:
            return ImageItem(image)
        case {"image_url": str(url), **rest} if not rest:
            return ImageItem(url) if url.startswith("data:") else UrlItem(url)
        case list() if entry and all(isinstance(part, int) for part in entry):
            raise ServeError(ErrorCode.TOKEN_IDS_UNSUPPORTED, _TOKEN_IDS, param=param)
        case _:
            raise ServeError(ErrorCode.INVALID_REQUEST, _SHAPE, param=param)


def _plain(entry: str, modality: Modality, param: str) -> Item:
    if modality == "text":
        return _text(entry, param)
    return UrlItem(entry) if entry.startswith(("http://", "https://")) else ImageItem(entry)


def _text(text: str, param: str) -> TextItem:
    if not text.strip():
        raise ServeError(ErrorCode.TEXT_EMPTY, "the text is empty", param=param)
    return TextItem(text)


def check_counts(items: Sequence[Item], *, param: str, settings: Settings) -> None:
    """Raises ServeError too_many_items."""
    num_texts = sum(isinstance(item, TextItem) for item in items)
    if num_texts > settings.max_texts:
        raise too_many(num_texts, "texts", settings.max_texts).at(param)
    if len(items) - num_texts > settings.max_images:
        raise too_many(len(items) - num_texts, "images", settings.max_images).at(param)


def too_many(count: int, what: str, limit: int) -> ServeError:
    return ServeError(
        ErrorCode.TOO_MANY_ITEMS, f"{count} {what}; one request may have {limit}: send several requests"
    )


def check_length(text: str, max_chars: int, *, param: str) -> None:
    """Raises ServeError text_too_long.

    Labels and templates are multiplied into prompts: before that they must be short, or a small request would
    become gigabytes.
    """
    if len(text) > max_chars:
        message = f"the text has {len(text)} characters; this server reads {max_chars}"
        raise ServeError(ErrorCode.TEXT_TOO_LONG, message, param=param)


def parse_labels(labels: Any, *, param: str, limit: int, max_chars: int) -> tuple[str, ...]:
    """Distinct, non-empty labels of at most `max_chars` characters. Raises ServeError naming the entry."""
    if not isinstance(labels, list) or not labels:
        raise ServeError(ErrorCode.INVALID_REQUEST, "labels are a list of at least one text", param=param)
    if len(labels) > limit:
        raise too_many(len(labels), "labels", limit).at(param)
    seen: set[str] = set()
    for index, label in enumerate(labels):
        if not isinstance(label, str) or not label.strip():
            raise ServeError(
                ErrorCode.INVALID_REQUEST, "a label is a text that is not empty", param=f"{param}[{index}]"
            )
        check_length(label, max_chars, param=f"{param}[{index}]")
        if label in seen:
            raise ServeError(
                ErrorCode.INVALID_REQUEST, "this label is given twice", param=f"{param}[{index}]"
            )
        seen.add(label)
    return tuple(cast(list[str], labels))
