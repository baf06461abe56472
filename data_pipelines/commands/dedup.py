"""`clipstack data dedup`: drop samples that repeat another one."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from typing import get_args

from data_pipelines.building.reshard import reshard_items
from data_pipelines.commands.arguments import add_copy_arguments, copy_target, print_report
from data_pipelines.dedup import By, DedupOptions, find_duplicates
from data_pipelines.errors import DataError
from data_pipelines.files import write_text
from data_pipelines.inputs.shards import expand_shards
from data_pipelines.shard_rows import read_rows

DUPLICATES = "duplicates.jsonl"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    defaults = DedupOptions()
    parser.add_argument("paths", nargs="+", metavar="PATH", help="shards, folders or brace patterns of them")
    parser.add_argument(
        "--by",
        action="append",
        choices=get_args(By),
        help="exact: image bytes (default); perceptual: how it looks; text: the caption; repeatable",
    )
    parser.add_argument(
        "--max-bits",
        type=int,
        default=defaults.max_bits,
        metavar="N",
        help="perceptual hashes within so many of 64 bits are one picture (default: %(default)s)",
    )
    parser.add_argument(
        "--similarity",
        type=float,
        default=defaults.similarity,
        metavar="X",
        help="captions at least so alike, 0 to 1, are one (default: %(default)s)",
    )
    parser.add_argument(
        "--keep", choices=("first", "largest"), default=defaults.keep, help="(default: %(default)s)"
    )
    add_copy_arguments(parser, dry_run=True)


def run(args: argparse.Namespace) -> int:
    dedup = _options(args)
    out, options = copy_target(args)
    tars = expand_shards(args.paths)
    rows = read_rows(tars, phash="perceptual" in dedup.by, processes=args.processes, label="dedup")
    duplicates = find_duplicates(rows.frame, dedup)
    for by in dedup.by:
        print(f"{sum(d.by == by for d in duplicates):>10,}  {by} duplicates")
    print(f"keeps {rows.frame.height - len(duplicates):,} of {rows.frame.height:,}")
    if rows.unusable:
        print(f"{len(rows.unusable):,} more have no image that can be read and are dropped")
    if args.dry_run:
        return 0
    places = rows.frame["place"].to_list()
    dropped = {places[d.dropped] for d in duplicates}
    items = [rows.inputs.items[place] for place in places if place not in dropped]
    inputs = replace(rows.inputs, items=items, stamp=f"{rows.inputs.stamp}\n{json.dumps(asdict(dedup))}")
    report = reshard_items(inputs, out, options, processes=args.processes, label="dedup: write")
    pairs = (
        {
            "dropped": rows.inputs.items[places[d.dropped]].origin,
            "kept": rows.inputs.items[places[d.kept]].origin,
            "by": d.by,
            "distance": d.distance,
        }
        for d in duplicates
    )
    write_text(out / DUPLICATES, "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs))
    print_report(report, out)
    return 0


def _options(args: argparse.Namespace) -> DedupOptions:
    if not 0 <= args.max_bits <= 16:
        raise DataError(f"--max-bits {args.max_bits}: must be 0 to 16")
    if not 0 < args.similarity <= 1:
        raise DataError(f"--similarity {args.similarity}: must be above 0 and at most 1")
    by = tuple(name for name in get_args(By) if name in (args.by or ("exact",)))
    return DedupOptions(by=by, max_bits=args.max_bits, similarity=args.similarity, keep=args.keep)
