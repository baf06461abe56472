"""Arguments that the commands that write shards share."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from data_pipelines.building.output import REJECTS, REMOVED
from data_pipelines.building.plan import BuildOptions
from data_pipelines.building.reports import BuildReport
from data_pipelines.encode import Format, ImageOptions, Reencode
from data_pipelines.errors import DataError
from data_pipelines.parallel import default_processes
from data_pipelines.rights import EMPTY, load_removal_list


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


_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


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
