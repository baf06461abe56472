"""One item to the bytes of its image and its captions."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, assert_never

from data_pipelines.errors import SampleError
from data_pipelines.index.shard_index import image_extension
from data_pipelines.inputs.items import Base64Image, FileImage, Item, ParquetImage, ShardImage
from data_pipelines.inputs.shards import read_members
from data_pipelines.rights import rights_of, rights_of_json
from data_pipelines.table import json_captions


@dataclass(frozen=True)
class ItemContent:
    """What an item holds: the image's bytes as they came, its captions, and other members to carry on."""

    image: bytes
    captions: tuple[str, ...]
    columns: Mapping[str, Any]
    members: Mapping[str, bytes] = field(default_factory=dict)
    """All members, for items from shards."""


def read_item(item: Item) -> ItemContent:
    """Raises SampleError with the reason where the item cannot be used."""
    match item.image:
        case ShardImage():
            members = read_members(item.image)
            extension = image_extension(members)
            if extension is None:
                raise SampleError("no image")
            columns = {**rights_of_json(members.get("json", b"")), **item.columns}
            return ItemContent(members[extension], (), columns, members)
        case FileImage(path):
            image = _read_file(path)
        case Base64Image(text):
            try:
                image = base64.b64decode(text, validate=True)
            except (binascii.Error, ValueError) as error:
                raise SampleError("the image is not base64") from error
        case ParquetImage(path, column, row_group, row):
            image = _parquet_cell(path, column, row_group, row)
        case _:
            assert_never(item.image)
    captions, rights = (item.captions, {}) if item.captions else _sidecar(item.caption_files)
    if not captions:
        raise SampleError("no caption")
    return ItemContent(image, captions, {**item.columns, **rights})


def _sidecar(files: Sequence[str]) -> tuple[tuple[str, ...], dict[str, str]]:
    """(captions, rights) of the sidecars: the captions of the first that has any, the rights of a .json."""
    captions: tuple[str, ...] = ()
    rights: dict[str, str] = {}
    for file in files:
        payload = _read_file(file)
        if file.endswith(".json"):
            captions = captions or json_captions(payload)
            try:
                record = json.loads(payload)
            except ValueError as error:
                raise SampleError(f"{Path(file).name} is not JSON") from error
            rights = rights_of(record) if isinstance(record, dict) else {}
        elif not captions:
            try:
                text = payload.decode("utf-8-sig").strip()
            except UnicodeDecodeError as error:
                raise SampleError(f"{Path(file).name} is not UTF-8 text") from error
            captions = (text,) if text else ()
    return captions, rights


def _read_file(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise SampleError(f"{path} cannot be read: {reason}") from error


def _parquet_cell(path: str, column: str, row_group: int, row: int) -> bytes:
    value = _parquet_column(path, column, row_group)[row].as_py()
    data = value.get("bytes") if isinstance(value, dict) else value
    if not data:
        raise SampleError("no image bytes")
    return bytes(data)


@lru_cache(maxsize=2)
def _parquet_column(path: str, column: str, row_group: int) -> Any:
    import pyarrow.parquet as pq

    return pq.ParquetFile(path).read_row_group(row_group, columns=[column])[column]
