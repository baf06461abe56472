"""`clipstack data build`: its options, shared with the other commands that write shards, and the command
itself."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from data_pipelines.encode import Format, ImageOptions, Reencode
from data_pipelines.errors import DataError, SampleError
from data_pipelines.inputs import (
    CAPTION_NAMES,
    DEFAULT_TEMPLATES,
    IMAGE_NAMES,
    InputOptions,
    Layout,
    collect,
    read_lines,
    read_templates,
)
from data_pipelines.jobs import REJECTS, REMOVED, BuildOptions, BuildReport, plan_jobs, run_jobs
from data_pipelines.parallel import default_processes
from data_pipelines.rights import EMPTY, RIGHTS_COLUMNS, load_removal_list


def check_output(out: Path, paths: Sequence[str], *, option: str = "--output") -> None:
    """Raises DataError where the output lies inside an input: the next run would read its own shards."""
    for text in paths:
        source = Path(text)
        if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
            raise DataError(f"{option} {out} lies inside the input {source}; name a folder outside it")


def add_image_arguments(parser: argparse.ArgumentParser, *, copy: bool) -> None:
    """`copy`: images stay as they are unless one of these is given."""
    defaults = ImageOptions()
    size, reencode = (None, None) if copy else (defaults.size, defaults.reencode)
    unless_asked = "every image stays as it is" if copy else "%(default)s"
    group = parser.add_argument_group("images")
    group.add_argument(
        "--size",
        type=_size,
        default=size,
        metavar="PIXELS",
        help="shrink the short side to this, never enlarge; `keep`: any size stays "
        f"(default: {unless_asked})",
    )
    group.add_argument(
        "--reencode",
        choices=get_args(Reencode),
        default=reencode,
        help=f"needed: bytes that nothing has to change stay; never: all do (default: {unless_asked})",
    )
    group.add_argument(
        "--format",
        choices=get_args(Format),
        default=defaults.format,
        help="of what is re-encoded (default: %(default)s)",
    )
    group.add_argument(
        "--quality", type=int, default=defaults.quality, help="1-100, jpg and webp (default: %(default)s)"
    )
    group.add_argument(
        "--min-size",
        type=int,
        default=defaults.min_size,
        metavar="PIXELS",
        help="reject images with a shorter short side",
    )
    group.add_argument(
        "--max-aspect",
        type=float,
        default=defaults.max_aspect,
        metavar="RATIO",
        help="reject images with long / short side above this",
    )
    group.add_argument(
        "--max-pixels",
        type=int,
        default=defaults.max_pixels,
        metavar="N",
        help="reject larger images by their header (default: %(default)s)",
    )


def image_options(args: argparse.Namespace) -> ImageOptions:
    """Raises DataError for values that make no sense."""
    if not 1 <= args.quality <= 100:
        raise DataError(f"--quality {args.quality}: must be 1 to 100")
    reencode: Reencode = args.reencode or ("never" if args.size is None else "needed")
    if reencode == "never" and args.size is not None:
        raise DataError("--reencode never keeps all bytes, --size asks to shrink: add --size keep")
    return ImageOptions(
        size=args.size,
        reencode=reencode,
        format=args.format,
        quality=args.quality,
        min_size=args.min_size,
        max_aspect=args.max_aspect,
        max_pixels=args.max_pixels,
    )


def add_output_arguments(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    defaults = BuildOptions()
    group = parser.add_argument_group("output")
    group.add_argument("--output", "-o", required=required, metavar="DIR", help="folder for the new shards")
    group.add_argument(
        "--samples-per-shard",
        type=int,
        default=defaults.samples_per_shard,
        metavar="N",
        help="(default: %(default)s)",
    )
    group.add_argument(
        "--shuffle-seed", type=int, metavar="S", help="put all samples into a random order, the same for S"
    )
    group.add_argument("--prefix", default="", help="of shard names, as in `train-` for train-00000.tar")
    group.add_argument(
        "--remove", metavar="FILE", help="removal list: lines sha256:HEX, key:SHARD/KEY, url:URL"
    )
    group.add_argument(
        "--processes", type=int, default=default_processes(), metavar="N", help="(default: all cores)"
    )
    group.add_argument(
        "--no-phash", action="store_true", help="leave the perceptual hash out of the table (faster)"
    )


def output_options(args: argparse.Namespace, **changes: Any) -> BuildOptions:
    """Raises DataError for values that make no sense."""
    for name in ("samples_per_shard", "processes"):
        if getattr(args, name) < 1:
            raise DataError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be 1 or more")
    if "/" in args.prefix or "." in args.prefix:
        raise DataError(f"--prefix {args.prefix!r}: no slash and no dot, it starts a file name")
    return BuildOptions(
        samples_per_shard=args.samples_per_shard,
        shuffle_seed=args.shuffle_seed,
        prefix=args.prefix,
        phash=not args.no_phash,
        removal=load_removal_list(args.remove) if args.remove else EMPTY,
        **changes,
    )


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


def print_report(report: BuildReport, out: Path) -> None:
    print(f"{out}: {report.samples} samples in {report.shards} shards, {report.size_bytes / 1e6:.1f} MB")
    if report.removed:
        print(f"removed on request: {report.removed} (listed in {out / REMOVED})")
    if report.rejected:
        print(f"rejected: {report.rejected} (listed in {out / REJECTS})")
        for reason, count in sorted(report.reasons.items(), key=lambda pair: -pair[1]):
            print(f"  {count:6d}  {reason}")


def _size(text: str) -> int | None:
    if text == "keep":
        return None
    size = int(text)
    if size < 1:
        raise argparse.ArgumentTypeError("must be 1 or more, or `keep`")
    return size
