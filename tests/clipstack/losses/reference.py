"""The definitions, slowly: whole matrices of pairs, one anchor after another, float64. Shares no code with
what it tests.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def anchor_loss(
    positive: Tensor, negatives: Tensor, scale: Tensor, config: dict[str, Any], extra: Tensor | None = None
) -> Tensor:
    """The loss of one anchor from its scaled logits. Formulas as in the papers, in linear space where float64
    allows.
    """
    if extra is not None:
        negatives = torch.cat([negatives, extra])
    number = len(negatives)
    if number == 0:
        return 0.0 * positive
    beta = config.get("beta", 0.0)
    hardness = beta * negatives if config.get("beta_mode", "logit") == "logit" else beta * negatives / scale
    weights = number * torch.softmax(hardness, 0)
    if config.get("detach_weights", False):
        weights = weights.detach()
    shift = torch.maximum(positive, negatives.max()).detach()
    sampled = (weights * (negatives - shift).exp()).sum()
    tau_plus = config.get("tau_plus", 0.1 if config["name"] == "debiased" else 0.0)
    if tau_plus > 0:
        sampled = (sampled - tau_plus * number * (positive - shift).exp()) / (1 - tau_plus)
        sampled = torch.maximum(sampled, (number * (-scale - shift).exp()).detach())
    alpha = 0.0 if config["name"] == "dcl" else config.get("alpha", 1.0)
    loss = (alpha * (positive - shift).exp() + sampled).log() + shift - positive
    smoothing = config.get("label_smoothing", 0.0)
    return loss + smoothing * (positive - (positive + negatives.sum()) / (number + 1))


def is_duplicate(row: int, col: int, ids: Tensor | None) -> bool:
    return ids is not None and bool((ids[row] == ids[col]).any())


def softmax_loss(
    image: Tensor, text: Tensor, logit_scale: Tensor, config: dict[str, Any], ids: Tensor | None = None
) -> Tensor:
    """Mean over the 2N anchors."""
    scale = logit_scale.exp()
    losses = []
    for rows, cols in ((image, text), (text, image)):
        logits = scale * rows @ cols.T
        for i in range(len(rows)):
            allowed = [j for j in range(len(cols)) if j != i and not is_duplicate(i, j, ids)]
            losses.append(anchor_loss(logits[i, i], logits[i, allowed], scale, config))
    return torch.stack(losses).mean()


def sigmoid_loss(
    image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor, ids: Tensor | None = None
) -> Tensor:
    """Sum over the pairs, divided by N."""
    logits = logit_scale.exp() * image @ text.T + logit_bias
    total = torch.zeros_like(logit_scale)
    for i in range(len(image)):
        for j in range(len(text)):
            if i == j or not is_duplicate(i, j, ids):
                total = total + torch.nn.functional.softplus(
                    -logits[i, j] if i == j else logits[i, j], threshold=math.inf
                )
    return total / len(image)
