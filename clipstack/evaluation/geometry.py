"""Where features lie on the sphere: alignment, uniformity, modality gap. Pure functions on unit-norm
features."""

from __future__ import annotations

import math

import torch
from torch import Tensor

MAX_FOR_UNIFORMITY = 10_000
"""Uniformity needs all pairs; of more features than this an evenly spaced part is taken."""


def alignment(images: Tensor, texts: Tensor, owner: Tensor) -> float:
    """Mean squared distance of each caption (M, D) to its image (N, D); 0 is best.

    https://arxiv.org/abs/2005.10242, eq. 2 with alpha = 2.
    """
    return float((images[owner] - texts).double().square().sum(dim=1).mean())


def uniformity(features: Tensor, *, tile: int = 2048) -> float:
    """Log of the mean Gaussian potential of all pairs of (N, D); lower is more evenly spread, 0 is one point.

    https://arxiv.org/abs/2005.10242, eq. 3 with t = 2.
    """
    step = -(-len(features) // MAX_FOR_UNIFORMITY)
    part = features[::step].double()
    total = 0.0
    for start in range(0, len(part), tile):
        rows = part[start : start + tile]
        squared = (2 - 2 * rows @ part.T).clamp(min=0)
        total += float(torch.exp(-2 * squared).sum())
    pairs = len(part) * (len(part) - 1)
    # The diagonal, a feature and itself, adds 1 each.
    return math.log((total - len(part)) / pairs) if pairs else float("nan")


def modality_gap(images: Tensor, texts: Tensor) -> float:
    """Distance of the mean image feature to the mean text feature. https://arxiv.org/abs/2203.02053, section
    2."""
    return float((images.double().mean(dim=0) - texts.double().mean(dim=0)).norm())
