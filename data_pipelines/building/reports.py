"""What is told of a shard, in a file of its own until all are done, and of the whole build."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipelines.errors import DataError
from data_pipelines.index.shard_index import index_path
from data_pipelines.table import table_path


@dataclass(frozen=True)
class Reject:
    """An item that could not be used."""

    origin: str
    reason: str


@dataclass(frozen=True)
class Removed:
    """An item that the removal list names."""

    origin: str
    entry: str
    """The line of the removal list."""


@dataclass(frozen=True)
class ShardReport:
    """What became of the items of one shard."""

    name: str
    samples: int
    size_bytes: int
    rejects: tuple[Reject, ...]
    removed: tuple[Removed, ...]


WORK_FOLDER = ".build"
"""In the output folder while a build is under way."""


@dataclass(frozen=True)
class BuildReport:
    """The sums over all shards."""

    shards: int
    samples: int
    size_bytes: int
    rejected: int
    removed: int
    reasons: Mapping[str, int]
    """Rejects by reason, without what is particular to one sample."""


def reason_kind(reason: str) -> str:
    """A reject's reason without its particulars, to count by."""
    for kind in (
        "cannot be read",
        "no caption",
        "no image",
        "over the limit",
        "smaller than",
        "longer than",
        "not an image",
    ):
        if kind in reason:
            return kind
    return reason.split(":", 1)[0]


def report_path(out: Path, shard: str) -> Path:
    return out / WORK_FOLDER / f"{shard}.json"


def read_report(out: Path, shard: str) -> ShardReport | None:
    data = read_json(report_path(out, shard))
    if data is None:
        return None
    if data["samples"] and not _is_whole(out / shard, data["size_bytes"]):
        return None  # someone changed or deleted a file since; make the shard again
    return ShardReport(
        data["name"],
        data["samples"],
        data["size_bytes"],
        tuple(Reject(**r) for r in data["rejects"]),
        tuple(Removed(**r) for r in data["removed"]),
    )


def _is_whole(tar: Path, size_bytes: int) -> bool:
    beside = index_path(tar), table_path(tar)
    return all(path.exists() for path in (tar, *beside)) and tar.stat().st_size == size_bytes


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise DataError(f"{path}: damaged; delete its folder and build again") from error
