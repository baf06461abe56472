"""The rows of whole shards, for statistics, filters and deduplication: from their tables, else from the
images themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import polars as pl

from data_pipelines.errors import SampleError
from data_pipelines.index import Sample
from data_pipelines.inputs.items import Inputs, Item, ShardImage
from data_pipelines.inputs.shards import read_members, shard_items
from data_pipelines.parallel import map_processes
from data_pipelines.progress import Progress
from data_pipelines.table import Row, describe, read_table, schema, to_frame

FRAME_SCHEMA = {**schema(), "shard": pl.String(), "place": pl.Int64()}
"""Of `read_rows`: the table's columns, the tar's path and the sample's place among all samples of all
shards."""


@dataclass(frozen=True)
class ShardRows:
    frame: pl.DataFrame
    """One row per usable sample, in the shards' order; columns of `FRAME_SCHEMA`."""
    unusable: tuple[tuple[str, str], ...]
    """(`SHARD/KEY`, reason) of samples without an image that can be read."""
    inputs: Inputs
    """All samples; `place` counts in its items."""


def read_rows(tars: Sequence[Path], *, phash: bool, processes: int = 1, label: str = "read") -> ShardRows:
    """The rows of all samples. Shards without a table of ours are read whole. Raises ShardError for a damaged
    one."""
    parts: list[ShardRows] = []
    frames: list[pl.DataFrame] = []
    work = partial(_shard_rows, phash=phash)
    before = 0
    with Progress(label, len(tars), unit="shards") as progress:
        for tar, part in zip(tars, map_processes(work, tars, processes=processes), strict=True):
            place = (pl.col("place") + before).alias("place")
            frames.append(
                part.frame.with_columns(pl.lit(str(tar)).alias("shard"), place).select(*FRAME_SCHEMA)
            )
            parts.append(part)
            before += len(part.inputs.items)
            progress.advance()
    return ShardRows(
        frame=pl.concat(frames, rechunk=True) if frames else pl.DataFrame(schema=FRAME_SCHEMA),
        unusable=tuple(pair for part in parts for pair in part.unusable),
        inputs=Inputs(
            items=[item for part in parts for item in part.inputs.items],
            described=f"{len(tars)} shards with {before} samples",
            stamp="\n".join(part.inputs.stamp for part in parts),
            files=tuple(map(str, tars)),
        ),
    )


def _shard_rows(tar: Path, *, phash: bool) -> ShardRows:
    inputs = shard_items([tar])
    keys = [item.key for item in inputs.items]
    table = read_table(tar)
    if table is not None and table["key"].to_list() == keys and not (phash and table["phash"].has_nulls()):
        return ShardRows(
            table.with_columns(pl.int_range(len(keys), dtype=pl.Int64).alias("place")), (), inputs
        )
    rows: list[Row] = []
    places: list[int] = []
    unusable: list[tuple[str, str]] = []
    for place, item in enumerate(inputs.items):
        try:
            rows.append(_describe(item, phash=phash))
            places.append(place)
        except SampleError as error:
            unusable.append((item.origin, str(error)))
    frame = to_frame(rows).with_columns(pl.Series("place", places, dtype=pl.Int64))
    return ShardRows(frame, tuple(unusable), inputs)


def _describe(item: Item, *, phash: bool) -> Row:
    assert isinstance(item.image, ShardImage)
    assert item.key is not None
    sample = Sample(item.key, read_members(item.image))
    return describe(
        sample, carried=item.columns, origin=item.columns.get("origin") or item.origin, phash=phash
    )
