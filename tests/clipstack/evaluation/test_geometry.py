"""Alignment, uniformity and modality gap against their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import normalize

from clipstack.evaluation.geometry import alignment, modality_gap, uniformity


def test_they_equal_their_definitions() -> None:
    rng = torch.Generator().manual_seed(0)
    images = normalize(torch.randn(50, 8, generator=rng, dtype=torch.float64), dim=1)
    owner = torch.arange(80) % 50
    texts = normalize(torch.randn(80, 8, generator=rng, dtype=torch.float64), dim=1)
    pairs = torch.pdist(images)
    assert uniformity(images, tile=7) == pytest.approx(math.log(torch.exp(-2 * pairs**2).mean()), abs=1e-10)
    distances = (images[owner] - texts).norm(dim=1)
    assert alignment(images, texts, owner) == pytest.approx(float((distances**2).mean()), abs=1e-12)
    assert modality_gap(images, texts) == pytest.approx(
        float((images.mean(0) - texts.mean(0)).norm()), abs=1e-12
    )


def test_one_point_is_the_least_uniform() -> None:
    assert uniformity(torch.tensor([[1.0, 0.0]] * 9)) == pytest.approx(0.0, abs=1e-9)
