"""`clipstack export`: a run, checkpoint or exported folder to a folder that open_clip loads."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", type=Path, required=True, metavar="RUN", help="a run folder, a checkpoint or an export"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the folder to write")


def run(args: argparse.Namespace) -> int:
    from clipstack.checkpoint import export_model

    print(export_model(args.model, args.output))
    return 0
