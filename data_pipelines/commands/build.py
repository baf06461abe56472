"""`clipstack data build`: make shards from images and captions."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import get_args

from data_pipelines.building.output import REJECTS
from data_pipelines.building.plan import plan_jobs
from data_pipelines.building.run import run_jobs
from data_pipelines.commands.arguments import (
    add_image_arguments,
    add_output_arguments,
    check_output,
    image_options,
    output_options,
    print_report,
)
from data_pipelines.errors import SampleError
from data_pipelines.inputs.collecting import collect
from data_pipelines.inputs.folders import read_lines, read_templates
from data_pipelines.inputs.items import DEFAULT_TEMPLATES, InputOptions, Layout
from data_pipelines.inputs.tables import CAPTION_NAMES, IMAGE_NAMES
from data_pipelines.rights import RIGHTS_COLUMNS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help="a folder of images, a table (.csv .tsv .json .jsonl .parquet) or shards",
    )
    add_output_arguments(parser)
    add_image_arguments(parser, copy=False)
    group = parser.add_argument_group("captions")
    group.add_argument(
        "--layout",
        choices=get_args(Layout),
        default="auto",
        help="of a folder: sidecar captions or class folders (default: as found)",
    )
    group.add_argument(
        "--templates", metavar="FILE", help="caption templates for classes, one per line, {} for the name"
    )
    group.add_argument(
        "--classnames", metavar="FILE", help="one per line, in the order of the sorted class folders"
    )
    group.add_argument(
        "--image-column", metavar="NAME", help=f"of a table (default: the first of {', '.join(IMAGE_NAMES)})"
    )
    group.add_argument(
        "--caption-column",
        metavar="NAME",
        help=f"of a table (default: the first of {', '.join(CAPTION_NAMES)})",
    )
    group.add_argument(
        "--label-column", metavar="NAME", help="of a table: whole numbers, classes for zero-shot evaluation"
    )
    group.add_argument(
        "--image-root", metavar="DIR", help="what paths in a table start from (default: the table's folder)"
    )
    group.add_argument(
        "--image-encoding",
        choices=("path", "base64"),
        default="path",
        help="what a table's text column of images holds (default: %(default)s)",
    )
    rights = parser.add_argument_group("rights, for samples that bring none")
    for name in RIGHTS_COLUMNS[:3]:
        rights.add_argument(f"--{name}", metavar="TEXT")


def run(args: argparse.Namespace) -> int:
    out = Path(args.output)
    check_output(out, args.paths)
    options = output_options(
        args,
        image=image_options(args),
        defaults={name: getattr(args, name) for name in RIGHTS_COLUMNS[:3] if getattr(args, name)},
    )
    inputs = collect(
        args.paths,
        InputOptions(
            layout=args.layout,
            templates=read_templates(args.templates) if args.templates else DEFAULT_TEMPLATES,
            classnames=read_lines(args.classnames) if args.classnames else (),
            image_column=args.image_column,
            caption_column=args.caption_column,
            label_column=args.label_column,
            image_root=args.image_root,
            image_encoding=args.image_encoding,
        ),
    )
    print(inputs.described, file=sys.stderr)
    report = run_jobs(plan_jobs(inputs.items, options), out, options, inputs=inputs, processes=args.processes)
    print_report(report, out)
    if report.samples == 0 and report.rejected:
        first = json.loads((out / REJECTS).read_text(encoding="utf-8").partition("\n")[0])
        raise SampleError(f"nothing could be used; the first, {first['origin']}: {first['reason']}")
    return 0 if report.samples else 1
