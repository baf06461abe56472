"""What a step logs beside its loss. No gradients. Each rank's values are over its own anchors; their mean
over ranks is global.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pdist

from clipstack.losses.inputs import Inputs
from clipstack.losses.negatives import Negatives
from clipstack.losses.tile_math import EMPTY
from clipstack.losses.tiles import PairSums

UNIFORMITY_ROWS = 512
"""Uniformity is estimated from this many features of each rank at most: all pairs of them are compared."""


@torch.no_grad()
def pair_terms(
    inputs: Inputs, cosines: Tensor, rows: PairSums, cols: PairSums, plain: int
) -> dict[str, Tensor]:
    """Terms that every objective logs. cosines: (B',) of the positives; plain: index of the log-sum-exp at
    kappa = scale.

    alignment and uniformity are those of Wang & Isola, https://arxiv.org/abs/2005.10242, with alpha = 2 and t
    = 2.
    """
    positive = inputs.scale * cosines
    of_images = torch.logaddexp(positive, inputs.of_owner(rows.lse[:, plain])) - positive
    of_texts = torch.logaddexp(positive, cols.lse[:, plain]) - positive
    return {
        "clip_loss": 0.5 * (inputs.image_mean(of_images) + of_texts.mean()),
        "logit_scale": inputs.scale.detach().log(),
        "masked_share": _masked_share(inputs, rows),
        "positive_cosine": cosines.mean(),
        "hardest_negative_cosine": 0.5 * (_mean_hardest(rows) + _mean_hardest(cols)),
        "alignment": 2 - 2 * cosines.mean(),
        "uniformity": 0.5 * (uniformity(inputs.image, inputs.acc) + uniformity(inputs.text, inputs.acc)),
    }


def effective_count(side: Negatives, spread: tuple[int, int] | None) -> Tensor:
    """(A,): the effective number of negatives under the weights, log ESS = 2 LSE(beta z) - LSE(2 beta z)."""
    if spread is None:
        return side.count
    ess = (2 * side.lse[:, spread[0]] - side.lse[:, spread[1]]).exp()
    return torch.where(side.count > 0, ess, 0.0)


def uniformity(features: Tensor, acc: torch.dtype) -> Tensor:
    """log mean exp(-2 |x - y|^2) over the pairs of the first UNIFORMITY_ROWS features."""
    some = features[:UNIFORMITY_ROWS].detach().to(acc)
    if len(some) < 2:
        return some.new_zeros(())
    return pdist(some).square().mul(-2).exp().mean().log()


def _masked_share(inputs: Inputs, rows: PairSums) -> Tensor:
    """Share of an image's pairs with others' captions that are masked as duplicates."""
    captions = inputs.world.size * len(inputs.text)
    own = 1 if inputs.owner is None else torch.bincount(inputs.owner, minlength=len(inputs.image))
    return 1 - (rows.num_negatives / (captions - own)).mean()


def _mean_hardest(side: PairSums) -> Tensor:
    """Mean over the anchors that have negatives; 0 where none has."""
    some = side.hardest > EMPTY
    return torch.where(some, side.hardest, 0.0).sum() / some.sum().clamp(min=1)
