"""`clipstack data index`: make the indexes that shards lack, beside them or in the cache folder."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from data_pipelines.errors import DataError, ShardError
from data_pipelines.index.finding import ensure_index, find_index
from data_pipelines.parallel import default_processes, map_processes
from data_pipelines.progress import Progress
from data_pipelines.sources import expand_all, is_pipe, size_bytes


@dataclass(frozen=True)
class Indexed:
    shard: str
    samples: int
    new: bool
    problem: str | None = None
    """Why the shard cannot be used as it is."""


def index_shard(url: str, *, cache_dir: Path | None = None) -> Indexed:
    """Index one shard if it has no index yet. An index that is there stays, and must fit the shard's size."""
    try:
        new = find_index(url, cache_dir) is None
        index = ensure_index(url, cache_dir, strict=True)
        size = size_bytes(url)
    except ShardError as error:
        return Indexed(url, 0, False, str(error))
    if index.damage:
        return Indexed(url, len(index), new, f"{url}: was damaged when indexed: {index.damage[0].reason}")
    if size != index.tar_size:
        problem = f"{url}: {size} bytes, by its index {index.tar_size}; `clipstack data verify` says more"
        return Indexed(url, len(index), new, problem)
    return Indexed(url, len(index), new)


def index_shards(urls: Sequence[str], *, cache_dir: Path | None = None, processes: int = 1) -> list[Indexed]:
    """`index_shard` of each, in order."""
    out: list[Indexed] = []
    with Progress("index", len(urls), unit="shards") as progress:
        for result in map_processes(partial(index_shard, cache_dir=cache_dir), urls, processes=processes):
            out.append(result)
            progress.advance()
    return out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "paths", nargs="+", metavar="PATH", help="shards, folders, brace patterns or fsspec URLs of them"
    )
    parser.add_argument(
        "--cache-dir", metavar="DIR", help="for indexes of shards that lie where none can be written"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per shard")
    parser.add_argument(
        "--processes", type=int, default=default_processes(), metavar="N", help="(default: all cores)"
    )


def run(args: argparse.Namespace) -> int:
    urls = expand_all(args.paths)
    pipes = [url for url in urls if is_pipe(url)]
    if pipes:
        raise DataError(f"{pipes[0]}: a pipe has no places to index; it can only be read from its beginning")
    cache_dir = Path(args.cache_dir) if args.cache_dir else None
    results = index_shards(urls, cache_dir=cache_dir, processes=args.processes)
    for result in results:
        if args.json:
            print(json.dumps(asdict(result)))
        elif result.problem:
            print(result.problem)
    if not args.json:
        sound = [result for result in results if not result.problem]
        new = sum(result.new for result in sound)
        total = sum(result.samples for result in sound)
        print(f"{total} samples in {len(sound)} shards; indexed now: {new}, before: {len(sound) - new}")
    return 1 if any(result.problem for result in results) else 0
