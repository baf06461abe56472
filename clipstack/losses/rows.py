"""The family: pure functions from what an anchor sees of its negatives to its loss."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from clipstack.losses.tile_math import EMPTY


@dataclass(frozen=True)
class RowLoss:
    """Hard-negative sampling with debiasing and a weighted positive; CLIP, DCL and debiased are its corners.

    beta is that of the current step; the other fields are as in HardNegativeObjective.
    """

    beta: float = 0.0
    tau_plus: float = 0.0
    alpha: float = 1.0
    cosine: bool = False
    detach_weights: bool = False

    def kappas(self, scale: float) -> tuple[tuple[float, float], ...]:
        """(kappa, d kappa / d scale) of each log-sum-exp that `log_sampled` needs."""
        if self.beta == 0.0:
            return ((scale, 1.0),)
        if self.cosine:
            hard = scale + self.beta
            return ((hard, hard / scale if self.detach_weights else 1.0), (self.beta, 0.0))
        return (((1.0 + self.beta) * scale, 1.0 + self.beta), (self.beta * scale, self.beta))

    def log_sampled(self, lse: Tensor, count: Tensor, scale: float) -> Tensor:
        """log R_i = log sum_j w_ij exp(z_ij) over the negatives: lse (B, K), count (B,) -> (B,). EMPTY
        without negatives.
        """
        if self.beta == 0.0:
            return lse[:, 0]
        log_r = count.clamp(min=1).log() + lse[:, 0] - lse[:, 1]
        if self.detach_weights:
            through_logits = lse[:, 0] * (scale / self.kappas(scale)[0][0])
            log_r = through_logits + (log_r - through_logits).detach()
        return torch.where(count > 0, log_r, EMPTY)

    def log_debiased(self, log_r: Tensor, positive: Tensor, count: Tensor, scale: Tensor) -> Tensor:
        """log Ng_i: the share tau_plus of expected positives taken out, floored at N e^-s. No gradient at the
        floor.
        """
        if self.tau_plus == 0.0:
            return log_r
        log_n = count.clamp(min=1).log()
        shift = torch.maximum(positive, log_r).detach()
        kept = (log_r - shift).exp() - self.tau_plus * (log_n + positive - shift).exp()
        floor = (log_n - scale - shift).exp().detach()
        log_negatives = torch.maximum(kept / (1.0 - self.tau_plus), floor).log() + shift
        return torch.where(count > 0, log_negatives, EMPTY)

    def __call__(
        self,
        positive: Tensor,
        lse: Tensor,
        count: Tensor,
        scale: Tensor,
        *,
        label_smoothing: float = 0.0,
        total: Tensor | None = None,
    ) -> Tensor:
        """The loss of each anchor, (A,). An anchor without a single negative costs nothing.

        positive: (A,) scaled logits z_ii; lse: (A, K); count: (A,); scale: (). With label smoothing, the
        target is spread over the positive and all negatives, whose scaled logits sum to `total` (A,).
        """
        log_r = self.log_sampled(lse, count, scale.item())
        log_negatives = self.log_debiased(log_r, positive, count, scale)
        target = positive
        if label_smoothing > 0.0 and total is not None:
            target = (1 - label_smoothing) * positive + label_smoothing * (positive + total) / (count + 1)
        denominator = log_negatives
        if self.alpha > 0.0:
            denominator = torch.logaddexp(positive + math.log(self.alpha), log_negatives)
        return torch.where(count > 0, denominator - target, 0.0 * positive)
