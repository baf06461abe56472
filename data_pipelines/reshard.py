"""`clipstack data reshard`: the same samples in other shards: cut anew, shuffled, shrunk, without those to be
removed."""

from __future__ import annotations

import argparse
import os
import re
import sys
from dataclasses import replace
from pathlib import Path

from data_pipelines.build import (
    add_image_arguments,
    add_output_arguments,
    check_output,
    image_options,
    output_options,
    print_report,
)
from data_pipelines.encode import ImageOptions
from data_pipelines.errors import DataError
from data_pipelines.inputs import Inputs, Item, ShardImage, expand_shards, shard_items
from data_pipelines.jobs import BuildOptions, BuildReport, plan_jobs, run_jobs

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


def reshard_items(
    inputs: Inputs, out: Path, options: BuildOptions, *, processes: int = 1, label: str = "reshard"
) -> BuildReport:
    """Write the items of existing shards as new ones. Raises what `build.run_jobs` does."""
    sizes = [item_bytes(item) for item in inputs.items] if options.shard_bytes is not None else None
    jobs = plan_jobs(inputs.items, options, sizes=sizes)
    return run_jobs(jobs, out, options, inputs=inputs, processes=processes, label=label)


def item_bytes(item: Item) -> int:
    """What a shard's sample takes in a tar: each member padded to blocks of 512, behind a header of one."""
    assert isinstance(item.image, ShardImage)
    return sum(512 + span.size + -span.size % 512 for _, span in item.image.members)


def parse_bytes(text: str) -> int:
    """`500MB`, `2G`, `300000`: decimal units. Raises ArgumentTypeError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMG]?)B?", text.strip(), flags=re.IGNORECASE)
    if match is None or float(match.group(1)) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write for example 500MB")
    return int(float(match.group(1)) * _UNITS[match.group(2).upper()])


def add_copy_arguments(parser: argparse.ArgumentParser, *, dry_run: bool) -> None:
    """What `reshard`, `filter` and `dedup` share: how the shards that they write are cut and what images
    become. `dry_run`: offer to write none."""
    if dry_run:
        parser.add_argument("--dry-run", action="store_true", help="count, but write nothing")
    else:
        parser.set_defaults(dry_run=False)
    add_output_arguments(parser, required=not dry_run)
    parser.add_argument(
        "--shard-size", type=parse_bytes, metavar="SIZE", help="500MB, 2G; instead of a count"
    )
    add_image_arguments(parser, copy=True)


def copy_options(args: argparse.Namespace) -> BuildOptions:
    """Raises DataError for values that make no sense."""
    image = image_options(args)
    # Nothing asked of the images: they are copied without a look, whatever their format.
    untouched = image == replace(ImageOptions(), size=None, reencode="never")
    return replace(output_options(args, image=None if untouched else image), shard_bytes=args.shard_size)


def copy_target(args: argparse.Namespace) -> tuple[Path, BuildOptions]:
    """Where the new shards go, which a dry run need not say, and how they are written. Raises DataError."""
    if args.output is None and not args.dry_run:
        raise DataError("say --output DIR for the new shards, or --dry-run")
    out = Path(args.output or os.devnull)
    check_output(out, args.paths)
    return out, copy_options(args)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", nargs="+", metavar="PATH", help="shards, folders or brace patterns of them")
    add_copy_arguments(parser, dry_run=False)


def run(args: argparse.Namespace) -> int:
    out, options = copy_target(args)
    inputs = shard_items(expand_shards(args.paths))
    print(inputs.described, file=sys.stderr)
    report = reshard_items(inputs, out, options, processes=args.processes)
    print_report(report, out)
    return 0 if report.samples else 1
