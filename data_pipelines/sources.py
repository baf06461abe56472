"""Where shards lie: local files, folders, brace patterns, globs and fsspec URLs, and how their bytes are
read."""

from __future__ import annotations

import difflib
import fcntl
import glob
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

from data_pipelines.errors import DataError, ShardError

_IMAGES = (".jpg", ".jpeg", ".png", ".webp")
_FIX = "name a .tar file, a folder of them or a pattern that matches some"

REMOTE_ATTEMPTS = 4

T = TypeVar("T")


class ShardFile(Protocol):
    """Random access to the bytes of a shard. Reads past the end come back short. Raises ShardError."""

    def read(self, start: int, end: int) -> bytes: ...

    def close(self) -> None: ...


class LocalFile:
    """A file on this machine, read by offset: safe to share between threads."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._name = os.fspath(path)
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ShardError(f"{self._name}: cannot be opened: {error.strerror}") from error

    def read(self, start: int, end: int) -> bytes:
        try:
            return os.pread(self._fd, end - start, start)
        except OSError as error:
            raise ShardError(f"{self._name}: cannot be read: {error.strerror}") from error

    def close(self) -> None:
        os.close(self._fd)


class RemoteFile:
    """A file behind an fsspec URL, read by ranges."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._fs, self._path = filesystem(url)

    def read(self, start: int, end: int) -> bytes:
        data: bytes = retried(self._url, lambda: self._fs.cat_file(self._path, start=start, end=end))
        if len(data) > end - start:
            raise ShardError(
                f"{self._url}: the server does not serve ranges; set data.cache_dir to fetch whole shards"
            )
        return data

    def close(self) -> None:
        """Nothing is held open between reads."""


def is_pipe(source: str) -> bool:
    return source.startswith("pipe:")


def is_remote(source: str) -> bool:
    return "://" in source and not source.startswith("file://")


def shard_name(url: str) -> str:
    """The file name of a shard, which stands before its keys."""
    return url.split("?", 1)[0].rstrip("/").rsplit("/", 1)[-1]


def expand(source: str, *, key: str | None = None) -> list[str]:
    """The shards that a file, folder, brace pattern, glob or URL names, in a fixed order. Raises DataError
    for none.

    key: of the recipe, where the source stands there: the error names it.
    """
    from braceexpand import braceexpand

    if is_pipe(source):
        return [source]
    source = source.removeprefix("file://")
    try:
        patterns = list(braceexpand(source)) if "{" in source else [source]
    except ValueError as error:
        raise DataError(
            f"{_named(source, key)}: braces do not match; write shards-{{00000..00009}}.tar"
        ) from error
    found = [
        shard
        for pattern in patterns
        for shard in (_expand_url(pattern) if is_remote(pattern) else _expand_path(pattern, key))
    ]
    if not found and _holds_images(source):
        raise DataError(
            f"{_named(source, key)}: images, no shards; "
            f"`clipstack data build {source} --output DIR` makes shards of them"
        )
    if not found:
        raise DataError(f"{_named(source, key)}: no shards there; {_FIX}")
    return found


def _named(source: str, key: str | None) -> str:
    return source if key is None else f"{key} = {source!r}"


def _holds_images(folder: str) -> bool:
    return any(name.lower().endswith(_IMAGES) for _, _, names in os.walk(folder) for name in names)


def expand_all(sources: Sequence[str], *, key: str | None = None) -> list[str]:
    """`expand` of each, in a row."""
    return [shard for source in sources for shard in expand(source, key=key)]


def _expand_path(pattern: str, key: str | None) -> list[str]:
    path = os.path.expanduser(pattern)
    if os.path.isdir(path):
        return sorted(glob.glob(os.path.join(glob.escape(path), "*.tar")))
    if os.path.exists(path):
        return [path]
    if glob.has_magic(path):
        return sorted(match for match in glob.glob(path) if not match.endswith(".idx"))
    fix = did_you_mean(Path(path)) or ("" if key is None else f"; {_FIX}")
    raise DataError(f"{_named(pattern, key)}: no such file or folder{fix}")


def did_you_mean(path: Path) -> str:
    """The end of a message about a path that is not there: what lies beside it under a similar name, if
    anything does."""
    if not path.parent.is_dir():
        return ""
    near = difflib.get_close_matches(path.name, os.listdir(path.parent), n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


def _expand_url(url: str) -> list[str]:
    if not url.endswith("/") and not glob.has_magic(url.split("?", 1)[0]):
        return [url]
    fs, path = filesystem(url)
    pattern = path.rstrip("/") + "/*.tar" if url.endswith("/") else path
    found: list[str] = retried(url, lambda: fs.glob(pattern))
    return sorted(str(fs.unstrip_protocol(match)) for match in found)


def filesystem(url: str) -> tuple[Any, str]:
    """(fsspec file system, path in it). Raises DataError naming what to install for an unknown protocol."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)  # type: ignore[no-any-return]
    except (ImportError, ValueError) as error:
        raise DataError(f"{url}: {error}") from error


def retried(url: str, call: Callable[[], T]) -> T:
    """A remote call, tried again with growing pauses where the network fails it. Raises ShardError after
    the last, and at once for a file that is not there."""
    for attempt in range(REMOTE_ATTEMPTS):
        try:
            return call()
        except FileNotFoundError as error:
            raise ShardError(f"{url}: no such file") from error
        except _network_errors() as error:
            if attempt + 1 == REMOTE_ATTEMPTS:
                raise ShardError(
                    f"{url}: cannot be read after {REMOTE_ATTEMPTS} attempts: {error}"
                ) from error
            time.sleep(0.2 * 2**attempt)
    raise AssertionError("unreachable")


def _network_errors() -> tuple[type[Exception], ...]:
    try:
        import aiohttp
    except ImportError:
        return (OSError,)
    return (OSError, aiohttp.ClientError)


def default_cache_dir() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(root) / "clipstack"


def size_bytes(url: str) -> int:
    """Raises ShardError."""
    if is_remote(url):
        fs, path = filesystem(url)
        return int(retried(url, lambda: fs.size(path)))
    try:
        return os.stat(url).st_size
    except OSError as error:
        raise ShardError(f"{url}: cannot be read: {error.strerror}") from error


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time, on this machine, for one path. Raises DataError where the folder cannot be
    written."""
    lock = path.with_name(path.name + ".lock")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        handle = lock.open("w")
    except OSError as error:
        raise DataError(f"data.cache_dir = {lock.parent}: cannot be written: {error.strerror}") from error
    with handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
