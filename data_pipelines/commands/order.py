"""`clipstack data order`: which samples each batch and rank gets, without reading one of them."""

from __future__ import annotations

import argparse
import json
from itertools import islice
from pathlib import Path
from typing import Any

from data_pipelines.errors import DataError
from data_pipelines.order import Order, OrderParams, batch_ranges, rank_slice
from data_pipelines.stream import Reader, ReadOptions, make_manifest

MAX_NUMBER = 2**62
"""Positions and seeds are 64-bit numbers; this leaves room for a batch behind the last position."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    defaults = OrderParams()
    parser.add_argument("--data", nargs="+", required=True, metavar="PATH", help="shards, as in data.train")
    parser.add_argument("--batch-size", type=_positive, required=True, help="samples of a global batch")
    parser.add_argument("--seed", type=_natural, required=True)
    parser.add_argument("--start-sample", type=_natural, default=0, help="position to start from (default 0)")
    parser.add_argument("--batches", type=_positive, required=True, help="how many batches to show")
    parser.add_argument("--world-size", type=_positive, default=1, help="number of ranks (default 1)")
    parser.add_argument(
        "--lanes", type=_positive, default=defaults.lanes, help="data.lanes (default %(default)s)"
    )
    parser.add_argument(
        "--window-shards",
        type=_positive,
        default=defaults.window_shards,
        help="data.window_shards (default %(default)s)",
    )
    parser.add_argument(
        "--quantum", type=_positive, default=defaults.quantum, help="data.quantum (default %(default)s)"
    )
    parser.add_argument("--cache-dir", type=Path, help="folder for indexes of read-only sources")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")


def run(args: argparse.Namespace) -> int:
    if args.batch_size % args.world_size:
        raise DataError(
            f"--batch-size {args.batch_size}: not divisible by --world-size {args.world_size}; "
            "ranks get equal shares"
        )
    manifest = make_manifest([(tuple(args.data), 1.0)], args.cache_dir)
    order = manifest.order(OrderParams(args.seed, args.lanes, args.window_shards, args.quantum))
    reader = Reader(manifest, ReadOptions(cache_dir=args.cache_dir))
    first = args.start_sample // args.batch_size
    for batch, ranges in enumerate(
        islice(batch_ranges(args.start_sample, args.batch_size), args.batches), first
    ):
        for rank in range(args.world_size):
            row = _row(order, reader, rank_slice(ranges, rank=rank, world_size=args.world_size))
            print(_show({"batch": batch, "rank": rank, **row}, as_json=args.json))
    return 0


def _row(order: Order, reader: Reader, ranges: tuple[tuple[int, int], ...]) -> dict[str, Any]:
    draws = [order.take(low, high - low) for low, high in ranges]
    keys = [reader.key(int(sample)) for draw in draws for sample in draw.sample]
    # That of the first sample: a batch may go on into the next epoch.
    return {"epoch": int(draws[0].epoch[0]), "keys": keys}


def _show(row: dict[str, Any], *, as_json: bool) -> str:
    if as_json:
        return json.dumps(row, ensure_ascii=False)
    return f"batch {row['batch']} rank {row['rank']} epoch {row['epoch']}: {' '.join(row['keys'])}"


def _positive(text: str) -> int:
    value = _natural(text)
    if value == 0:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _natural(text: str) -> int:
    try:
        value = int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from error
    if not 0 <= value < MAX_NUMBER:
        raise argparse.ArgumentTypeError(f"{text}: must lie in 0 .. 2^62")
    return value
