"""Registered label sets in an SQLite file, and the classifier matrices made of labels, shared while they are
computed.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
import sys
import threading
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from clipstack.errors import ConfigError
from serve.errors import ErrorCode, ServeError
from serve.runtime import Float32

FORMAT_VERSION = 1


@dataclass(frozen=True)
class LabelSet:
    id: str
    labels: tuple[str, ...]
    templates: tuple[str, ...]


class LabelSetStore:
    """Label sets that survive a restart. Safe to call from several threads; every call is one small
    transaction.
    """

    def __init__(
        self,
        path: Path,
        *,
        max_sets: int,
        max_bytes: int,
        on_gone: Callable[[LabelSet], object] = lambda label_set: None,
    ) -> None:
        """on_gone: called, in the caller's thread, with a set that was replaced by another or deleted."""
        self._max_sets = max_sets
        self._max_bytes = max_bytes
        self._on_gone = on_gone
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=5.0)
            self._prepare(path)
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(
                f"label_set_file = {str(path)!r}: cannot be used as an SQLite file ({error}); "
                "give a writable path"
            ) from error

    def _prepare(self, path: Path) -> None:
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version not in (0, FORMAT_VERSION):
            raise ConfigError(
                f"label_set_file = {str(path)!r}: written in format {version}, "
                f"this server reads {FORMAT_VERSION}; "
                "give another path or update clipstack"
            )
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute(
            "CREATE TABLE IF NOT EXISTS label_sets "
            "(id TEXT PRIMARY KEY, labels TEXT NOT NULL, templates TEXT NOT NULL)"
        )
        self._db.execute(f"PRAGMA user_version={FORMAT_VERSION}")

    def put(self, label_set: LabelSet) -> bool:
        """Store under its id, in place of an older one. True where the id is new. Raises ServeError
        too_many_items or label_sets_full.
        """
        row = (label_set.id, json.dumps(label_set.labels), json.dumps(label_set.templates))
        with self._lock:
            before = self._find(label_set.id)
            # JSON as we write it is ASCII: as many bytes as characters.
            count, size_bytes = self._db.execute(
                "SELECT count(*), coalesce(sum(length(labels) + length(templates)), 0) FROM label_sets "
                "WHERE id != ?",
                row[:1],
            ).fetchone()
            if count >= self._max_sets:
                message = f"this server keeps {self._max_sets} label sets; delete one first"
                raise ServeError(ErrorCode.TOO_MANY_ITEMS, message)
            if size_bytes + len(row[1]) + len(row[2]) > self._max_bytes:
                message = f"this server keeps {self._max_bytes} bytes of label sets; delete one first"
                raise ServeError(ErrorCode.LABEL_SETS_FULL, message)
            self._db.execute("INSERT OR REPLACE INTO label_sets VALUES (?, ?, ?)", row)
        if before is not None and before != label_set:
            self._on_gone(before)
        return before is None

    def get(self, set_id: str) -> LabelSet:
        """Raises ServeError label_set_not_found."""
        with self._lock:
            label_set = self._find(set_id)
        if label_set is None:
            raise _not_found()
        return label_set

    def _find(self, set_id: str) -> LabelSet | None:
        row = self._db.execute(
            "SELECT id, labels, templates FROM label_sets WHERE id = ?", (set_id,)
        ).fetchone()
        return None if row is None else _from_row(row)

    def has(self, labels: tuple[str, ...], templates: tuple[str, ...]) -> bool:
        """Whether they are registered, under whatever id."""
        row = (json.dumps(labels), json.dumps(templates))
        with self._lock:
            found = self._db.execute("SELECT 1 FROM label_sets WHERE labels = ? AND templates = ?", row)
            return found.fetchone() is not None

    def delete(self, set_id: str) -> None:
        """Raises ServeError label_set_not_found."""
        with self._lock:
            before = self._find(set_id)
            self._db.execute("DELETE FROM label_sets WHERE id = ?", (set_id,))
        if before is None:
            raise _not_found()
        self._on_gone(before)

    def list(self) -> list[LabelSet]:
        """In order of their ids."""
        with self._lock:
            rows = self._db.execute("SELECT id, labels, templates FROM label_sets ORDER BY id").fetchall()
        return [_from_row(row) for row in rows]

    def close(self) -> None:
        with self._lock:
            self._db.close()


def _from_row(row: tuple[str, str, str]) -> LabelSet:
    return LabelSet(row[0], tuple(json.loads(row[1])), tuple(json.loads(row[2])))


def _not_found() -> ServeError:
    return ServeError(ErrorCode.LABEL_SET_NOT_FOUND, "no label set of this id; GET /v1/label-sets lists them")


@dataclass(frozen=True)
class MatrixKey:
    """What a classifier matrix depends on, and nothing else."""

    fingerprint: str
    labels: tuple[str, ...]
    templates: tuple[str, ...]


def _size_of(key: MatrixKey, matrix: Float32) -> int:
    """Bytes of an entry: long texts, of which a tower reads little, can be larger than their vectors."""
    return matrix.nbytes + sum(sys.getsizeof(text) for text in (*key.labels, *key.templates))


@dataclass(eq=False)
class _Build:
    task: asyncio.Task[Float32]
    waiters: int = 0
    keep: bool = False  # somebody asked for that
    may_go_on: bool = True  # when nobody waits for it; False once its version was replaced


class MatrixCache:
    """Classifier matrices (labels, D) by key, least recently used out first.

    Requests for the same key share one computation. It is called off when the last of them has left, unless
    it was asked to be kept (a registered label set will be wanted again), its model is served, and no other
    one goes on in this way.
    """

    def __init__(
        self, max_bytes: int, *, is_served: Callable[[str], bool] = lambda fingerprint: True
    ) -> None:
        """is_served: whether a model of this fingerprint answers now."""
        self._max_bytes = max_bytes
        self._is_served = is_served
        self._size_bytes = 0
        self._done: OrderedDict[MatrixKey, Float32] = OrderedDict()
        self._building: dict[MatrixKey, _Build] = {}
        self._left: _Build | None = None  # the one that goes on though nobody waits for it

    def __contains__(self, key: MatrixKey) -> bool:
        return key in self._done

    async def get(self, key: MatrixKey, build: Callable[[], Awaitable[Float32]], *, keep: bool) -> Float32:
        """The matrix of `key`, from memory, from a computation under way, or from `build`."""
        matrix = self._done.get(key)
        if matrix is not None:
            self._done.move_to_end(key)
            return matrix
        entry = self._building.get(key)
        if entry is None:
            entry = self._building[key] = _Build(asyncio.ensure_future(self._build(key, build)))
        entry.waiters += 1
        entry.keep |= keep
        try:
            return await asyncio.shield(entry.task)
        finally:
            entry.waiters -= 1
            if entry.waiters == 0 and self._building.get(key) is entry:
                if self._may_go_on(key, entry):
                    self._left = entry
                else:
                    self._call_off(key)

    def _may_go_on(self, key: MatrixKey, entry: _Build) -> bool:
        wanted = entry.keep and entry.may_go_on and self._is_served(key.fingerprint)
        return wanted and self._left in (None, entry)

    def _call_off(self, key: MatrixKey) -> None:
        """Forgotten at once: the next request must begin anew, not wait for what is being called off."""
        self._remove(key).task.cancel()

    def _remove(self, key: MatrixKey) -> _Build:
        entry = self._building.pop(key)
        if self._left is entry:
            self._left = None
        return entry

    async def _build(self, key: MatrixKey, build: Callable[[], Awaitable[Float32]]) -> Float32:
        try:
            matrix = await build()
        finally:
            entry = self._building.get(key)
            if entry is not None and entry.task is asyncio.current_task():
                self._remove(key)
        self._store(key, matrix)
        return matrix

    def _store(self, key: MatrixKey, matrix: Float32) -> None:
        size_bytes = _size_of(key, matrix)
        if size_bytes > self._max_bytes or key in self._done or not self._is_served(key.fingerprint):
            return
        self._done[key] = matrix
        self._size_bytes += size_bytes
        while self._size_bytes > self._max_bytes:
            self._size_bytes -= _size_of(*self._done.popitem(last=False))

    def call_off(self, fingerprint: str) -> None:
        """Of a version that was replaced: end what nobody waits for, now or when the last has left."""
        for key in [key for key in self._building if key.fingerprint == fingerprint]:
            self._building[key].may_go_on = False
            if self._building[key].waiters == 0:
                self._call_off(key)

    def forget(self, fingerprint: str) -> None:
        """Drop the matrices of a model that is no longer served."""
        for key in [key for key in self._done if key.fingerprint == fingerprint]:
            self._size_bytes -= _size_of(key, self._done.pop(key))

    async def close(self) -> None:
        tasks = [entry.task for entry in self._building.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
