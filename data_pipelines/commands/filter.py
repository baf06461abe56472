"""`clipstack data filter`: keep the samples that rules ask for."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace

import polars as pl

from data_pipelines.building.reshard import reshard_items
from data_pipelines.commands.arguments import add_copy_arguments, copy_target, print_report
from data_pipelines.errors import DataError
from data_pipelines.files import write_text
from data_pipelines.filter import PRESETS, Selection, rule_expression, select, with_language
from data_pipelines.inputs.shards import expand_shards
from data_pipelines.shard_rows import FRAME_SCHEMA, ShardRows, read_rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", nargs="+", metavar="PATH", help="shards, folders or brace patterns of them")
    parser.add_argument(
        "--rule",
        action="append",
        default=[],
        metavar="SQL",
        help="a condition that samples must meet, as in 'caption_words > 2 and width > 99'; repeatable; "
        f"columns: {', '.join(name for name in FRAME_SCHEMA if name != 'place')}",
    )
    parser.add_argument("--preset", choices=sorted(PRESETS), help="a known set of rules")
    parser.add_argument(
        "--any-language", action="store_true", help="leave the preset's rule on the language out"
    )
    add_copy_arguments(parser, dry_run=True)


def run(args: argparse.Namespace) -> int:
    rules = [*(PRESETS[args.preset] if args.preset else ()), *args.rule]
    if args.any_language:
        rules = [rule for rule in rules if not rule.startswith("language ")]
    if not rules:
        raise DataError("nothing to filter by: give --rule or --preset")
    for rule in rules:  # before the long part
        rule_expression(rule, pl.DataFrame(schema=FRAME_SCHEMA))
    out, options = copy_target(args)
    tars = expand_shards(args.paths)
    rows = read_rows(tars, phash=False, processes=args.processes, label="filter")
    frame = with_language(rows.frame) if any("language" in rule for rule in rules) else rows.frame
    selection = select(frame, rules)
    print(format_selection(selection, rows))
    if args.dry_run:
        return 0
    if not selection.places:
        raise DataError("no sample meets all rules; nothing was written")
    languages = dict(zip(frame["place"].to_list(), frame["language"].to_list(), strict=True))
    items = [
        replace(
            rows.inputs.items[place],
            columns={**rows.inputs.items[place].columns, "language": languages[place]},
        )
        for place in selection.places
    ]
    inputs = replace(rows.inputs, items=items, stamp=f"{rows.inputs.stamp}\n{json.dumps(rules)}")
    report = reshard_items(inputs, out, options, processes=args.processes, label="filter: write")
    write_text(
        out / "filter.json",
        json.dumps(
            {
                "samples": selection.samples,
                "kept": len(selection.places),
                "rules": [asdict(count) for count in selection.counts],
            },
            indent=2,
        ),
    )
    print_report(report, out)
    return 0


def format_selection(selection: Selection, rows: ShardRows) -> str:
    lines = [f"{'met by':>12} {'alone drops':>12}  rule"]
    for count in selection.counts:
        lines.append(f"{count.passed:>12,} {count.only_this_dropped:>12,}  {count.rule}")
    share = f" ({len(selection.places) / selection.samples:.1%})" if selection.samples else ""
    lines.append(f"keeps {len(selection.places):,} of {selection.samples:,}{share}")
    if rows.unusable:
        lines.append(f"{len(rows.unusable):,} more have no image that can be read and are dropped")
    return "\n".join(lines)
