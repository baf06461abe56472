"""`clipstack eval`: a model and data to a report."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from clipstack.evaluation.arguments import add_model_arguments, positive, positive_real

TASKS = ("zeroshot", "retrieval", "probe", "compositional")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument(
        "--data",
        required=True,
        metavar="PATH",
        help="shards (file, folder, brace pattern, URL), a CLIP_benchmark folder, an ImageFolder tree; "
        "for compositional: .jsonl, or SugarCrepe's or ARO's .json",
    )
    parser.add_argument("--task", choices=TASKS, required=True, help="what to measure")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the numbers there")
    parser.add_argument("--html", type=Path, metavar="OUT", help="write one self-contained page there")
    parser.add_argument(
        "--templates",
        metavar="NAME|FILE",
        help="prompt templates: single, simple, ensemble, openai, or a file with {} or {c} in each line; "
        "default: the data set's own, else simple",
    )
    parser.add_argument("--classnames", type=Path, metavar="FILE", help="class names, line k for class k-1")
    parser.add_argument("--split", default="test", help="folder of a CLIP_benchmark data set (default: test)")
    parser.add_argument("--train-data", metavar="PATH", help="probe: labelled data to learn from")
    parser.add_argument("--neighbours", type=positive, default=20, help="probe: k of k-NN (default: 20)")
    parser.add_argument(
        "--inverse-penalty",
        type=positive_real,
        default=0.316,
        help="probe: scikit-learn's C (default: 0.316)",
    )
    parser.add_argument("--images", type=Path, metavar="DIR", help="compositional: folder of the images")


def run(args: argparse.Namespace) -> int:
    """`clipstack eval`. Raises ClipstackError."""
    from clipstack.evaluation.command import evaluate

    return evaluate(args)


if __name__ == "__main__":  # deepspeed --module clipstack.evaluate ...
    from clipstack.cli import main

    sys.exit(main(["eval", *sys.argv[1:]]))
