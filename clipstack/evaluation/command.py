"""What `clipstack eval` does: the model, the data, one of the four tasks, and the report."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from clipstack.checkpoint import LoadedModel, load_model
from clipstack.errors import ConfigError
from clipstack.evaluation.compositional_task import compositional_report
from clipstack.evaluation.data import Captions, EvalData, open_eval_data
from clipstack.evaluation.page import write_page
from clipstack.evaluation.probe_task import probe_report
from clipstack.evaluation.report import Report, check_writable, table, write_json
from clipstack.evaluation.retrieval_task import retrieval_report
from clipstack.evaluation.task import Setup
from clipstack.evaluation.zero_shot_task import Prompts, zero_shot_report
from clipstack.templates import load_templates
from clipstack.world import World, joined_world

DEFAULT_TEMPLATES = "simple"


def evaluate(args: argparse.Namespace) -> int:
    """args: of `clipstack.evaluate`. Returns the exit code. Raises ClipstackError."""
    check_writable("--json", args.json)  # before the work, not after it
    check_writable("--html", args.html)
    with joined_world(args.device) as world, torch.no_grad():
        loaded = load_model(args.model, pretrained=args.pretrained, device=world.device)
        _warn_of_random_weights(loaded, world)
        setup = Setup(loaded, world, batch_size=args.batch_size, workers=args.workers)
        report, data = _evaluate(setup, args)
        if world.is_main:
            print(table(report))
            if args.json is not None:
                write_json(args.json, report)
            if args.html is not None:
                write_page(args.html, report, None if data is None else data.samples)
    return 0


def _evaluate(setup: Setup, args: argparse.Namespace) -> tuple[Report, EvalData | None]:
    """The report, and the data that its examples come from. Collective."""
    if args.task == "compositional":
        path = Path(args.data)
        folder = args.images or (path if path.is_dir() else path.parent)
        return compositional_report(setup, path, folder), None
    captions: Captions = "required" if args.task == "retrieval" else "ignored"
    data = open_eval_data(args.data, captions=captions, split=args.split, classnames=args.classnames)
    match args.task:
        case "zeroshot":
            return zero_shot_report(setup, data, _prompts(args.templates, data)), data
        case "retrieval":
            return retrieval_report(setup, data), data
        case "probe":
            if args.train_data is None:
                raise ConfigError("--task probe: give --train-data PATH, labelled samples to learn from")
            train = open_eval_data(args.train_data, captions="ignored", split="train")
            return probe_report(
                setup, train, data, neighbours=args.neighbours, inverse_penalty=args.inverse_penalty
            ), data
    raise AssertionError(args.task)  # argparse allows no other


def _prompts(given: str | None, data: EvalData) -> Prompts:
    if given is None and data.templates is not None:
        return Prompts("the data set's own", data.templates)
    name = given or DEFAULT_TEMPLATES
    return Prompts(name, load_templates(name))


def _warn_of_random_weights(loaded: LoadedModel, world: World) -> None:
    if loaded.is_random and world.is_main:
        print(
            f"warning: --model {loaded.name} without --pretrained has random weights: expect chance",
            file=sys.stderr,
        )
