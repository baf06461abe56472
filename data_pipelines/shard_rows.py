"""The rows of whole shards, for statistics, filters and deduplication: from their tables, else from the
images themselves."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

import polars as pl

from data_pipelines.errors import SampleError, ShardError
from data_pipelines.index import Sample
from data_pipelines.inputs import Item, ShardImage, read_members, shard_items
from data_pipelines.progress import Progress
from data_pipelines.table import SCHEMA, Row, describe, read_table, to_frame

T = TypeVar("T")
R = TypeVar("R")

FRAME_SCHEMA = {**SCHEMA, "shard": pl.String(), "place": pl.Int64()}
"""Of `read_rows`: the table's columns, the tar's path and the sample's place among all samples of all
shards."""


@dataclass(frozen=True)
class ShardRows:
    frame: pl.DataFrame
    """One row per usable sample, in the shards' order; columns of `FRAME_SCHEMA`."""
    unusable: tuple[tuple[str, str], ...]
    """(`SHARD/KEY`, reason) of samples without an image that can be read."""
    items: tuple[Item, ...]
    """All samples; `place` counts in here."""


def default_processes() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_processes(function: Callable[[T], R], work: Sequence[T], *, processes: int) -> Iterator[R]:
    """`function` of each piece, in order, in fresh processes; in this one where one is enough. Raises
    ShardError.

    `function` must be importable: a module's own, or a `functools.partial` of one.
    """
    if processes <= 1 or len(work) <= 1:
        yield from map(function, work)
        return
    # Fresh processes: polars and the image libraries keep threads, which a fork would break.
    with ProcessPoolExecutor(min(processes, len(work)), mp_context=get_context("spawn")) as pool:
        try:
            yield from pool.map(function, work)
        except BrokenProcessPool as error:
            raise ShardError("a worker died (out of memory?); try again with fewer --processes") from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def read_rows(tars: Sequence[Path], *, phash: bool, processes: int = 1, label: str = "read") -> ShardRows:
    """The rows of all samples. Shards without a table of ours are read whole. Raises ShardError for a damaged
    one."""
    frames: list[pl.DataFrame] = []
    unusable: list[tuple[str, str]] = []
    items: list[Item] = []
    with Progress(label, len(tars), unit="shards") as progress:
        for tar, part in zip(
            tars, map_processes(partial(_shard_rows, phash=phash), tars, processes=processes), strict=True
        ):
            frames.append(
                part.frame.with_columns(
                    pl.lit(str(tar)).alias("shard"), (pl.col("place") + len(items)).alias("place")
                )
            )
            unusable.extend(part.unusable)
            items.extend(part.items)
            progress.advance()
    frame = pl.concat(frames) if frames else pl.DataFrame(schema=FRAME_SCHEMA)
    return ShardRows(frame.select(*FRAME_SCHEMA), tuple(unusable), tuple(items))


def _shard_rows(tar: Path, *, phash: bool) -> ShardRows:
    items = tuple(shard_items([tar]).items)
    keys = [item.key for item in items]
    table = read_table(tar)
    if table is not None and table["key"].to_list() == keys and not (phash and table["phash"].has_nulls()):
        return ShardRows(
            table.with_columns(pl.int_range(len(keys), dtype=pl.Int64).alias("place")), (), items
        )
    rows: list[Row] = []
    places: list[int] = []
    unusable: list[tuple[str, str]] = []
    for place, item in enumerate(items):
        try:
            rows.append(_describe(item, phash=phash))
            places.append(place)
        except SampleError as error:
            unusable.append((item.origin, str(error)))
    frame = to_frame(rows).with_columns(pl.Series("place", places, dtype=pl.Int64))
    return ShardRows(frame, tuple(unusable), items)


def _describe(item: Item, *, phash: bool) -> Row:
    assert isinstance(item.image, ShardImage)
    assert item.key is not None
    sample = Sample(item.key, read_members(item.image))
    return describe(
        sample, carried=item.columns, origin=item.columns.get("origin") or item.origin, phash=phash
    )
