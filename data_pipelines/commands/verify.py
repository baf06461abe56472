"""`clipstack data verify`: list what is wrong with shards, and save what can be saved."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from data_pipelines.commands.arguments import check_output
from data_pipelines.errors import DataError
from data_pipelines.images import MAX_IMAGE_PIXELS
from data_pipelines.inputs.shards import expand_shards
from data_pipelines.parallel import default_processes
from data_pipelines.verify import ShardCheck, VerifyOptions, summary, verify


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", nargs="+", metavar="PATH", help="shards, folders or brace patterns of them")
    parser.add_argument(
        "--decode",
        default="all",
        metavar="all|none|SHARE",
        type=_decode_every,
        help="images to decode; 0.1 means every tenth (default: all)",
    )
    parser.add_argument(
        "--max-pixels",
        type=int,
        default=MAX_IMAGE_PIXELS,
        metavar="N",
        help="an image of more pixels is a finding (default: %(default)s)",
    )
    parser.add_argument("--repair", metavar="DIR", help="write the sound samples there, as new shards")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    parser.add_argument(
        "--processes", type=int, default=default_processes(), metavar="N", help="(default: all cores)"
    )


def run(args: argparse.Namespace) -> int:
    tars = expand_shards(args.paths)
    repair = None if args.repair is None else Path(args.repair)
    if repair is not None:
        _check_repair_folder(repair, tars, args.paths)
    options = VerifyOptions(decode_every=args.decode, max_pixels=args.max_pixels)
    checks = verify(tars, options, repair=repair, processes=args.processes)
    if repair is not None:
        try:
            (repair / "repair.json").write_text(json.dumps(summary(checks), indent=2), encoding="utf-8")
        except OSError as error:
            raise DataError(f"--repair {repair}: cannot be written: {error.strerror}") from error
    if args.json:
        print(json.dumps(summary(checks), indent=2))
    else:
        _print(checks, repair)
    return 1 if any(check.findings for check in checks) else 0


def _check_repair_folder(repair: Path, tars: Sequence[Path], paths: Sequence[str]) -> None:
    check_output(repair, paths, option="--repair")
    if repair.is_dir() and any(repair.glob("*.tar")):
        raise DataError(f"--repair {repair}: has shards already; name a new folder")
    again = [name for name, count in Counter(tar.name for tar in tars).items() if count > 1]
    if again:
        raise DataError(f"--repair: {again[0]} is the name of several shards; repair them one by one")


def _print(checks: Sequence[ShardCheck], repair: Path | None) -> None:
    for check in checks:
        for finding in check.findings:
            where = f"/{finding.key}" if finding.key else ""
            at = f" (byte {finding.offset})" if finding.offset is not None else ""
            print(f"{finding.shard}{where}: {finding.kind}: {finding.detail}{at}")
    total = summary(checks)
    if not total["findings"]:
        print(f"sound: {total['samples']} samples in {total['shards']} shards")
        return
    print(
        f"{len(total['findings'])} findings in {total['damaged_shards']} of {total['shards']} shards; "
        f"{total['sound']} of {total['samples']} samples are sound"
    )
    if repair is not None:
        print(f"{repair}: {total['repaired']} samples saved; what was lost is in {repair / 'repair.json'}")


def _decode_every(text: str) -> int:
    if text in ("all", "none"):
        return int(text == "all")
    share = float(text)
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError("must be all, none or a share in (0, 1]")
    return round(1 / share)
