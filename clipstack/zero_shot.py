"""Zero-shot classification as pure functions on features: the classifier, each sample's outcome, the
metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from clipstack.templates import fill

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]

PROMPTS_PER_CALL = 256
"""About so many prompts are encoded at once: fixed, so that every rank and every world size does the same
sums."""

ZERO_SHOT_METRICS = (
    "top1", "top5", "mean_per_class_recall", "balanced_accuracy", "balanced_accuracy_adjusted", "ece",
)  # fmt: skip

NUM_BINS = 15
"""Of the reliability curve: https://arxiv.org/abs/1706.04599, section 3."""


def classifier(
    encode_text: Callable[[Tensor], Tensor],
    tokenizer: Callable[[list[str]], Tensor],
    classnames: Sequence[str],
    templates: Sequence[str],
) -> Tensor:
    """(D, C): of each class the mean of its templates' unit-norm embeddings, unit-norm again.

    `encode_text` takes (N, L) int64 tokens to (N, D) unit-norm. https://arxiv.org/abs/2103.00020, section
    3.1.4. Raises ValueError without class names or templates.
    """
    if not classnames or not templates:
        raise ValueError(
            f"{len(classnames)} classnames and {len(templates)} templates: one of each is needed"
        )
    columns = []
    for some in _in_batches(classnames, max(1, PROMPTS_PER_CALL // len(templates))):
        prompts = [fill(template, name) for name in some for template in templates]
        # An ensemble of hundreds of templates is more than one call of a single class.
        parts = [
            encode_text(tokenizer(prompts[start : start + PROMPTS_PER_CALL]))
            for start in range(0, len(prompts), PROMPTS_PER_CALL)
        ]
        features = torch.cat(parts)
        features = features.view(len(some), len(templates), -1)  # (classes, templates, D)
        columns.append(F.normalize(features.mean(dim=1), dim=-1))
    return torch.cat(columns).T.contiguous()


def _in_batches(items: Iterable[str], size: int) -> Iterable[list[str]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


class Outcomes(NamedTuple):
    """What became of each of N samples."""

    label: Int64
    """(N,) true class"""
    predicted: Int64
    """(N,) most similar class; of equally similar ones the first"""
    rank: Int64
    """(N,) how many classes come before the true one: 0 is a hit"""
    confidence: Float64
    """(N,) softmax probability of the predicted class"""


def outcomes(images: Tensor, classifier: Tensor, labels: Tensor, *, logit_scale: float) -> Outcomes:
    """images (N, D) unit-norm, classifier (D, C), labels (N,) int64 in [0, C); logit_scale: the factor, not
    its log."""
    cosine = images @ classifier  # (N, C)
    true = cosine.gather(1, labels[:, None])  # (N, 1)
    earlier = torch.arange(cosine.shape[1], device=cosine.device) < labels[:, None]  # (N, C)
    rank = (cosine > true).sum(dim=1) + ((cosine == true) & earlier).sum(dim=1)
    confidence = (cosine.double() * logit_scale).softmax(dim=1).amax(dim=1)
    return Outcomes(*(part.cpu().numpy() for part in (labels, cosine.argmax(dim=1), rank, confidence)))


def top_k_accuracy(rank: Int64, k: int) -> float:
    """Share of samples whose true class is among the k most similar ones."""
    return float((rank < k).mean())


def per_class_recall(label: Int64, rank: Int64, num_classes: int) -> Float64:
    """(C,) share of hits among the samples of each class; NaN for a class without samples."""
    support = np.bincount(label, minlength=num_classes)
    hits = np.bincount(label[rank == 0], minlength=num_classes)
    recall: Float64 = np.divide(hits, support, out=np.full(num_classes, np.nan), where=support > 0)
    return recall


def mean_per_class_recall(label: Int64, rank: Int64, num_classes: int) -> float:
    """The mean over the classes that occur: scikit-learn's balanced_accuracy_score."""
    return float(np.nanmean(per_class_recall(label, rank, num_classes)))


def adjusted_balanced_accuracy(recall: float, num_present: int) -> float:
    """Mean per-class recall on a scale where guessing is 0 and perfection 1; NaN for a single class."""
    chance = 1 / num_present
    return float("nan") if num_present == 1 else (recall - chance) / (1 - chance)


def confusion_matrix(label: Int64, predicted: Int64, num_classes: int) -> Int64:
    """(C, C) counts; rows are true classes, columns predicted ones."""
    cells = np.bincount(label * num_classes + predicted, minlength=num_classes**2)
    return cells.reshape(num_classes, num_classes)


@dataclass(frozen=True)
class Reliability:
    """How often the model was right among samples that it was about equally sure of."""

    count: tuple[int, ...]
    confidence: tuple[float, ...]
    """mean of each bin; 0 where it is empty"""
    accuracy: tuple[float, ...]

    @property
    def ece(self) -> float:
        """Expected calibration error: the mean gap, weighted by count. https://arxiv.org/abs/1706.04599, eq.
        3."""
        gaps = np.abs(np.subtract(self.accuracy, self.confidence))
        return float(np.dot(self.count, gaps) / sum(self.count))


def reliability(confidence: Float64, hit: npt.NDArray[np.bool_], *, num_bins: int = NUM_BINS) -> Reliability:
    """Equal-width bins ((i)/n, (i+1)/n] of confidence."""
    bins = np.clip(np.ceil(confidence * num_bins).astype(np.int64) - 1, 0, num_bins - 1)
    count = np.bincount(bins, minlength=num_bins)
    sums = [np.bincount(bins, weights=weights, minlength=num_bins) for weights in (confidence, hit)]
    means = [np.divide(total, count, out=np.zeros(num_bins), where=count > 0) for total in sums]
    return Reliability(tuple(count.tolist()), *(tuple(mean.tolist()) for mean in means))


def zero_shot_metrics(result: Outcomes, num_classes: int) -> dict[str, Any]:
    """The scalars of a classification, as fractions 0-1."""
    present = len(np.unique(result.label))
    recall = mean_per_class_recall(result.label, result.rank, num_classes)
    return {
        "top1": top_k_accuracy(result.rank, 1),
        "top5": top_k_accuracy(result.rank, 5),
        "mean_per_class_recall": recall,
        "balanced_accuracy": recall,
        "balanced_accuracy_adjusted": adjusted_balanced_accuracy(recall, present),
        "ece": reliability(result.confidence, result.rank == 0).ece,
    }
