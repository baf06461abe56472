"""Metrics of zero-shot classification against scikit-learn, slow formulas and open_clip."""

from __future__ import annotations

import clipstack.torchvision_compat  # noqa: F401  isort: skip  (has to precede open_clip)
import numpy as np
import open_clip
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, top_k_accuracy_score
from torch.nn.functional import normalize

from clipstack.checkpoint import load_model
from clipstack.zero_shot import (
    adjusted_balanced_accuracy,
    classifier,
    outcomes,
    reliability,
    zero_shot_metrics,
)
from clipstack.zero_shot import confusion_matrix as our_confusion_matrix

N, C, D = 300, 7, 12


@pytest.fixture(scope="module")
def case() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    images = normalize(torch.randn(N, D, generator=rng), dim=1)
    matrix = normalize(torch.randn(D, C, generator=rng), dim=0)
    labels = torch.randint(0, C - 1, (N,), generator=rng)  # the last class never occurs
    return images, matrix, labels


def test_metrics_equal_scikit_learns(case: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    images, matrix, labels = case
    result = outcomes(images, matrix, labels, logit_scale=10.0)
    logits, predicted = (images @ matrix).numpy(), (images @ matrix).argmax(dim=1).numpy()
    metrics = zero_shot_metrics(result, C)
    everyone = list(range(C))
    assert metrics["top1"] == top_k_accuracy_score(labels, logits, k=1, labels=everyone)
    assert metrics["top5"] == top_k_accuracy_score(labels, logits, k=5, labels=everyone)
    # scikit-learn's balanced_accuracy_score warns of a predicted class that never occurs; hence by hand.
    by_hand = np.mean([(predicted[labels == k] == k).mean() for k in range(C - 1)])
    assert metrics["mean_per_class_recall"] == pytest.approx(by_hand, abs=1e-12)
    assert (
        our_confusion_matrix(result.label, result.predicted, C)
        == confusion_matrix(labels, predicted, labels=everyone)
    ).all()


def test_mean_per_class_recall_equals_balanced_accuracy_where_all_classes_occur() -> None:
    rng = torch.Generator().manual_seed(1)
    images, matrix = torch.randn(200, D, generator=rng), torch.randn(D, 4, generator=rng)
    labels = torch.arange(200) % 3 + (torch.arange(200) % 11 == 0)
    result = outcomes(images, matrix, labels, logit_scale=1.0)
    expected = balanced_accuracy_score(result.label, result.predicted)
    metrics = zero_shot_metrics(result, 4)
    assert metrics["mean_per_class_recall"] == pytest.approx(expected, abs=1e-12)
    adjusted = balanced_accuracy_score(result.label, result.predicted, adjusted=True)
    assert adjusted_balanced_accuracy(expected, 4) == pytest.approx(adjusted, abs=1e-12)


def test_calibration_error_equals_the_slow_formula(
    case: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    result = outcomes(*case[:2], case[2], logit_scale=10.0)
    hit = result.rank == 0
    ece = 0.0
    for k in range(15):
        inside = (result.confidence > k / 15) & (result.confidence <= (k + 1) / 15)
        if inside.any():
            ece += inside.mean() * abs(hit[inside].mean() - result.confidence[inside].mean())
    curve = reliability(result.confidence, hit)
    assert curve.ece == pytest.approx(ece, abs=1e-12)
    assert sum(curve.count) == N


def test_a_model_that_sees_no_difference_scores_chance() -> None:
    images, matrix = torch.ones(60, 4) / 2, torch.ones(4, 6) / 2
    result = outcomes(images, matrix, torch.arange(60) % 6, logit_scale=100.0)
    assert zero_shot_metrics(result, 6)["top1"] == pytest.approx(1 / 6)
    assert zero_shot_metrics(result, 6)["top5"] == pytest.approx(5 / 6)


@pytest.mark.parametrize("num_templates", [1, 3, 300])
def test_the_classifier_equals_open_clips(model_folders: dict, num_templates: int) -> None:
    loaded = load_model(model_folders["random"])
    names = ["red", "green", "blue"]
    templates = [f"a photo of {k} {{}}." for k in range(num_templates)]
    ours = classifier(loaded.model.encode_text, loaded.tokenizer, names, templates)
    peer = open_clip.build_zero_shot_classifier(loaded.model.towers, loaded.tokenizer, names, templates)
    assert (ours - peer).abs().max() <= 1e-6


def test_a_classifier_needs_classes_and_templates() -> None:
    for classnames, templates in (([], ["{}"]), (["cat"], [])):
        with pytest.raises(ValueError, match=f"{len(classnames)} classnames and {len(templates)} templates"):
            classifier(lambda tokens: torch.ones(len(tokens), 2), len, classnames, templates)
