"""Evaluation of a model on data: what training calls at its cadence, and the `clipstack eval` command."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from clipstack.config import EvalConfig, Recipe
from clipstack.features import Encoder, Features, encode_all, encode_tokens, logit_scale_of
from clipstack.loader import EvalLoader, ShardSamples
from clipstack.preprocess import Preprocess
from clipstack.retrieval import retrieval_metrics, retrieval_ranks
from clipstack.templates import load_templates, read_lines
from clipstack.world import World
from clipstack.zero_shot import classifier, outcomes, zero_shot_metrics

MAX_RETRIEVAL_IN_TRAINING = 20_000
"""Validation sets with more images than this are not searched while training waits; `clipstack eval` does."""

CLASSNAMES_FILE = "classnames.txt"


@torch.no_grad()
def validate(encoder: Encoder, preprocess: Preprocess, recipe: Recipe, world: World) -> dict[str, float]:
    """One line of eval.jsonl, in the names of `clipstack eval --json`; {} without `data.val`. Collective.

    Always `n`, `bad_samples` and, where there are captions, `clip_loss`; zero-shot classification where
    samples have classes and their names are known; retrieval where samples have captions and are not too
    many.
    """
    if recipe.data.val is None:
        return {}
    paths = (recipe.data.val,) if isinstance(recipe.data.val, str) else recipe.data.val
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
        values["clip_loss"] = clip_loss(features, scale, batch_size=recipe.train.batch_size)
    classnames = _classnames_of(recipe.eval, paths)
    if classnames is not None and bool((features.label >= 0).any()):
        values |= _classify(encoder, features, classnames, recipe.eval.templates, scale, preprocess, world)
    if _is_searchable(features) and len(features.sample) <= MAX_RETRIEVAL_IN_TRAINING:
        values |= retrieval_metrics(
            retrieval_ranks(features.images, features.texts, features.owner, world=world)
        )
    return values


def caption_lines(stored: tuple[str, ...]) -> tuple[str, ...]:
    """The captions of a sample: its stored texts, each line of them one caption, as CLIP_benchmark reads
    them."""
    return tuple(line for text in stored for line in text.splitlines() if line.strip())


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


def _classnames_of(config: EvalConfig, paths: Sequence[str]) -> tuple[str, ...] | None:
    if config.classnames is not None:
        return read_lines(config.classnames, key="eval.classnames")
    for path in paths:
        where = Path(path)
        beside = (where if where.is_dir() else where.parent) / CLASSNAMES_FILE
        if beside.is_file():
            return read_lines(beside, key="data.val")
    return None


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


def _is_searchable(features: Features) -> bool:
    """Whether every image has a caption, and there is one at all."""
    return len(features.texts) > 0 and len(torch.unique_consecutive(features.owner)) == len(features.sample)
