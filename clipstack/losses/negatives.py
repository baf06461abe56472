"""What an anchor is compared with: the negatives of the batch, and further ones that merge into them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clipstack.losses.tiles import PairSums


@dataclass(frozen=True)
class Negatives:
    """Sums over the negatives of A anchors. lse: (A, K); count: (A,); total: (A,) the sum of cosines."""

    lse: Tensor
    count: Tensor
    total: Tensor

    @staticmethod
    def of(sums: PairSums) -> Negatives:
        return Negatives(sums.lse, sums.num_negatives, sums.total)

    def merge(self, other: Negatives) -> Negatives:
        """The union of two disjoint sets: log-sum-exp is a monoid."""
        return Negatives(
            torch.logaddexp(self.lse, other.lse), self.count + other.count, self.total + other.total
        )
