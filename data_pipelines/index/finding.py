"""The index of a shard wherever that lies: beside it, else in the cache folder, else made now."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from data_pipelines.errors import ShardError
from data_pipelines.index.format import IndexSummary, decode_index, save_index, summarize_index
from data_pipelines.index.indexing import build_index, index_stream
from data_pipelines.index.shard_index import ShardIndex, index_path
from data_pipelines.sources import default_cache_dir, filesystem, is_remote, locked, retried, shard_name

HEAD_BYTES = 2**16
"""So much of an index is read for its summary."""


def cached_index_path(url: str, cache_dir: Path | None) -> Path:
    """Where the index of a shard lies whose own folder cannot be written."""
    where = url if is_remote(url) else os.path.abspath(url)
    digest = hashlib.sha256(where.encode()).hexdigest()[:16]
    return (cache_dir or default_cache_dir()) / "index" / f"{digest}-{shard_name(url)}.idx"


def find_index(url: str, cache_dir: Path | None = None) -> tuple[str, bytes] | None:
    """(name, content) of the index of a shard: beside it, else in the cache folder; None if there is none."""
    if is_remote(url):
        fs, path = filesystem(url)
        data = retried(url + ".idx", lambda: _cat_if_there(fs, path + ".idx"))
        if data is not None:
            return url + ".idx", data
    for file in ([] if is_remote(url) else [index_path(url)]) + [cached_index_path(url, cache_dir)]:
        try:
            return str(file), file.read_bytes()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise ShardError(f"{file}: cannot be read: {error.strerror}") from error
    return None


def ensure_index(url: str, cache_dir: Path | None = None, *, strict: bool = False) -> ShardIndex:
    """The index of a shard, made and kept if there is none. Safe for several processes at once. Raises
    ShardError.

    Without `strict` a damaged tar is indexed as far as it goes, with the damage noted in the index.
    """
    found = find_index(url, cache_dir)
    if found is None:
        with locked(cached_index_path(url, cache_dir)):
            found = find_index(url, cache_dir)  # another process may have made it meanwhile
            if found is None:
                return _make_index(url, cache_dir, strict)
    return decode_index(found[1], name=found[0])


def ensure_summary(url: str, cache_dir: Path | None = None) -> IndexSummary:
    """What the head of the index of a shard says; the index is made if there is none. Raises ShardError."""
    if not is_remote(url):
        for path in (index_path(url), cached_index_path(url, cache_dir)):
            if path.exists():
                with path.open("rb") as file:
                    head = file.read(HEAD_BYTES)
                try:
                    return summarize_index(head, name=str(path))
                except ShardError:
                    break  # a header longer than that, or damage: the full read tells
    index = ensure_index(url, cache_dir)
    return IndexSummary(len(index), index.tar_size, index.digest, index.damage)


def _is_writable(folder: Path) -> bool:
    """Whether files may be added: root may everywhere, but a folder without write bits is read-only to it
    too."""
    return bool(folder.stat().st_mode & 0o222) and os.access(folder, os.W_OK)


def _make_index(url: str, cache_dir: Path | None, strict: bool) -> ShardIndex:
    if is_remote(url):
        fs, path = filesystem(url)
        index = retried(url, lambda: _index_remote(fs, path, url, strict))
        save_index(index, cached_index_path(url, cache_dir))
        return index
    index = build_index(url, strict=strict)
    beside = index_path(url)
    save_index(index, beside if _is_writable(beside.parent) else cached_index_path(url, cache_dir))
    return index


def _index_remote(fs: Any, path: str, url: str, strict: bool) -> ShardIndex:
    with fs.open(path, "rb", block_size=4 * 2**20) as stream:
        return index_stream(stream, name=url, strict=strict)


def _cat_if_there(fs: Any, path: str) -> bytes | None:
    try:
        return bytes(fs.cat_file(path))
    except FileNotFoundError:
        return None
