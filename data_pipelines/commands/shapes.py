"""`clipstack data shapes`: make the procedural data set."""

from __future__ import annotations

import argparse
from pathlib import Path

from data_pipelines.shapes.dataset import generate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `clipstack data shapes`."""
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the data set")
    parser.add_argument(
        "--num-train", type=int, default=30_000, help="training scenes (default: %(default)s)"
    )
    parser.add_argument("--num-test", type=int, default=1_000, help="test scenes (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of train and val (default: %(default)s)")
    parser.add_argument(
        "--test-seed", type=int, default=7_000_003, help="seed of the test splits (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """`clipstack data shapes`: write the data set and say where it lies."""
    generate(
        args.output,
        num_train=args.num_train,
        num_test=args.num_test,
        seed=args.seed,
        test_seed=args.test_seed,
    )
    print(f"{args.num_train} training scenes and {args.num_test} test scenes in {args.output}")
    return 0
