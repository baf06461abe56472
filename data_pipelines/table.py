"""The table of a shard, `X.parquet` beside `X.tar`: one row per sample, for statistics and filters without
the images."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipelines.encode import image_size, perceptual_hash
from data_pipelines.errors import SampleError, ShardError
from data_pipelines.files import whole_file
from data_pipelines.index import Sample
from data_pipelines.index.shard_index import image_extension
from data_pipelines.rights import ALIASES, RIGHTS_COLUMNS, rights_of_json

# polars is imported where it is used: the base install checks shards that have no tables.
if TYPE_CHECKING:
    import polars as pl

VERSION = "1"
_VERSION_KEY = "clipstack.table"

SCHEMA: dict[str, str] = {
    "key": "String",
    "caption": "String",
    "caption_chars": "Int32",
    "caption_words": "Int32",
    "label": "Int32",  # the .cls member
    "format": "String",
    "width": "Int32",  # of the stored image, upright, in pixels
    "height": "Int32",
    "original_width": "Int32",  # before the builder shrank it
    "original_height": "Int32",
    "image_bytes": "Int64",
    "sha256": "String",  # of the stored image bytes
    "phash": "String",
    **{name: "String" for name in RIGHTS_COLUMNS},
    "language": "String",
    "origin": "String",  # the file, the row or the shard/key it came from
}
"""Column to polars data type."""

CARRIED = (*RIGHTS_COLUMNS, "language", "original_width", "original_height")
"""Columns that no reader can find in the shard itself."""

Row = dict[str, Any]


def table_path(tar: str | os.PathLike[str]) -> Path:
    """Where the table of a local tar lies; img2dataset uses the same name."""
    return Path(tar).with_suffix(".parquet")


def sample_caption(members: Mapping[str, bytes]) -> str | None:
    """The caption: `.txt`, else `caption` or `captions` of `.json`. None: there is none that says
    anything."""
    if "txt" in members:
        text = members["txt"].decode("utf-8", "replace").strip()
        return text or None
    captions = json_captions(members["json"]) if "json" in members else ()
    return captions[0] if captions else None


def json_captions(payload: bytes) -> tuple[str, ...]:
    """What a JSON object says under `caption`, `text` and `captions` (a list), each caption once; else
    nothing."""
    try:
        record = json.loads(payload)
    except ValueError:
        return ()
    if not isinstance(record, dict):
        return ()
    several = record.get("captions")
    values = [record.get("caption"), record.get("text"), *(several if isinstance(several, list) else [])]
    return tuple(dict.fromkeys(v.strip() for v in values if isinstance(v, str) and v.strip()))


def sample_label(members: Mapping[str, bytes]) -> int | None:
    """The class of a `.cls` member; None if there is none or it is no number."""
    text = members.get("cls", b"").decode("ascii", "replace").strip()
    return int(text) if text.removeprefix("-").isdigit() else None


def describe(
    sample: Sample, *, carried: Mapping[str, Any] | None = None, origin: str | None = None, phash: bool = True
) -> Row:
    """The row of a sample. `carried`: values for the columns of `CARRIED`, and a phash to use again if its
    sha256 agrees.

    `phash` costs a decode. Raises SampleError where it has no image or one that cannot be read.
    """
    extension = image_extension(sample.members)
    if extension is None:
        raise SampleError("no image")
    image = sample.members[extension]
    width, height, image_format = image_size(image)
    caption = sample_caption(sample.members)
    sha256 = hashlib.sha256(image).hexdigest()
    known = carried or {}
    row: Row = dict.fromkeys(SCHEMA)
    row.update(rights_of_json(sample.members.get("json", b"")))
    row.update({name: known[name] for name in CARRIED if known.get(name) is not None})
    row.update(
        key=sample.key,
        caption=caption,
        caption_chars=len(caption or ""),
        caption_words=len((caption or "").split()),
        label=sample_label(sample.members),
        format=image_format,
        width=width,
        height=height,
        image_bytes=len(image),
        sha256=sha256,
        phash=(known.get("phash") if known.get("sha256") == sha256 else None)
        or (perceptual_hash(image) if phash else None),
        origin=origin,
    )
    row["original_width"] = row["original_width"] or width
    row["original_height"] = row["original_height"] or height
    return row


def schema() -> dict[str, pl.DataType]:
    """SCHEMA with polars' own types."""
    import polars as pl

    return {name: getattr(pl, kind)() for name, kind in SCHEMA.items()}


def to_frame(rows: Iterable[Row]) -> pl.DataFrame:
    import polars as pl

    return pl.DataFrame(list(rows), schema=schema(), orient="row")


def write_table(rows: Sequence[Row], path: Path) -> None:
    """Write atomically; equal rows give equal bytes. Raises ShardError."""
    with whole_file(path) as partial:
        to_frame(rows).write_parquet(partial, compression="zstd", metadata={_VERSION_KEY: VERSION})


def is_ours(path: Path) -> bool:
    """Whether a Parquet file is such a table, of this version, and not another tool's. Raises ShardError if
    unreadable."""
    import polars as pl

    try:
        version = pl.read_parquet_metadata(path).get(_VERSION_KEY)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise ShardError(f"{path}: no Parquet file that can be read: {error}") from error
    if version is not None and version != VERSION:
        raise ShardError(
            f"{path}: table version {version}, this clipstack reads {VERSION}; reshard with the newer one"
        )
    return version is not None


def read_table(tar: Path) -> pl.DataFrame | None:
    """The table beside a tar if it is ours; None if there is none or it is another tool's. Raises
    ShardError."""
    path = table_path(tar)
    if not path.exists() or not is_ours(path):
        return None
    return _read(path)


def _read(path: Path) -> pl.DataFrame:
    import polars as pl

    try:
        return pl.read_parquet(path)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise ShardError(f"{path}: no Parquet file that can be read: {error}") from error


def foreign_columns(tar: Path) -> dict[str, Row]:
    """Key to what another tool's table (img2dataset's) knows of a sample beyond the shard itself: rights,
    sizes, language.

    Its hashes are of downloads, not of what is stored, and are left alone.
    """
    path = table_path(tar)
    if not path.exists() or is_ours(path):
        return {}
    frame = _read(path)
    if "key" not in frame.columns:
        return {}
    names = {c: ALIASES.get(c, c) for c in frame.columns if ALIASES.get(c, c) in CARRIED}
    picked = frame.select("key", *names).rename({c: n for c, n in names.items() if c != n})
    return {
        str(row["key"]): {name: value for name, value in row.items() if name != "key" and value is not None}
        for row in picked.iter_rows(named=True)
    }
