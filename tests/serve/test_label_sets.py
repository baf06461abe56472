"""The store's file, and the cache of classifier matrices under concurrent use."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path

import numpy as np
import pytest

from clipstack.errors import ConfigError
from serve.errors import ServeError
from serve.label_sets import LabelSet, LabelSetStore, MatrixCache, MatrixKey, _size_of
from serve.runtime import Float32

KEY = MatrixKey("f", ("a", "b"), ("{}",))
MATRIX = np.ones((2, 4), dtype=np.float32)


def test_sets_are_kept_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "sets.sqlite3"
    store = LabelSetStore(path, max_sets=10, max_bytes=1000)
    pets = LabelSet("pets", ("Katze 🐈", "dog"), ("a {}",))
    assert store.put(pets) is True
    assert store.put(pets) is False
    store.close()
    again = LabelSetStore(path, max_sets=10, max_bytes=1000)
    assert again.get("pets") == pets and again.list() == [pets]
    again.close()


def test_a_set_that_is_replaced_or_deleted_is_told_of_and_no_longer_known(tmp_path: Path) -> None:
    gone: list[LabelSet] = []
    store = LabelSetStore(tmp_path / "sets.sqlite3", max_sets=10, max_bytes=1000, on_gone=gone.append)
    first, second = LabelSet("pets", ("Katze 🐈",), ("a {}",)), LabelSet("pets", ("dog",), ("a {}",))
    for entry in (first, first, second):
        store.put(entry)
        assert store.has(entry.labels, entry.templates)
    assert gone == [first] and not store.has(first.labels, first.templates)
    store.delete("pets")
    with pytest.raises(ServeError):
        store.delete("pets")
    assert gone == [first, second] and not store.has(second.labels, second.templates)
    store.close()


def test_a_file_that_is_no_label_set_file_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "sets.sqlite3"
    path.write_bytes(b"this is no database" * 100)
    with pytest.raises(ConfigError, match=r"label_set_file.*sets\.sqlite3"):
        LabelSetStore(path, max_sets=1, max_bytes=1)
    newer = tmp_path / "newer.sqlite3"
    db = sqlite3.connect(newer)
    db.execute("PRAGMA user_version=9")
    db.close()
    with pytest.raises(ConfigError, match="format 9"):
        LabelSetStore(newer, max_sets=1, max_bytes=1)


def test_requests_for_one_matrix_share_one_computation() -> None:
    async def scenario() -> None:
        cache, builds, may_finish = MatrixCache(1000), [], asyncio.Event()

        async def build() -> Float32:
            builds.append(1)
            await may_finish.wait()
            return MATRIX

        waiting = [asyncio.ensure_future(cache.get(KEY, build, keep=False)) for _ in range(5)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        await asyncio.gather(waiting[0], return_exceptions=True)
        may_finish.set()
        for future in waiting[1:]:
            assert await future is MATRIX
        assert builds == [1] and KEY in cache

    asyncio.run(scenario())


@pytest.mark.parametrize("keep", [True, False])
def test_a_computation_nobody_waits_for_goes_on_only_where_it_is_to_be_kept(keep: bool) -> None:
    async def scenario() -> None:
        cache, may_finish, ended = MatrixCache(1000), asyncio.Event(), asyncio.Event()

        async def build() -> Float32:
            try:
                await may_finish.wait()
                return MATRIX
            finally:
                ended.set()

        request = asyncio.ensure_future(cache.get(KEY, build, keep=keep))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)
        if keep:
            may_finish.set()
        await asyncio.wait_for(ended.wait(), 10)
        await asyncio.sleep(0)
        assert (KEY in cache) is keep

    asyncio.run(scenario())


def test_a_failed_computation_is_tried_again() -> None:
    async def scenario() -> None:
        cache = MatrixCache(1000)

        async def fail() -> Float32:
            raise RuntimeError("no")

        async def succeed() -> Float32:
            return MATRIX

        with pytest.raises(RuntimeError):
            await cache.get(KEY, fail, keep=False)
        assert await cache.get(KEY, succeed, keep=False) is MATRIX

    asyncio.run(scenario())


def test_the_least_recently_used_matrix_goes_first_and_memory_is_bounded() -> None:
    async def scenario() -> None:
        cache = MatrixCache(3 * _size_of(MatrixKey("0", ("a", "b"), ("{}",)), MATRIX))
        keys = [MatrixKey(str(n), ("a", "b"), ("{}",)) for n in range(4)]

        async def build() -> Float32:
            return MATRIX

        for key in (*keys[:3], keys[0], keys[3]):
            await cache.get(key, build, keep=False)
        assert [key in cache for key in keys] == [True, False, True, True]
        cache.forget("3")
        assert keys[3] not in cache

    asyncio.run(scenario())


def test_a_request_that_comes_while_a_computation_is_called_off_begins_its_own() -> None:
    async def scenario() -> None:
        cache, builds = MatrixCache(1000), []

        async def build() -> Float32:
            builds.append(1)
            if len(builds) > 1:
                return MATRIX
            try:
                return await asyncio.get_running_loop().create_future()
            finally:
                for _ in range(5):  # to be called off takes some turns of the loop, one for each call inside
                    await asyncio.sleep(0)

        left = asyncio.ensure_future(cache.get(KEY, build, keep=False))
        while not builds:
            await asyncio.sleep(0)
        left.add_done_callback(
            lambda _: came.append(asyncio.ensure_future(cache.get(KEY, build, keep=False)))
        )
        came: list[asyncio.Future[Float32]] = []
        left.cancel()
        while not came:
            await asyncio.sleep(0)
        assert await came[0] is MATRIX
        assert len(builds) == 2 and KEY in cache

    asyncio.run(scenario())


def test_long_texts_count_as_memory_of_the_cache() -> None:
    async def scenario() -> None:
        cache = MatrixCache(50_000)

        async def build() -> Float32:
            return MATRIX

        keys = [MatrixKey("f", (f"{n} " + " " * 8000,), ("{}",)) for n in range(20)]
        for key in keys:
            await cache.get(key, build, keep=False)
        assert [key in cache for key in keys] == [False] * 14 + [True] * 6

    asyncio.run(scenario())


class Endless:
    """A computation without end that says when it runs."""

    def __init__(self) -> None:
        self.begun, self.ended = asyncio.Event(), asyncio.Event()

    async def __call__(self) -> Float32:
        self.begun.set()
        try:
            return await asyncio.get_running_loop().create_future()
        finally:
            self.ended.set()


async def begin_and_leave(cache: MatrixCache, key: MatrixKey, build: Endless) -> None:
    request = asyncio.ensure_future(cache.get(key, build, keep=True))
    await build.begun.wait()
    request.cancel()
    await asyncio.gather(request, return_exceptions=True)


def test_of_those_that_nobody_waits_for_only_one_goes_on() -> None:
    async def scenario() -> None:
        cache, first, second = MatrixCache(1000), Endless(), Endless()
        await begin_and_leave(cache, KEY, first)
        await begin_and_leave(cache, MatrixKey("f", ("c",), ("{}",)), second)
        await asyncio.wait_for(second.ended.wait(), 10)
        assert not first.ended.is_set()
        await cache.close()

    asyncio.run(scenario())


def test_what_is_to_be_kept_goes_on_when_another_request_for_it_leaves() -> None:
    async def scenario() -> None:
        cache, build = MatrixCache(1000), Endless()
        await begin_and_leave(cache, KEY, build)
        other = asyncio.ensure_future(cache.get(KEY, build, keep=False))
        await asyncio.sleep(0)
        other.cancel()
        await asyncio.gather(other, return_exceptions=True)
        assert cache._left is not None and not cache._left.task.cancelling()
        await cache.close()

    asyncio.run(scenario())


def test_nothing_goes_on_for_a_version_that_was_replaced() -> None:
    async def scenario() -> None:
        cache, left, waited_for = MatrixCache(1000), Endless(), Endless()
        await begin_and_leave(cache, KEY, left)
        request = asyncio.ensure_future(cache.get(MatrixKey("f", ("c",), ("{}",)), waited_for, keep=True))
        await waited_for.begun.wait()
        cache.call_off("f")
        await asyncio.wait_for(left.ended.wait(), 10)
        assert not waited_for.ended.is_set()
        request.cancel()
        await asyncio.wait_for(waited_for.ended.wait(), 10)
        await cache.close()

    asyncio.run(scenario())


def test_a_model_that_is_not_served_any_more_leaves_nothing_in_the_cache() -> None:
    async def scenario() -> None:
        cache, late = MatrixCache(1000, is_served=lambda fingerprint: fingerprint != "f"), Endless()

        async def build() -> Float32:
            return MATRIX

        assert await cache.get(KEY, build, keep=True) is MATRIX
        assert KEY not in cache
        await begin_and_leave(cache, KEY, late)
        await asyncio.wait_for(late.ended.wait(), 10)

    asyncio.run(scenario())
