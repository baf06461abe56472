"""`clipstack data stats`: how many, how large, how alike, whose: what is in shards, as a table, JSON or a
page."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from data_pipelines.inputs.shards import expand_shards
from data_pipelines.parallel import default_processes
from data_pipelines.shard_rows import read_rows
from data_pipelines.stats import Stats, compute_stats, share_tables


def format_stats(stats: Stats) -> str:
    """For a terminal."""
    lines = [
        f"samples             {stats.samples:,} in {stats.shards:,} shards",
        f"image bytes         {stats.image_bytes / 1e6:,.1f} MB",
        f"duplicate images    {_part(stats.duplicate_images, stats.samples)}",
        f"duplicate captions  {_part(stats.duplicate_captions, stats.samples)}",
    ]
    if stats.duplicate_looks is not None:
        lines.append(f"equal to the eye    {_part(stats.duplicate_looks, stats.samples)}  (perceptual hash)")
    if stats.without_caption:
        lines.append(f"without a caption   {_part(stats.without_caption, stats.samples)}")
    if stats.unusable:
        lines.append(f"unusable            {stats.unusable:,}: `clipstack data verify` says why")
    heads = ["least", "5 %", "median", "95 %", "most", "mean"]
    lines += ["", f"{'':<20}" + "".join(f"{head:>10}" for head in heads)]
    for name, spread in stats.spreads.items():
        values = (*spread.quantiles, spread.mean)
        lines.append(f"{name:<20}" + "".join(f"{_number(value):>10}" for value in values))
    for title, shares in share_tables(stats):
        missing = f", {_part(shares.missing, stats.samples)} without" if shares.missing else ""
        known = f"{shares.distinct:,} different{missing}" if shares.distinct else "none known"
        lines += ["", f"{title}: {known}"]
        lines += [f"  {count:>9,}  {name[:80]}" for name, count in shares.top]
    return "\n".join(lines)


def _part(count: int, total: int) -> str:
    return f"{count:,} ({count / total:.1%})" if total else f"{count:,}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 1000 else f"{value:,.2f}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", nargs="+", metavar="PATH", help="shards, folders or brace patterns of them")
    parser.add_argument("--html", metavar="FILE", help="write a page with histograms and sample images")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument(
        "--processes", type=int, default=default_processes(), metavar="N", help="(default: all cores)"
    )


def run(args: argparse.Namespace) -> int:
    tars = expand_shards(args.paths)
    rows = read_rows(tars, phash=False, processes=args.processes, label="stats")
    stats = compute_stats(rows, num_shards=len(tars))
    print(json.dumps(asdict(stats)) if args.json else format_stats(stats))
    if args.html:
        from data_pipelines.stats_page import write_page

        write_page(Path(args.html), stats, rows, title=_title(args.paths))
    return 0


def _title(paths: Sequence[str]) -> str:
    names = [Path(path).name or path for path in paths]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
