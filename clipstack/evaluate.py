"""Evaluation of a model on data: what training calls at its cadence, and the `clipstack eval` command."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from clipstack.checkpoint import LoadedModel, load_model
from clipstack.config import Recipe
from clipstack.errors import ConfigError
from clipstack.eval_data import Captions, EvalData, find_classnames, folders_beside, open_eval_data
from clipstack.eval_page import write_page
from clipstack.eval_report import Report, check_writable, table, write_json
from clipstack.eval_tasks import (
    Prompts,
    Setup,
    caption_lines,
    compositional_report,
    probe_report,
    retrieval_report,
    zero_shot_report,
)
from clipstack.features import Encoder, Features, encode_all, encode_tokens, logit_scale_of
from clipstack.launch import joined_world
from clipstack.loader import EvalLoader, ShardSamples
from clipstack.preprocess import Preprocess
from clipstack.retrieval import RETRIEVAL_METRICS, retrieval_metrics, retrieval_ranks
from clipstack.templates import load_templates
from clipstack.world import World
from clipstack.zero_shot import ZERO_SHOT_METRICS, classifier, outcomes, zero_shot_metrics

TASKS = ("zeroshot", "retrieval", "probe", "compositional")
DEFAULT_TEMPLATES = "simple"

MAX_RETRIEVAL_IN_TRAINING = 20_000
"""Validation sets with more images than this are not searched while training waits; `clipstack eval` does."""

MAX_LOSS_BATCH = 8192
"""Larger training batches are compared at this size: the matrix of one batch then takes 256 MiB."""


@torch.no_grad()
def validate(encoder: Encoder, preprocess: Preprocess, recipe: Recipe, world: World) -> dict[str, float]:
    """One line of eval.jsonl, in the names of `clipstack eval --json`; {} without `data.val`. Collective.

    Always `n`, `bad_samples` and, where there are captions, `clip_loss`; zero-shot classification where
    samples have classes and their names are known; retrieval where samples have captions and are not too
    many.
    """
    paths = recipe.data.val_paths
    if not paths:
        return {}
    # A damaged validation sample is counted and left out; it must not end a training run.
    config = recipe.data.model_copy(update={"max_bad_fraction": 1.0})
    samples = ShardSamples(paths, config, captions="optional")
    loader = EvalLoader(
        samples, config=config, preprocess=preprocess, batch_size=recipe.eval.batch_size, world=world
    )
    try:
        features = encode_all(encoder, loader, preprocess=preprocess, world=world, captions=caption_lines)
    finally:
        loader.close()
    values: dict[str, float] = {"n": len(features.sample), "bad_samples": count_bad(loader, world)}
    scale = logit_scale_of(encoder, preprocess, world)
    if len(features.texts):
        size = min(recipe.train.batch_size, MAX_LOSS_BATCH)
        values["clip_loss"] = clip_loss(features, scale, batch_size=size)
    classnames = _classnames(recipe, paths)
    if classnames is not None and _has_known_class(features, len(classnames)):
        values |= _classify(encoder, features, classnames, recipe.eval.templates, scale, preprocess, world)
    if _is_searchable(features) and len(features.sample) <= MAX_RETRIEVAL_IN_TRAINING:
        values |= retrieval_metrics(
            retrieval_ranks(features.images, features.texts, features.owner, world=world)
        )
    return values


def possible_metrics(recipe: Recipe) -> list[str]:
    """What `validate` can give, of what a checkpoint may be the best by; what it does give depends on the
    samples' classes and captions. Raises DataError where data.val cannot be read, ConfigError where
    eval.classnames cannot."""
    paths = recipe.data.val_paths
    if not paths:
        return []
    samples = ShardSamples(paths, recipe.data, captions="optional")
    names = ["clip_loss"]
    if _classnames(recipe, paths) is not None:
        names += ZERO_SHOT_METRICS
    if samples.num_samples <= MAX_RETRIEVAL_IN_TRAINING:
        names += RETRIEVAL_METRICS
    return names


def lower_is_better(metric: str) -> bool:
    return metric in ("clip_loss", "ece") or metric.endswith("_median_rank")


def _classnames(recipe: Recipe, paths: Sequence[str]) -> Sequence[str] | None:
    beside = [folder for path in paths for folder in folders_beside(path)]
    return find_classnames(recipe.eval.classnames, beside, key="eval.classnames")


def count_bad(loader: EvalLoader, world: World) -> int:
    """Samples that could not be used, over all ranks; what is known before reading counts once.
    Collective."""
    known = len(loader.samples.damage)
    met = torch.tensor(len(loader.bad) - known, device=world.device)
    return known + int(world.all_reduce(met))


def clip_loss(features: Features, logit_scale: float, *, batch_size: int) -> float:
    """The plain CLIP loss in nats, the mean over batches of the size that training uses.

    Batches are drawn in one fixed shuffled order, since neighbours in shards may share a class; an incomplete
    last batch is left out unless it is the only one. Of several captions the first is used.
    """
    with_text = torch.unique_consecutive(features.owner)
    first = torch.searchsorted(features.owner, with_text)
    images, texts = features.images[with_text], features.texts[first]
    shuffled = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).to(images.device)
    whole = len(images) // batch_size * batch_size or len(images)
    losses = [
        _batch_loss(images[rows], texts[rows], logit_scale)
        for rows in torch.split(shuffled[:whole], batch_size)
    ]
    return float(torch.stack(losses).mean())


def _batch_loss(images: Tensor, texts: Tensor, logit_scale: float) -> Tensor:
    logits = logit_scale * images @ texts.T
    target = torch.arange(len(images), device=images.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def _classify(
    encoder: Encoder,
    features: Features,
    classnames: Sequence[str],
    templates: str,
    logit_scale: float,
    preprocess: Preprocess,
    world: World,
) -> dict[str, float]:
    matrix = classifier(
        lambda tokens: encode_tokens(encoder, tokens, world),
        preprocess.tokenize,
        classnames,
        load_templates(templates),
    )
    known = (features.label >= 0) & (features.label < len(classnames))
    result = outcomes(features.images[known], matrix, features.label[known], logit_scale=logit_scale)
    return {
        **zero_shot_metrics(result, len(classnames)),
        "labels_out_of_range": int((features.label >= len(classnames)).sum()),
    }


def _has_known_class(features: Features, num_classes: int) -> bool:
    return bool(((features.label >= 0) & (features.label < num_classes)).any())


def _is_searchable(features: Features) -> bool:
    """Whether every image has a caption, and there is one at all."""
    return len(features.texts) > 0 and len(torch.unique_consecutive(features.owner)) == len(features.sample)


# ---- The command ----


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
    parser.add_argument("--neighbours", type=_positive, default=20, help="probe: k of k-NN (default: 20)")
    parser.add_argument(
        "--inverse-penalty",
        type=_positive_real,
        default=0.316,
        help="probe: scikit-learn's C (default: 0.316)",
    )
    parser.add_argument("--images", type=Path, metavar="DIR", help="compositional: folder of the images")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """What every command that runs a model over data takes."""
    parser.add_argument("--model", required=True, metavar="M", help="run, exported folder or open_clip name")
    parser.add_argument(
        "--pretrained", metavar="TAG|FILE", help="weights of an open_clip name: its tag or a file"
    )
    parser.add_argument("--device", help="cpu or cuda (default: a GPU where there is one)")
    parser.add_argument("--batch-size", type=_positive, default=64, help="images at once (default: 64)")
    parser.add_argument(
        "--workers", type=_not_negative, default=2, help="loader processes a rank (default: 2)"
    )
    # Launchers add it; the environment says the same.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    """`clipstack eval`. Raises ClipstackError."""
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


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}: must be 1 or more")
    return value


def _not_negative(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value}: must be 0 or more")
    return value


def _positive_real(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{value}: must be above 0")
    return value


if __name__ == "__main__":  # deepspeed --module clipstack.evaluate ...
    from clipstack.cli import main

    sys.exit(main(["eval", *sys.argv[1:]]))
