"""The paths of a command line to items, whatever lies there."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from data_pipelines.errors import DataError
from data_pipelines.inputs.folders import collect_folder
from data_pipelines.inputs.items import InputOptions, Inputs
from data_pipelines.inputs.shards import expand_shards, shard_items
from data_pipelines.inputs.tables import collect_table
from data_pipelines.sources import did_you_mean

TABLE_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet")


def collect(paths: Sequence[str], options: InputOptions) -> Inputs:
    """Everything under `paths`, in their order and by name inside each. Raises DataError for what cannot be
    read at all."""
    parts = [_collect_one(path, options) for path in paths]
    items = [item for part in parts for item in part.items]
    if not items:
        raise DataError(f"{', '.join(paths)}: no images found")
    classnames = {part.classnames for part in parts if part.classnames}
    if len(classnames) > 1:
        raise DataError(
            "the class folders of the inputs differ, so their labels would not agree; build them one by one"
        )
    return Inputs(
        items=items,
        described="; ".join(part.described for part in parts),
        classnames=next(iter(classnames), ()),
        stamp=hashlib.sha256("\n".join(part.stamp for part in parts).encode()).hexdigest(),
        files=tuple(file for part in parts for file in part.files),
    )


def _collect_one(text: str, options: InputOptions) -> Inputs:
    path = Path(text)
    if path.is_dir():
        return collect_folder(path, options)
    if path.is_file() and path.suffix.lower() in TABLE_SUFFIXES:
        return collect_table(path, options)
    if path.suffix == ".tar" or "{" in text:
        return shard_items(expand_shards([text]))
    if not path.exists():
        raise DataError(f"{text}: no such file or folder{did_you_mean(path)}")
    raise DataError(f"{text}: not a folder, a shard (.tar) or a table ({', '.join(TABLE_SUFFIXES)})")
