"""`clipstack export`: a run, checkpoint or exported folder to a folder that open_clip loads, and to ONNX."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", type=Path, required=True, metavar="RUN", help="a run folder, a checkpoint or an export"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the folder to write")
    parser.add_argument("--onnx", action="store_true", help="also both towers as ONNX, in DIR/onnx")
    parser.add_argument(
        "--evaluation",
        type=Path,
        action="append",
        default=[],
        metavar="JSON",
        help="what clipstack eval --json wrote, for the cards; may be given several times",
    )


def loading_code(folder: Path) -> str:
    """The line of Python with which open_clip alone loads an exported folder."""
    name = f"local-dir:{folder}"
    return f"model, _, preprocess = open_clip.create_model_and_transforms({name!r})"


def run(args: argparse.Namespace) -> int:
    """`clipstack export`. Raises ClipstackError."""
    from clipstack.checkpoint import export_model, load_model
    from clipstack.checkpoint.onnx_export import export_onnx
    from clipstack.evaluation.report import read_json

    evaluations = [read_json(file) for file in args.evaluation]
    print(export_model(args.model, args.output, evaluations=evaluations))
    print(loading_code(args.output))
    if args.onnx:
        print(export_onnx(load_model(args.output).model, args.output))
    return 0
