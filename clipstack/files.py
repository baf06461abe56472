"""Files and folders that are whole or absent: write beside, flush to disk, rename."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_pipelines.files import flush_to_disk, replacing


def sha256_of(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Replace a small file as a whole. Raises OSError."""
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which takes the name `path` when the block ends and vanishes if the block raises.

    A folder that has the name already is replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        yield beside
        for file in beside.iterdir():
            flush_to_disk(file)
        flush_to_disk(beside)
        _take_name(beside, path)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def _take_name(beside: Path, path: Path) -> None:
    if not path.exists():
        os.rename(beside, path)
    else:
        old = path.with_name(f".{path.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        os.rename(path, old)
        try:
            os.rename(beside, path)
        except OSError:
            os.rename(old, path)
            raise
        shutil.rmtree(old)
    flush_to_disk(path.parent)
