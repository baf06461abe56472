"""`clipstack data reshard`: the same samples in other shards: cut anew, shuffled, shrunk, without those to be
removed."""

from __future__ import annotations

import argparse
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


def add_copy_arguments(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """What `reshard`, `filter` and `dedup` share: how the shards that they write are cut and what images
    become."""
    add_output_arguments(parser, required=required)
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", nargs="+", metavar="PATH", help="shards, folders or brace patterns of them")
    add_copy_arguments(parser)


def run(args: argparse.Namespace) -> int:
    out = Path(args.output)
    check_output(out, args.paths)
    options = copy_options(args)
    inputs = shard_items(expand_shards(args.paths))
    print(inputs.described, file=sys.stderr)
    report = reshard_items(inputs, out, options, processes=args.processes)
    print_report(report, out)
    return 0 if report.samples else 1
