"""The task zeroshot of `clipstack eval`: what share of images is taken for the class that they are of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
from torch import Tensor

from clipstack.errors import ConfigError, DataError
from clipstack.evaluation.data import EvalData
from clipstack.evaluation.features import encode_tokens, logit_scale_of
from clipstack.evaluation.intervals import bootstrap, mean_recall, percentile_interval, share
from clipstack.evaluation.report import Example, Report
from clipstack.evaluation.task import NUM_EXAMPLES, Setup, encode_data, first_reason, source_of, with_counts
from clipstack.zero_shot import (
    Outcomes,
    classifier,
    confusion_matrix,
    outcomes,
    per_class_recall,
    reliability,
    zero_shot_metrics,
)


@dataclass(frozen=True)
class Prompts:
    """name: as reports tell it; texts: templates with a placeholder each."""

    name: str
    texts: tuple[str, ...] = field(repr=False)


def zero_shot_report(setup: Setup, data: EvalData, prompts: Prompts) -> Report:
    """Zero-shot classification. Raises ConfigError without class names, DataError without a usable sample."""
    if data.classnames is None:
        raise ConfigError(
            f"--data {data.path}: no classnames.txt beside it; give --classnames FILE with one name a line"
        )
    names = data.classnames
    features, skipped = encode_data(setup, data, with_texts=False)
    known = (features.label >= 0) & (features.label < len(names))
    if not bool(known.any()):
        raise DataError(
            f"--data {data.path}: no sample has one of {len(names)} classes; "
            f"{first_reason(skipped, features, len(names))}"
        )
    matrix = class_matrix(setup, names, prompts.texts)
    scale = logit_scale_of(setup.loaded.model, setup.loaded.preprocess, setup.world)
    result = outcomes(features.images[known], matrix, features.label[known], logit_scale=scale)
    hit = result.rank == 0
    return Report(
        task="zeroshot",
        n=len(result.label),
        source=source_of(setup, data, prompts.name),
        metrics=zero_shot_metrics(result, len(names)),
        intervals=_zero_shot_intervals(result),
        skipped=with_counts(
            skipped,
            without_class=int((features.label < 0).sum()),
            labels_out_of_range=int((features.label >= len(names)).sum()),
        ),
        details={
            "classnames": list(names),
            "template_texts": list(prompts.texts),
            "logit_scale": scale,
            "reliability": reliability(result.confidence, hit).__dict__,
            "per_class": _per_class(result, names),
            "confusion": _confusion_cells(result, len(names)),
        },
        outcomes={"sample": features.sample[known].cpu().numpy(), "label": result.label, "rank": result.rank},
        examples=_zero_shot_examples(result, features.sample[known].cpu().numpy(), names),
    )


def class_matrix(setup: Setup, names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """(D, C) zero-shot classifier of the setup's model."""
    return classifier(
        lambda tokens: encode_tokens(setup.loaded.model, tokens, setup.world),
        setup.loaded.preprocess.tokenize,
        names,
        templates,
    )


def _zero_shot_intervals(result: Outcomes) -> dict[str, tuple[float, float]]:
    once = np.ones_like(result.rank)
    samples = {
        "top1": bootstrap(np.stack([result.rank < 1, once], axis=1).astype(np.int64), share),
        "top5": bootstrap(np.stack([result.rank < 5, once], axis=1).astype(np.int64), share),
        "mean_per_class_recall": bootstrap(np.stack([result.label, result.rank < 1], axis=1), mean_recall),
    }
    return {name: percentile_interval(values) for name, values in samples.items()}


def _per_class(result: Outcomes, names: Sequence[str]) -> list[dict[str, Any]]:
    support = np.bincount(result.label, minlength=len(names))
    predicted = np.bincount(result.predicted, minlength=len(names))
    hits = np.bincount(result.label[result.rank == 0], minlength=len(names))
    recall = per_class_recall(result.label, result.rank, len(names))
    return [
        {
            "class": name,
            "n": int(support[k]),
            "recall": float(recall[k]) if support[k] else None,
            "precision": float(hits[k] / predicted[k]) if predicted[k] else None,
        }
        for k, name in enumerate(names)
    ]


def _confusion_cells(result: Outcomes, num_classes: int) -> list[list[int]]:
    """[true class, predicted class, count] of every pair that occurs."""
    matrix = confusion_matrix(result.label, result.predicted, num_classes)
    return [[int(i), int(j), int(matrix[i, j])] for i, j in zip(*matrix.nonzero(), strict=True)]


def _zero_shot_examples(result: Outcomes, sample: Any, names: Sequence[str]) -> tuple[Example, ...]:
    """The surest hits and the surest misses."""
    surest = np.argsort(-result.confidence, kind="stable")
    out = []
    for is_good in (True, False):
        for row in islice((row for row in surest if (result.rank[row] == 0) == is_good), NUM_EXAMPLES):
            says = f"says {names[result.predicted[row]]} ({result.confidence[row]:.0%})"
            caption = (
                says if is_good else f"{says}, is {names[result.label[row]]} (place {result.rank[row] + 1})"
            )
            out.append(Example(int(sample[row]), caption, is_good))
    return tuple(out)
