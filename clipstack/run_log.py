"""A run's own log, metrics.jsonl and eval.jsonl: whole lines added, read back, and cut back to a step."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clipstack.errors import CheckpointError
from clipstack.files import write_text

ROLLED_BACK = "rolled_back"
"""The event of a roll-back; its step is the one gone back to."""
METRICS_FILE, EVAL_FILE, QUARANTINE_FILE = "metrics.jsonl", "eval.jsonl", "quarantine.jsonl"


def append_line(path: Path, values: Mapping[str, Any]) -> None:
    """Add one line, or nothing: where there is room for half a line only, it is taken back. Raises
    OSError."""
    size = path.stat().st_size if path.exists() else 0
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
    except OSError:
        if path.exists():
            os.truncate(path, size)
        raise


def cut_back(path: Path, step: int, *, keep_rollbacks: bool) -> None:
    """Keep the lines up to `step`: what a crash logged after its last checkpoint will be logged again."""
    if not path.exists():
        return
    try:
        lines = read_jsonl(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error}); move it away and run the same command again"
        ) from error
    kept = [
        json.dumps(line) + "\n"
        for line in lines
        if line["step"] < step
        or (line["step"] == step and (keep_rollbacks or line.get("event") != ROLLED_BACK))
    ]
    try:
        write_text(path, "".join(kept))
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be written ({error}); make room and run the same command again"
        ) from error


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file; a torn last line, as a crash leaves it, is dropped."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]
