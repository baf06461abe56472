"""`clipstack data reshard`: the same samples in other shards: cut anew, shuffled, shrunk, without those to be
removed."""

from __future__ import annotations

import argparse
import sys

from data_pipelines.building.reshard import reshard_items
from data_pipelines.commands.arguments import add_copy_arguments, copy_target, print_report
from data_pipelines.inputs.shards import expand_shards, shard_items


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
