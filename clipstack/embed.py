"""`clipstack embed`: bulk image and text embeddings of shards."""

from __future__ import annotations

import argparse
from pathlib import Path

from clipstack.evaluation.arguments import EMBED_DTYPES, add_model_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--data", required=True, metavar="PATH", help="shards: file, folder, pattern or URL")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="folder to write or to go on in"
    )
    parser.add_argument(
        "--dtype", choices=EMBED_DTYPES, default="fp16", help="of the stored numbers (default: fp16)"
    )
    parser.add_argument(
        "--only", choices=("images", "texts"), help="one side alone; images need no captions (default: both)"
    )


def run(args: argparse.Namespace) -> int:
    """`clipstack embed`. Raises ClipstackError."""
    from clipstack.evaluation.embedding import embed

    return embed(args)
