"""`clipstack data replay RUN --step N`: the images and captions that a step of a run saw."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from data_pipelines.errors import DataError
from data_pipelines.replay import describe, page, read_recipe, replay, step_ranges


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument("--step", type=int, required=True, help="optimizer step, from 1")
    parser.add_argument(
        "--html", type=Path, metavar="OUT", help="write a page with the images, as cropped and mirrored"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a line")


def run(args: argparse.Namespace) -> int:
    recipe = read_recipe(args.run)
    seen = [
        one for low, high in step_ranges(args.run, recipe, args.step) for one in replay(recipe, low, high)
    ]
    if args.html is not None:
        text = page(seen, title=f"{args.run.name}, step {args.step}")
        try:
            args.html.write_text(text, encoding="utf-8")
        except OSError as error:
            raise DataError(f"--html {args.html}: cannot be written: {error.strerror}") from error
    for one in seen:
        print(
            json.dumps(describe(one), ensure_ascii=False)
            if args.json
            else f"{one.drawn.raw.key}  {one.drawn.caption}"
        )
    return 0
