"""The arithmetic inside one tile of pairs, in torch: the reference for every other implementation of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

EMPTY = -1e30
"""The log of an empty sum: finite, so that gradients of empty rows are zero and never NaN."""

SAFE_SPAN = 80.0
"""exp() of a difference of logits below this neither overflows nor vanishes in fp32."""


class Tile(NamedTuple):
    """A block of pairs."""

    rows: slice
    cols: slice


class Exponent(NamedTuple):
    """An inverse temperature kappa of a log-sum-exp: one number for all anchors, or one for each row and each
    column.

    rows: kappa, or (B,); cols: kappa, or (N,) over the columns of all ranks. multiple: d kappa / d scale.
    """

    rows: float | Tensor
    cols: float | Tensor
    multiple: float = 0.0

    @property
    def shared(self) -> float | None:
        """The one kappa of all anchors, where there is one: then one exp serves both directions."""
        if isinstance(self.rows, float) and isinstance(self.cols, float) and self.rows == self.cols:
            return self.rows
        return None

    def column(self, side: int, tile: Tile) -> float | Tensor:
        """kappa of a tile's rows (side 0), shaped (m, 1), or columns (side 1), shaped (1, n)."""
        kappa = self[side]
        if isinstance(kappa, float):
            return kappa
        return kappa[tile.rows, None] if side == 0 else kappa[None, tile.cols]

    def proportional(self, scale: float) -> bool:
        """kappa is `multiple` times the scale and nothing else."""
        return self.shared is not None and math.isclose(self.shared, self.multiple * scale, rel_tol=1e-12)


class TileSums(NamedTuple):
    """What one tile adds: (m, ...) for its rows, (n, ...) for its columns."""

    row_lse: Tensor
    col_lse: Tensor
    row_max: Tensor
    col_max: Tensor
    row_total: Tensor
    col_total: Tensor
    row_softplus: Tensor


class TileGradient(NamedTuple):
    """pairs: (m, n) the gradient of the cosines of a tile; scale, bias: () its share of theirs."""

    pairs: Tensor
    scale: Tensor
    bias: Tensor


@dataclass(frozen=True)
class ExponentGradient:
    """The gradient of one log-sum-exp: G_ij = kappa_i g_i exp(kappa_i c_ij - L_i) + the same of the column.

    Where the temperature is shared and all L lie close together, G_ij = exp(kappa c_ij - shift) (row_weight_i
    + col_weight_j): one exp for both directions. Elsewhere shift is None.
    """

    exponent: Exponent
    lses: tuple[Tensor, Tensor]
    grads: tuple[Tensor, Tensor]
    shift: float | None
    weights: tuple[Tensor, Tensor]

    @staticmethod
    def prepare(
        exponent: Exponent, row_lse: Tensor, col_lse: Tensor, row_grad: Tensor, col_grad: Tensor
    ) -> ExponentGradient:
        # An empty anchor gives nothing: with L = +inf its exp is zero.
        lses = (_inf_where_empty(row_lse), _inf_where_empty(col_lse))
        grads = (row_grad, col_grad)
        present = torch.cat(lses)
        present = present[present.isfinite()]
        if exponent.shared is None or len(present) == 0:
            return ExponentGradient(exponent, lses, grads, None, grads)
        low, high = torch.aminmax(present)
        shift = float(low + high) / 2
        if float(high - low) > SAFE_SPAN:
            return ExponentGradient(exponent, lses, grads, None, grads)
        weights = [
            grad * exponent.shared * (shift - lse).exp() for lse, grad in zip(lses, grads, strict=True)
        ]
        return ExponentGradient(exponent, lses, grads, shift, (weights[0], weights[1]))

    def into(self, out: Tensor, scratch: Tensor, cosines: Tensor, tile: Tile) -> None:
        """out (m, n) = G of a tile. Entries of excluded pairs are unspecified."""
        if self.shift is not None and self.exponent.shared is not None:
            _exp_of_shifted(cosines, self.exponent.shared, self.shift, out=scratch)
            torch.add(self.weights[0][tile.rows, None], self.weights[1][None, tile.cols], out=out).mul_(
                scratch
            )
            return
        out.zero_()
        for side in (0, 1):
            kappa = self.exponent.column(side, tile)
            lse, grad = (
                x[tile.rows, None] if side == 0 else x[None, tile.cols]
                for x in (self.lses[side], self.grads[side])
            )
            torch.mul(cosines, kappa, out=scratch).sub_(lse).exp_().mul_(grad)
            out.add_(scratch.mul_(kappa))


class TileBackend(Protocol):
    """The arithmetic of one tile."""

    def sums(self, tile: Tile, excluded: Tensor | None, *, two_sided: bool) -> TileSums:
        """excluded: (m, n) bool, the pairs left out."""

    def gradient(
        self,
        tile: Tile,
        excluded: Tensor | None,
        exponents: tuple[ExponentGradient, ...],
        linear_grads: tuple[Tensor, Tensor],
        softplus_grad: Tensor,
        *,
        scale_gradient: bool,
    ) -> TileGradient:
        """`scale_gradient`: also sum the log-sum-exps' share of the scale's gradient. The result lives until
        the next call.
        """

    def add_product(self, out: Tensor, a: Tensor, b: Tensor) -> None:
        """out += a @ b."""


class TorchTiles:
    """Tiles in plain torch, in fp32 (fp64 for fp64 features), with buffers that serve every tile."""

    def __init__(
        self,
        u: Tensor,
        v: Tensor,
        tile: tuple[int, int],
        exponents: tuple[Exponent, ...],
        *,
        linear: bool = False,
        softplus: tuple[float, float] | None = None,
    ) -> None:
        self._u, self._v = u, v
        self._exponents, self._linear, self._softplus = exponents, linear, softplus
        self._acc = torch.float64 if u.dtype == torch.float64 else torch.float32
        self._size = min(tile[0], len(u)) * min(tile[1], len(v))
        self._buffers: dict[str, Tensor] = {}
        kappas = [exponent.shared or math.inf for exponent in exponents]
        self._order = sorted(range(len(kappas)), key=kappas.__getitem__)
        self._parts = _as_sums(kappas)

    def _buffer(self, name: str, shape: tuple[int, int]) -> Tensor:
        if name not in self._buffers:
            self._buffers[name] = self._u.new_empty(self._size, dtype=self._acc)
        return self._buffers[name][: math.prod(shape)].view(shape)

    def _cosines(self, tile: Tile) -> Tensor:
        rows, cols = self._u[tile.rows].to(self._acc), self._v[tile.cols].to(self._acc)
        return torch.mm(rows, cols.T, out=self._buffer("cosines", (len(rows), len(cols))))

    def sums(self, tile: Tile, excluded: Tensor | None, *, two_sided: bool) -> TileSums:
        cosines = self._cosines(tile)
        row_total = col_total = row_softplus = cosines.new_zeros(())
        if self._linear:
            kept = cosines if excluded is None else cosines.masked_fill(excluded, 0.0)
            row_total, col_total = kept.sum(1), kept.sum(0)
        if excluded is not None:
            cosines.masked_fill_(excluded, -math.inf)
        if self._softplus is not None:
            scale, bias = self._softplus
            # softplus(z) = -logsigmoid(-z); torch's softplus turns linear at 20, which costs digits.
            row_softplus = -logsigmoid(cosines.mul(-scale).sub_(bias)).sum(1)
        row_max = cosines.amax(1)
        col_max = cosines.amax(0) if two_sided else row_max
        lses: list[tuple[Tensor, Tensor]] = [(row_max, col_max)] * len(self._exponents)
        made: dict[float, tuple[float, Tensor]] = {}
        for k in self._order:
            lses[k] = self._tile_lse(k, cosines, tile, row_max, col_max, two_sided, made)
        row_lse = torch.stack([rows for rows, _ in lses], 1) if lses else cosines.new_zeros(len(cosines), 0)
        col_lse = (
            torch.stack([cols for _, cols in lses], 1) if lses else cosines.new_zeros(cosines.shape[1], 0)
        )
        return TileSums(
            row_lse,
            col_lse,
            row_max.clamp(min=EMPTY),
            col_max.clamp(min=EMPTY),
            row_total,
            col_total,
            row_softplus,
        )

    def _tile_lse(
        self,
        k: int,
        cosines: Tensor,
        tile: Tile,
        row_max: Tensor,
        col_max: Tensor,
        two_sided: bool,
        made: dict[float, tuple[float, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        """made: exp(kappa (c - top)) of smaller kappas, with their top: a product of two saves an exp."""
        exponent, shape = self._exponents[k], (cosines.shape[0], cosines.shape[1])
        kappa = exponent.shared
        top = None if kappa is None else _common_top(kappa, row_max, col_max)
        if kappa is not None and top is not None:
            out = self._buffer("scratch" if k == self._order[-1] else f"exponential {k}", shape)
            one, other = (made.get(part, (None, out)) for part in self._parts.get(kappa, (-1.0, -1.0)))
            if one[0] == other[0] == top:
                torch.mul(one[1], other[1], out=out)
            else:
                _exp_of_shifted(cosines, kappa, kappa * top, out=out)
            made[kappa] = top, out
            # Products with ones: faster than sums, for BLAS needs no barrier between threads here.
            rows = _log_of_sum(out @ out.new_ones(out.shape[1]), kappa * top)
            return rows, _log_of_sum(out.new_ones(len(out)) @ out, kappa * top) if two_sided else rows
        scratch = self._buffer("scratch", shape)
        rows = _one_sided_lse(exponent.column(0, tile), cosines, scratch, row_max[:, None], 1)
        if not two_sided:
            return rows, rows
        return rows, _one_sided_lse(exponent.column(1, tile), cosines, scratch, col_max[None, :], 0)

    def gradient(
        self,
        tile: Tile,
        excluded: Tensor | None,
        exponents: tuple[ExponentGradient, ...],
        linear_grads: tuple[Tensor, Tensor],
        softplus_grad: Tensor,
        *,
        scale_gradient: bool,
    ) -> TileGradient:
        cosines = self._cosines(tile)
        shape = (cosines.shape[0], cosines.shape[1])
        scratch, pairs = self._buffer("scratch", shape), self._buffer("pairs", shape)
        dscale = dbias = cosines.new_zeros(())
        for k, exponent in enumerate(exponents):
            out = pairs if k == 0 else self._buffer("more", shape)
            exponent.into(out, scratch, cosines, tile)
            if excluded is not None:
                out.masked_fill_(excluded, 0.0)
            if scale_gradient and exponent.exponent.multiple != 0.0 and exponent.exponent.shared is not None:
                dscale = dscale + (out * cosines).sum() * (
                    exponent.exponent.multiple / exponent.exponent.shared
                )
            if k > 0:
                pairs.add_(out)
        if not exponents:
            pairs.zero_()
        if self._linear:
            linear = linear_grads[0][tile.rows, None] + linear_grads[1][None, tile.cols]
            pairs.add_(linear if excluded is None else linear.masked_fill_(excluded, 0.0))
        if self._softplus is not None:
            scale, bias = self._softplus
            torch.mul(cosines, scale, out=scratch).add_(bias).sigmoid_().mul_(softplus_grad[tile.rows, None])
            if excluded is not None:
                scratch.masked_fill_(excluded, 0.0)
            dbias = scratch.sum()
            pairs.add_(scratch, alpha=scale)
        return TileGradient(pairs, dscale, dbias)

    def add_product(self, out: Tensor, a: Tensor, b: Tensor) -> None:
        out.addmm_(a, b.to(self._acc))


def _as_sums(kappas: list[float]) -> dict[float, tuple[float, float]]:
    """Which kappas are the sum of two smaller ones, and of which."""
    return {
        whole: (one, other)
        for one in kappas
        for other in kappas
        for whole in kappas
        if whole < math.inf and math.isclose(one + other, whole, rel_tol=1e-12)
    }


def _common_top(kappa: float, row_max: Tensor, col_max: Tensor) -> float | None:
    """A top under which exp(kappa (c - top)) keeps all sums of rows and columns in range, if there is one.

    Cosines span at most 2, so moderate temperatures need no look at the tile. On CUDA no such look is taken:
    it would make the host wait for the device at every tile.
    """
    if 2.02 * kappa < SAFE_SPAN:
        return 1.0
    if row_max.is_cuda:
        return None
    maxima = torch.cat([row_max, col_max])
    maxima = maxima[maxima > EMPTY]
    if len(maxima) == 0:
        return 0.0
    low, high = torch.aminmax(maxima)
    return float(high) if kappa * float(high - low) < SAFE_SPAN / 2 else None


def _exp_of_shifted(cosines: Tensor, kappa: float, shift: float, *, out: Tensor) -> Tensor:
    """out = exp(kappa c - shift), in two passes."""
    return torch.add(cosines.new_tensor(-shift), cosines, alpha=kappa, out=out).exp_()


def _inf_where_empty(lse: Tensor) -> Tensor:
    return torch.where(lse > EMPTY / 2, lse, math.inf)


def _log_of_sum(sums: Tensor, shift: float) -> Tensor:
    return torch.where(sums > 0, sums.log() + shift, EMPTY)


def _one_sided_lse(
    kappa: float | Tensor, cosines: Tensor, scratch: Tensor, maxima: Tensor, dim: int
) -> Tensor:
    """log sum exp(kappa c) over `dim`, each anchor by its own maximum; (m, 1) or (1, n) maxima, -inf for an
    empty anchor.
    """
    finite = torch.where(maxima > EMPTY, maxima, 0.0)
    sums = torch.sub(cosines, finite, out=scratch).mul_(kappa).exp_().sum(dim)
    return torch.where(sums > 0, sums.log() + (kappa * finite).squeeze(dim), EMPTY)
