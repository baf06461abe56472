"""`clipstack demo`: from nothing to a trained, examined model on a laptop CPU, said in plain words."""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from clipstack.config import Recipe, load_recipe
from clipstack.config.help import recipe_advice
from clipstack.evaluation.arguments import positive
from clipstack.recipes import shipped_recipes
from data_pipelines.one_line_parser import OneLineParser

if TYPE_CHECKING:
    from clipstack.demo.scores import Score

NUM_TEST = 1000
TRAINS_WITH = ("torch", "torchvision", "open_clip", "safetensors", "deepspeed", "webdataset", "simplejpeg")
"""Modules of the extra `train`."""


def add_arguments(parser: OneLineParser) -> None:
    parser.advice = recipe_advice
    parser.add_argument(
        "--dir", type=Path, default=Path("runs/demo"), help="where everything goes (default: %(default)s)"
    )
    parser.add_argument(
        "--ranks", type=positive, default=2, help="processes to train with (default: %(default)s)"
    )
    parser.add_argument(
        "--train-samples",
        type=positive,
        default=30_000,
        help="pictures to draw for training (default: %(default)s)",
    )
    parser.add_argument("--serve", action="store_true", help="serve the model at the end")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="recipe values, such as train.steps=100"
    )


def run(args: argparse.Namespace) -> int:
    _check_installed()
    run_dir: Path = args.dir
    data = run_dir.with_name(run_dir.name + "-data")
    lessons = _lessons(run_dir, data, args.overrides)
    _check_ranks(lessons, args.ranks)

    _say(1, f"Drawing {args.train_samples:,} pictures of coloured shapes with captions into {data}")
    _say(0, "Six pairs of colour and shape are kept out of training altogether: the test shows only those.")
    _make_data(data, args.train_samples)

    _say(
        2, f"Training a ViT and a text transformer from scratch: DeepSpeed, {args.ranks} processes, this CPU"
    )
    _say(0, "Some minutes. Interrupt it whenever you like: the same command goes on from there.")
    started = time.monotonic()
    for lesson in lessons:
        _say(0, f"{lesson.name}, {lesson.recipe.train.steps:,} steps: {lesson.about}.")
        code = _train(lesson.config, lesson.overrides, args.ranks)
        if code != 0:
            return code
    minutes = (time.monotonic() - started) / 60

    _say(3, "Examining the model on pictures whose colour and shape never met in training")
    from clipstack.checkpoint.layout import EXPORT
    from clipstack.demo.examination import examine
    from clipstack.demo.page import write_page

    examined = examine(run_dir / EXPORT, data)
    print(as_table(examined.scores))
    recipes = [lesson.recipe for lesson in lessons]
    page = write_page(
        run_dir / "report.html", run_dir, examined, recipes, num_pictures=args.train_samples, minutes=minutes
    )

    _say(4, f"Done. Open {page} to see what it learned, as pictures and curves.")
    print(_next_steps(run_dir, data))
    if args.serve:
        return subprocess.call([sys.executable, "-m", "clipstack.cli", "serve", "--model", str(run_dir)])
    return 0


def _check_installed() -> None:
    """Before minutes go into the pictures. Raises ModuleNotFoundError."""
    for name in TRAINS_WITH:
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def _check_ranks(lessons: Sequence[Lesson], ranks: int) -> None:
    """Raises ConfigError where the trainer would refuse a batch for them."""
    from clipstack.train import check_batch
    from clipstack.world import World

    for lesson in lessons:
        check_batch(lesson.recipe, World(size=ranks))


@dataclass(frozen=True)
class Lesson:
    """One training. recipe: what `config` is with `overrides`."""

    name: str
    about: str
    config: Path
    overrides: Sequence[str]
    recipe: Recipe


def _lessons(run_dir: Path, data: Path, overrides: Sequence[str]) -> tuple[Lesson, Lesson]:
    """The first, beside the run folder, and the second, which starts from its weights. Raises ConfigError."""
    first_dir = run_dir.with_name(run_dir.name + "-first")
    shards = [f"data.train={data}/train-*.tar", f"data.val={data}/val-*.tar"]

    def lesson(name: str, about: str, config: str, *own: str) -> Lesson:
        path, values = shipped_recipes()[config], [*own, *shards, *overrides]
        return Lesson(name, about, path, values, load_recipe(path, values))

    return (
        lesson(
            "First lesson", "of two things, what stands where, by colour alone",
            "demo-first", f"run.dir={first_dir}",
        ),
        lesson(
            "Second lesson", "whole captions",
            "demo", f"run.dir={run_dir}", f"model.pretrained={first_dir / 'export'}",
        ),
    )  # fmt: skip


def _say(number: int, line: str) -> None:
    print(f"\n{number}. {line}" if number else f"   {line}", flush=True)


def _make_data(folder: Path, num_train: int) -> None:
    from data_pipelines.shapes import generate

    done = folder / ".done"
    made_with = f"train {num_train} test {NUM_TEST}"
    if not done.is_file() or done.read_text(encoding="utf-8") != made_with:
        generate(folder, num_train=num_train, num_test=NUM_TEST)
        done.write_text(made_with, encoding="utf-8")


def _train(config: Path, overrides: Sequence[str], ranks: int) -> int:
    """`deepspeed clipstack/train.py` as a user would call it."""
    import torch

    launcher = Path(sys.executable).with_name("deepspeed")
    script = Path(__file__).resolve().parents[1] / "train.py"
    threads = max(1, (os.cpu_count() or 1) // ranks)
    quiet = (
        {} if torch.cuda.is_available() else {"DS_ACCELERATOR": "cpu"}
    )  # the launcher warns where it finds no GPU
    command = [
        str(launcher), "--quiet", "--num_accelerators", str(ranks), str(script), "--config", str(config),
        *overrides,
    ]  # fmt: skip
    process = subprocess.Popen(command, env={"OMP_NUM_THREADS": str(threads), **quiet, **os.environ})
    # Training saves and stops at either signal; a terminal's Ctrl-C reaches it by itself.
    before = {
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: process.terminate()),
        signal.SIGINT: signal.signal(signal.SIGINT, lambda *_: None),
    }
    try:
        return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def as_table(scores: Mapping[str, Score]) -> str:
    """Every score beside chance, for the terminal."""
    from clipstack.demo.page import MEANING

    lines = [f"\n   {'':18}{'accuracy':>9}{'chance':>9}"]
    for name, score in scores.items():
        lines.append(f"   {name:18}{score.accuracy:>9.1%}{score.chance:>9.1%}   {MEANING.get(name, '')}")
    return "\n".join(lines)


def _next_steps(run_dir: Path, data: Path) -> str:
    return f"""
   What to try next
     serve it:            clipstack serve --model {run_dir}
     ask it:              curl http://127.0.0.1:8000/v1/classify -H 'Content-Type: application/json' \\
                            -d '{{"inputs": ["a large red star"], "labels": ["red star", "blue ring"]}}'
     evaluate it again:   clipstack eval --model {run_dir} --data '{data}/val-*.tar' --task zeroshot
     look at the data:    clipstack data stats {data}
     your own pictures:   clipstack data build --help"""
