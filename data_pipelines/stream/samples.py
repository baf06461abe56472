"""What the members of a stored sample mean: image, captions, class, and whether it may be used."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from data_pipelines.errors import SampleError
from data_pipelines.images import MAX_IMAGE_PIXELS
from data_pipelines.index.shard_index import image_extension, payload_digest
from data_pipelines.rights import EMPTY, RemovalList, rights_of_json

MAX_CLASS_INDEX = 2**31 - 1
"""Evaluations keep classes as 32-bit numbers."""


class RawSample(NamedTuple):
    """A sample as it is stored."""

    key: str
    """SHARD_FILE_NAME/KEY"""
    image: bytes
    image_digest: bytes
    captions: tuple[str, ...]
    class_index: int
    """From KEY.cls; -1 where there is none."""


@dataclass(frozen=True)
class ReadOptions:
    """How stored samples are read."""

    caption: str = "txt"
    """the member's ending, or a field of KEY.json"""
    captions: Literal["required", "optional", "ignored"] = "required"
    """What a sample without a caption is: bad, or fine; "ignored" leaves captions unread."""
    max_image_pixels: int = MAX_IMAGE_PIXELS
    """an image of more (width times height) is bad, told by its header"""
    removals: RemovalList = EMPTY
    """samples that must not be used"""
    cache_dir: Path | None = None
    """for the indexes of read-only and remote sources; None: a folder of the user's"""


class RemovedError(SampleError):
    """The sample stands on a removal list."""


def parse_sample(
    key: str,
    payloads: Mapping[str, bytes],
    options: ReadOptions,
    digest_of: Callable[[str], bytes] | None = None,
) -> RawSample:
    """What the members of a sample mean. `digest_of` an extension: its payload's, where an index knows it.

    Raises SampleError if it cannot be used, RemovedError if it must not be.
    """
    extension = image_extension(payloads)
    if extension is None:
        raise SampleError(f"no image among its members ({', '.join(payloads)})")
    image = payloads[extension]
    digest = digest_of(extension) if digest_of else payload_digest(image)
    if options.removals:
        # Shards of other tools carry the URL in KEY.json and have no Parquet file beside them.
        url = rights_of_json(payloads["json"]).get("url") if "json" in payloads else None
        line = options.removals.match(key=key, sha256=digest.hex(), url=url)
        if line is not None:
            raise RemovedError(f"removed: {line}")
    return RawSample(key, image, digest, _captions(payloads, options), _class_index(payloads))


def _captions(payloads: Mapping[str, bytes], options: ReadOptions) -> tuple[str, ...]:
    """All captions of a sample. Raises SampleError for none where one is required."""
    wanted = options.caption
    found = () if options.captions == "ignored" else _stored_captions(payloads, wanted)
    if not found and options.captions != "required":
        return ()
    if not found or not all(map(str.strip, found)):
        raise SampleError(
            f"no caption: neither .{wanted} nor a field of .json gives one" if not found else "empty caption"
        )
    return found


def _stored_captions(payloads: Mapping[str, bytes], wanted: str) -> tuple[str, ...]:
    stored = payloads.get("json", b"")
    # Parsing JSON costs more than reading the sample, so it is done only where it can matter.
    several = b'"captions"' in stored
    if wanted in payloads and not several:
        return (_text(payloads[wanted], wanted),)
    if stored:
        record = _json_object(stored)
        names = ("captions", "caption") if wanted == "txt" else (wanted, "captions")
        for name in names:
            match record.get(name):
                case str(caption):
                    return (caption,)
                case list(captions) if captions and all(isinstance(item, str) for item in captions):
                    return tuple(captions)
    return (_text(payloads[wanted], wanted),) if wanted in payloads else ()


def _json_object(data: bytes) -> dict[str, object]:
    try:
        record = json.loads(data)
    except ValueError as error:
        raise SampleError(f".json cannot be read: {error}") from error
    if not isinstance(record, dict):
        raise SampleError(".json is no object")
    return record


def _text(data: bytes, extension: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SampleError(f".{extension} is not UTF-8 text") from error


def _class_index(payloads: Mapping[str, bytes]) -> int:
    if "cls" not in payloads:
        return -1
    try:
        index = int(payloads["cls"])
    except ValueError as error:
        raise SampleError(f".cls is no class index: {payloads['cls'][:20]!r}") from error
    if abs(index) > MAX_CLASS_INDEX:
        raise SampleError(f".cls is no class index: {payloads['cls'][:20]!r}")
    return index
