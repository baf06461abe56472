"""The arguments of every command that runs a model over data."""

from __future__ import annotations

import argparse
import math

EMBED_DTYPES = {"fp16": "float16", "fp32": "float32"}
"""What embeddings are stored as, and NumPy's name of it."""


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """What every command that runs a model over data takes."""
    parser.add_argument("--model", required=True, metavar="M", help="run, exported folder or open_clip name")
    parser.add_argument(
        "--pretrained", metavar="TAG|FILE", help="weights of an open_clip name: its tag or a file"
    )
    parser.add_argument("--device", help="cpu or cuda (default: a GPU where there is one)")
    parser.add_argument("--batch-size", type=positive, default=64, help="images at once (default: 64)")
    parser.add_argument(
        "--workers", type=not_negative, default=2, help="loader processes a rank (default: 2)"
    )
    # Launchers add it; the environment says the same.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)


def positive(text: str) -> int:
    return _at_least(1, text)


def not_negative(text: str) -> int:
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number, {least} or more") from None
    if value < least:
        raise argparse.ArgumentTypeError(f"{value}: must be {least} or more")
    return value


def positive_real(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{value}: must be above 0")
    return value
