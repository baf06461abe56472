"""Synthetic hard negatives, mixed from each anchor's hardest ones (MoCHi, https://arxiv.org/abs/2010.01028)."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.checkpoint import checkpoint

from clipstack.config.objectives import MixingTerm
from clipstack.losses.inputs import Inputs
from clipstack.losses.negatives import Negatives
from clipstack.losses.tile_math import EMPTY, Exponent
from clipstack.losses.tiles import Exclusions, Plan, tiles_of

ROWS_AT_ONCE = 256


class Mixer:
    """Makes synthetic negatives h = normalise(a n_j + (1 - a) n_k), a in (0, 1), from two of an anchor's
    top_k hardest negatives, and h = normalise(a u + (1 - a) n_j), a in (0, 0.5), from the anchor u itself and
    one of them.

    They are detached: gradients reach the anchor only through its product with them. What is drawn depends on
    the seed, the step and the anchor's place in the global batch, not on the number of ranks.
    """

    def __init__(self, config: MixingTerm) -> None:
        self._config = config
        self.step = 0

    def negatives(self, inputs: Inputs, plan: Plan) -> tuple[Negatives, Negatives]:
        """The synthetic negatives of this rank's images (B, ...) and captions (B', ...). Collective."""
        gather = inputs.world.all_gather
        sides = (
            (inputs.image, inputs.row_ids, inputs.text, inputs.col_ids),
            (inputs.text, inputs.col_ids, inputs.image, inputs.row_ids),
        )
        out = []
        for side, (anchors, anchor_ids, others, other_ids) in enumerate(sides):
            pool = gather(others.detach())
            exclusions = Exclusions(anchor_ids, gather(other_ids), inputs.tile)
            hardest = hardest_columns(anchors.detach(), pool, exclusions, self._config.top_k, inputs.acc)
            draws = self._draws(side, len(anchors), inputs)
            cosines, present = self._synthetic_cosines(anchors, pool, hardest, draws, inputs.acc)
            out.append(_sums(cosines, present, plan.exponents, inputs.scale))
        return out[0], out[1]

    def _draws(self, side: int, anchors: int, inputs: Inputs) -> Tensor:
        """(A, S, 3) uniform numbers for this rank's anchors."""
        key = np.random.SeedSequence((self._config.seed, self.step, side)).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(key[0]))
        many = self._config.count + self._config.query_count
        everyone = torch.rand(inputs.world.size * anchors, many, 3, generator=generator, dtype=torch.float64)
        own = everyone[inputs.world.rank * anchors : (inputs.world.rank + 1) * anchors]
        return own.to(device=inputs.image.device, dtype=inputs.acc)

    def _synthetic_cosines(
        self, anchors: Tensor, pool: Tensor, hardest: tuple[Tensor, Tensor], draws: Tensor, acc: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """(cosines (A, S) of each anchor with its own synthetic negatives, (A,) whether it has any)."""
        columns, found = hardest
        last = (found - 1).clamp(min=0)[:, None, None]
        picks = torch.minimum((draws[:, :, :2] * found[:, None, None]).long(), last)
        first, second = (columns.gather(1, picks[:, :, k]) for k in (0, 1))
        parts = []
        for part in (slice(i, i + ROWS_AT_ONCE) for i in range(0, len(anchors), ROWS_AT_ONCE)):
            # Checkpointed: the (rows, S, D) mixtures are made again in the backward pass, not kept.
            parts.append(
                checkpoint(
                    self._mix_and_compare, anchors[part], pool, first[part], second[part], draws[part, :, 2],
                    acc, use_reentrant=False, preserve_rng_state=False,
                )
            )  # fmt: skip
        return torch.cat(parts), found > 0

    def _mix_and_compare(
        self, anchors: Tensor, pool: Tensor, first: Tensor, second: Tensor, share: Tensor, acc: torch.dtype
    ) -> Tensor:
        anchors, count = anchors.to(acc), self._config.count
        with torch.no_grad():
            one = pool[first].to(acc)
            two = torch.cat([pool[second[:, :count]].to(acc), anchors[:, None].expand_as(one)[:, count:]], 1)
            share = torch.cat([share[:, :count], 1 - 0.5 * share[:, count:]], 1)[:, :, None]
            mixed = normalize(share * one + (1 - share) * two, dim=2)
        return torch.einsum("ad,asd->as", anchors, mixed)


def hardest_columns(
    anchors: Tensor, pool: Tensor, exclusions: Exclusions, top_k: int, acc: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(columns (A, top_k) of the largest cosines, largest first; (A,) how many of them are negatives).
    Streams over tiles.
    """
    best = anchors.new_full((len(anchors), top_k), -math.inf, dtype=acc)
    where = torch.zeros(len(anchors), top_k, dtype=torch.int64, device=anchors.device)
    for tile in tiles_of(len(anchors), len(pool), exclusions.tile):
        cosines = anchors[tile.rows].to(acc) @ pool[tile.cols].to(acc).T
        excluded = exclusions.mask(tile)
        if excluded is not None:
            cosines.masked_fill_(excluded, -math.inf)
        values, columns = cosines.topk(min(top_k, cosines.shape[1]), dim=1)
        both = torch.cat([best[tile.rows], values], 1)
        candidates = torch.cat([where[tile.rows], columns + tile.cols.start], 1)
        best[tile.rows], order = both.topk(top_k, dim=1)
        where[tile.rows] = candidates.gather(1, order)
    return where, (best > -math.inf).sum(1)


def _sums(cosines: Tensor, present: Tensor, exponents: tuple[Exponent, ...], scale: Tensor) -> Negatives:
    """Log-sum-exps over (A, S) cosines, differentiable in them and in the scale; empty for anchors without
    negatives.
    """
    lses = []
    for exponent in exponents:
        assert exponent.shared is not None
        kappa = exponent.shared + exponent.multiple * (
            scale - scale.detach()
        )  # the value of kappa, with its gradient
        lses.append(torch.where(present, torch.logsumexp(kappa * cosines, 1), EMPTY))
    count = present * cosines.new_tensor(float(cosines.shape[1]))
    return Negatives(torch.stack(lses, 1), count, torch.where(present, cosines.sum(1), 0.0))
