"""Existing shards to items, with what their tables know."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from data_pipelines.errors import DataError, SampleError, ShardError
from data_pipelines.index import build_index
from data_pipelines.index.finding import find_index
from data_pipelines.index.format import decode_index
from data_pipelines.index.shard_index import ShardIndex, payload_digest
from data_pipelines.inputs.items import Inputs, Item, ShardImage
from data_pipelines.sources import LocalFile, did_you_mean, expand, is_pipe, is_remote
from data_pipelines.table import CARRIED, foreign_columns, read_table


def expand_shards(patterns: Sequence[str]) -> list[Path]:
    """Local tars of paths, folders and brace patterns like `{00000..00009}.tar`. Raises DataError."""
    out: list[str] = []
    for pattern in patterns:
        if is_pipe(pattern) or is_remote(pattern):
            raise DataError(f"{pattern}: this command reads local shards; copy them here first")
        folder = Path(pattern)
        if folder.is_dir() and not any(path.suffix == ".tar" for path in folder.iterdir()):
            # Split folders, as CLIP_benchmark keeps them, stand one level below.
            below = sorted(str(path) for path in folder.glob("*/*.tar") if not path.name.startswith("."))
            out.extend(below or expand(pattern))
        elif "{" not in pattern and "*" not in pattern and not folder.exists():
            raise DataError(f"{pattern}: no such shard or folder{did_you_mean(folder)}")
        else:
            out.extend(expand(pattern))
    missing = [path for path in out if not os.path.isfile(path)]
    if missing:
        raise DataError(f"{missing[0]}: no such shard")
    return [Path(path) for path in out]


def shard_index(tar: Path) -> ShardIndex:
    """The index of a tar, or one made now, in memory, where there is none. Raises ShardError for a damaged
    shard."""
    found = find_index(str(tar))
    index = build_index(tar) if found is None else decode_index(found[1], name=found[0])
    size = tar.stat().st_size
    if index.damage or size != index.tar_size:
        reason = index.damage[0].reason if index.damage else f"{size} bytes, by its index {index.tar_size}"
        raise ShardError(
            f"{tar}: damaged: {reason}; `clipstack data verify --repair` saves what can be saved"
        )
    return index


def shard_items(tars: Sequence[Path]) -> Inputs:
    """The samples of existing shards. Their tables' columns are carried on. Raises ShardError for a damaged
    one."""
    items: list[Item] = []
    stamp: list[str] = []
    for tar in tars:
        index = shard_index(tar)
        carried = shard_columns(tar)
        stamp.append(f"{tar.name}\t{index.digest}")
        items.extend(
            Item(
                origin=f"{tar.name}/{key}",
                image=ShardImage(str(tar), tuple(index.members(position).items())),
                key=key,
                columns=carried.get(key, {}),
            )
            for position, key in enumerate(index.keys)
        )
    described = f"{len(tars)} shards with {len(items)} samples"
    return Inputs(items, described, stamp="\n".join(stamp), files=tuple(map(str, tars)))


def shard_columns(tar: Path) -> dict[str, dict[str, Any]]:
    """Key to the carried columns of a shard, from its own table or another tool's."""
    frame = read_table(tar)
    if frame is None:
        return foreign_columns(tar)
    rows = frame.select("key", *CARRIED, "sha256", "phash", "origin").iter_rows(named=True)
    return {
        row["key"]: {name: value for name, value in row.items() if name != "key" and value is not None}
        for row in rows
    }


def read_members(image: ShardImage) -> dict[str, bytes]:
    """Extension to payload, each checked against its hash. Raises SampleError where the bytes have
    changed."""
    file = _open_shard(image.tar)
    out: dict[str, bytes] = {}
    for extension, span in image.members:
        payload = file.read(span.offset, span.offset + span.size)
        if payload_digest(payload) != span.digest:
            raise SampleError(f"the bytes of .{extension} are not those that the index knows")
        out[extension] = payload
    return out


@lru_cache(maxsize=64)
def _open_shard(tar: str) -> LocalFile:
    return LocalFile(tar)
