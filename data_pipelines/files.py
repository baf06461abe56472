"""Files that are whole or absent, also after a power cut: written beside, flushed to the disk, renamed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from data_pipelines.errors import ShardError


def flush_to_disk(path: Path) -> None:
    """fsync a file or a folder's list of names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write a file, which takes the name `path` when the block ends and vanishes if the block
    raises. Raises OSError where the disk refuses."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        flush_to_disk(partial)
        os.replace(partial, path)
        flush_to_disk(path.parent)
    finally:
        with suppress(OSError):  # it has its name by now, or the disk refuses this as well
            partial.unlink()


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """The same for a file of a data set. Raises ShardError where the disk refuses."""
    try:
        with replacing(path) as partial:
            yield partial
    except OSError as error:
        raise ShardError(f"{path}: cannot be written: {error.strerror or error}") from error


def write_text(path: Path, text: str) -> None:
    """Write a small file as a whole. Raises ShardError."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")
