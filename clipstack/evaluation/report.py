"""What an evaluation found, as values, as JSON and as a table on the terminal."""

from __future__ import annotations

import base64
import json
import math
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clipstack.errors import ConfigError, DataError
from clipstack.files import write_text
from data_pipelines.stream.quarantine import BadSample

Int64 = npt.NDArray[np.int64]
FORMAT = 1
REQUIRED = {"task", "n", "model", "fingerprint", "data", "data_digest", "outcomes"}
"""Without these a file is no evaluation."""
EXAMPLES_OF_SKIPPED = 20


@dataclass(frozen=True)
class Skipped:
    """What was left out, over all ranks, and why."""

    bad_samples: int = 0
    """damaged images, texts that are not UTF-8, classes that are no numbers"""
    without_class: int = 0
    labels_out_of_range: int = 0
    empty_shards: int = 0
    unreadable_shards: int = 0
    damaged_shards: int = 0
    """places in shards where bytes are lost, with an unknown number of samples"""
    examples: tuple[BadSample, ...] = ()

    def counts(self) -> dict[str, int]:
        return {name: value for name, value in self.__dict__.items() if name != "examples"}


@dataclass(frozen=True)
class Source:
    """What was evaluated, on what."""

    model: str
    fingerprint: str
    data: str
    data_digest: str
    templates: str | None = None


@dataclass(frozen=True)
class Example:
    """A sample worth a look."""

    sample: int
    """position in the data set"""
    caption: str
    is_good: bool


@dataclass(frozen=True)
class Report:
    """One evaluation."""

    task: str
    n: int
    source: Source
    metrics: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]
    """95 % bootstrap intervals"""
    skipped: Skipped
    details: Mapping[str, Any] = field(default_factory=dict)
    """curves and tables, JSON-able"""
    outcomes: Mapping[str, Int64] = field(default_factory=dict)
    """one number a sample or query: what `clipstack compare` pairs"""
    examples: tuple[Example, ...] = ()


def to_json(report: Report) -> dict[str, Any]:
    """The object that --json writes. Numbers that do not exist are null."""
    source = report.source
    return {
        "format": FORMAT,
        "task": report.task,
        "n": report.n,
        **{name: _finite(value) for name, value in report.metrics.items()},
        "model": source.model,
        "fingerprint": source.fingerprint,
        "data": source.data,
        "templates": source.templates,
        "intervals": {name: list(pair) for name, pair in report.intervals.items()},
        "skipped": report.skipped.counts() | {"examples": [bad._asdict() for bad in report.skipped.examples]},
        "data_digest": source.data_digest,
        **report.details,
        "outcomes": {name: _pack(values) for name, values in report.outcomes.items()},
    }


def check_writable(key: str, path: Path | None) -> None:
    """Whether a file can be made at `path`, given under `key`; makes its folder. Raises ConfigError."""
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{key} {path}: its folder cannot be made ({error.strerror}); name another"
        ) from error
    if path.is_dir():
        raise ConfigError(f"{key} {path}: is a folder; name a file")
    if not os.access(path.parent, os.W_OK):
        raise ConfigError(f"{key} {path}: {path.parent} may not be written to; name another place")


def write_json(path: Path, report: Report) -> None:
    """Raises DataError where the file cannot be written."""
    write_object(path, to_json(report))


def write_object(path: Path, value: Any) -> None:
    """`value` as JSON at the path of --json. Raises DataError where it cannot be written."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text + "\n")
    except OSError as error:
        raise DataError(f"--json {path}: cannot be written: {error.strerror}") from error


def read_json(path: Path) -> dict[str, Any]:
    """What `write_json` wrote, outcomes unpacked. Raises ConfigError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(
            f"{path}: cannot be read ({error}); name what clipstack eval --json wrote"
        ) from error
    if not isinstance(value, dict) or not value.keys() >= REQUIRED:
        raise ConfigError(f"{path}: is no evaluation; name what clipstack eval --json wrote")
    if value.get("format") != FORMAT:
        raise ConfigError(
            f"{path}: format {value.get('format')!r}, and this clipstack reads {FORMAT}; evaluate again"
        )
    try:
        return {**value, "outcomes": {name: _unpack(text) for name, text in value["outcomes"].items()}}
    except (ValueError, zlib.error, AttributeError) as error:
        raise ConfigError(f"{path}: outcomes are damaged ({error}); evaluate again") from error


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _pack(values: Int64) -> str:
    """Numbers below 2^31 as text: little-endian int32, deflated, base64."""
    return base64.b64encode(zlib.compress(values.astype("<i4").tobytes(), 9)).decode("ascii")


def _unpack(text: str) -> Int64:
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype="<i4").astype(np.int64)


def table(report: Report) -> str:
    """What the terminal shows."""
    source = report.source
    head = [
        ("task", report.task),
        ("model", f"{source.model} ({source.fingerprint[:12]})"),
        ("data", source.data),
    ]
    if source.templates is not None:
        head.append(("templates", source.templates))
    head.append(("n", f"{report.n:,}"))
    rows = head + [(name, _with_interval(report, name)) for name in report.metrics]
    rows += [(f"skipped: {name}", f"{count:,}") for name, count in report.skipped.counts().items() if count]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    if report.skipped.examples:
        lines.append(f"first skipped: {_describe(report.skipped.examples[0])}")
    return "\n".join(lines)


def _describe(bad: BadSample) -> str:
    return f"{bad.shard if bad.key is None else f'{bad.shard}/{bad.key}'}: {bad.reason}"


def _with_interval(report: Report, name: str) -> str:
    value = report.metrics[name]
    text = (
        "none"
        if not math.isfinite(value)
        else f"{value:g}"
        if value == int(value) and value > 1
        else f"{value:.4f}"
    )
    if name not in report.intervals:
        return text
    low, high = report.intervals[name]
    return f"{text}  (95 %: {low:.4f} to {high:.4f})"
