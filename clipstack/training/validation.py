"""Validation while training waits: a model and data.val to one line of eval.jsonl."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from clipstack.config import Recipe
from clipstack.evaluation.data import find_classnames, folders_beside
from clipstack.evaluation.features import Encoder, Features, encode_all, encode_tokens, logit_scale_of
from clipstack.evaluation.task import caption_lines
from clipstack.loading.eval_loader import EvalLoader, ShardSamples
from clipstack.preprocess import Preprocess
from clipstack.retrieval import RETRIEVAL_METRICS, retrieval_metrics, retrieval_ranks
from clipstack.templates import load_templates
from clipstack.world import World
from clipstack.zero_shot import ZERO_SHOT_METRICS, classifier, outcomes, zero_shot_metrics

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
    """Whether a metric of `possible_metrics` is best where it is least."""
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
