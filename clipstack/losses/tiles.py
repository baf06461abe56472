"""The tiled engine: sums over all pairs of rows and columns, without ever storing the matrix of pairs.

Rows are this rank's features (B, D); columns are gathered from all ranks (N, D). One pass over tiles of C = U
V^T serves both directions. What is kept between forward and backward is O(N (D + K)); the backward pass
computes each tile again. The arithmetic inside one tile is in tile_math.py (torch) and triton_tiles.py
(CUDA).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from clipstack.losses.tile_math import EMPTY, Exponent, ExponentGradient, Tile, TileBackend, TorchTiles
from clipstack.losses.triton_tiles import TritonTiles
from clipstack.world import World

CPU_TILE = (1024, 2048)
CUDA_TILE = (4096, 8192)

# torch 2.13 renamed it; the old name warns there and the new one is missing before.
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


class Exclusions:
    """The pairs that are not negatives: those whose ids agree in at least one of several id columns.

    A mask is built only for the tiles in which some id can meet; usually those on the diagonal.
    """

    def __init__(self, row_ids: Tensor, col_ids: Tensor, tile: tuple[int, int]) -> None:
        """row_ids: (B, R), col_ids: (N, R) int64: a pair is excluded if any of its R ids agrees."""
        self.tile = tile
        self._pairs = [(r.contiguous(), c.contiguous()) for r, c in zip(row_ids.T, col_ids.T, strict=True)]
        self._meets: list[list[bool]] = self._tiles_that_meet(
            len(row_ids), len(col_ids), row_ids.device
        ).tolist()

    def _tiles_that_meet(self, rows: int, cols: int, device: torch.device) -> Tensor:
        """(row tiles, column tiles) bool: some id of the row tile is also in the column tile."""
        meets = torch.zeros(-(-rows // self.tile[0]), -(-cols // self.tile[1]), device=device)
        for row_ids, col_ids in self._pairs:
            groups, index = torch.unique(torch.cat([row_ids, col_ids]), return_inverse=True)
            in_row_tile = torch.zeros(meets.shape[0], len(groups), device=device)
            in_col_tile = torch.zeros(meets.shape[1], len(groups), device=device)
            in_row_tile[torch.arange(rows, device=device) // self.tile[0], index[:rows]] = 1
            in_col_tile[torch.arange(cols, device=device) // self.tile[1], index[rows:]] = 1
            meets += in_row_tile @ in_col_tile.T
        return meets > 0

    def mask(self, tile: Tile) -> Tensor | None:
        """True where a pair is excluded; None where no id of this tile meets another."""
        if not self._meets[tile.rows.start // self.tile[0]][tile.cols.start // self.tile[1]]:
            return None
        excluded: Tensor | None = None
        for row_ids, col_ids in self._pairs:
            same = row_ids[tile.rows, None] == col_ids[None, tile.cols]
            excluded = same if excluded is None else excluded.logical_or_(same)
        return excluded


class PairSums(NamedTuple):
    """What each anchor sees of its negatives, (A, ...) for A anchors.

    lse: (A, K) log sum exp(kappa_k c). total: (A,) sum of cosines. softplus: (A,) sum of softplus(scale c +
    bias). num_negatives: (A,) how many. hardest: (A,) largest cosine of a negative, EMPTY without one. total
    and softplus are zero where the plan does not ask for them; softplus is summed for rows alone.
    """

    lse: Tensor
    total: Tensor
    softplus: Tensor
    num_negatives: Tensor
    hardest: Tensor


@dataclass(frozen=True)
class Plan:
    """What one pass over the pairs computes.

    graded: log-sum-exps with gradients; measured: more of them, for logs alone. owner: (B',) the row of each
    own column's positive, None where column i belongs to row i; paired: False where columns are nobody's
    positives, such as a queue's. two_sided: reduce over the rows too, for each column. linear: sum the
    cosines. softplus: (scale, bias) of the pointwise reducer. triton: use the CUDA kernels where they can do
    what is asked.
    """

    exclusions: Exclusions
    graded: tuple[Exponent, ...] = ()
    measured: tuple[Exponent, ...] = ()
    world: World = field(default_factory=World)
    owner: Tensor | None = None
    paired: bool = True
    two_sided: bool = True
    linear: bool = False
    softplus: tuple[float, float] | None = None
    triton: bool = False

    @property
    def exponents(self) -> tuple[Exponent, ...]:
        return self.graded + self.measured

    def backend(self, u: Tensor, v: Tensor) -> TileBackend:
        """The arithmetic for tiles of these features. The Triton kernels know shared temperatures alone."""
        plain = all(exponent.shared is not None for exponent in self.exponents)
        if self.triton and plain and not self.linear and self.softplus is None and u.dtype != torch.float64:
            return TritonTiles(u, v, self.exponents)
        return TorchTiles(
            u, v, self.exclusions.tile, self.exponents, linear=self.linear, softplus=self.softplus
        )


def reduce_pairs(
    u: Tensor, v: Tensor, scale: Tensor, plan: Plan, bias: Tensor | None = None
) -> tuple[Tensor, PairSums, PairSums]:
    """(cosines of the positives (B',) or (0,), sums of the rows (B, ...), sums of the columns (B', ...)) over
    the pairs of all ranks.

    u: (B, D), v: (B', D): this rank's rows and columns, equal shapes on all ranks, |cosine| <= 1; scale,
    bias: (). Differentiable in u, v, scale and bias; each rank's gradients are its share of the sum-adjoint,
    so that averaging parameter gradients over ranks gives those of the mean over all anchors. fp16, bf16 and
    fp32 features are accumulated in fp32, fp64 in fp64. Collective, forward and backward.
    """
    bias = u.new_zeros(()) if bias is None else bias
    out = _PairReduction.apply(u, v, scale, bias, plan)  # type: ignore[no-untyped-call]
    return out[0], PairSums(*out[1:6]), PairSums(*out[6:11])


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def tiles_of(rows: int, cols: int, tile: tuple[int, int]) -> Iterator[Tile]:
    for i in range(0, rows, tile[0]):
        for j in range(0, cols, tile[1]):
            yield Tile(slice(i, min(i + tile[0], rows)), slice(j, min(j + tile[1], cols)))


class _Running:
    """The sums of one direction while tiles go by."""

    def __init__(self, anchors: int, num_exponents: int, like: Tensor) -> None:
        self.lse = like.new_full((anchors, num_exponents), EMPTY)
        self.total, self.softplus, self.excluded = (like.new_zeros(anchors) for _ in range(3))
        self.hardest = like.new_full((anchors,), EMPTY)

    def add(self, part: slice, lse: Tensor, hardest: Tensor) -> None:
        torch.logaddexp(self.lse[part], lse, out=self.lse[part])
        torch.maximum(self.hardest[part], hardest, out=self.hardest[part])


def _reduce_tiles(u: Tensor, v: Tensor, plan: Plan, acc: torch.dtype) -> tuple[_Running, _Running]:
    """One pass over this rank's rows and all columns; the columns' sums are partial: over this rank's rows
    alone.
    """
    like = u.new_empty((), dtype=acc)
    rows = _Running(len(u), len(plan.exponents), like)
    cols = _Running(len(v), len(plan.exponents), like)
    backend = plan.backend(u, v)
    for tile in tiles_of(len(u), len(v), plan.exclusions.tile):
        excluded = plan.exclusions.mask(tile)
        sums = backend.sums(tile, excluded, two_sided=plan.two_sided)
        rows.add(tile.rows, sums.row_lse, sums.row_max)
        if plan.two_sided:
            cols.add(tile.cols, sums.col_lse, sums.col_max)
        if excluded is not None:
            rows.excluded[tile.rows] += excluded.sum(1)
            cols.excluded[tile.cols] += excluded.sum(0)
        if plan.linear:
            rows.total[tile.rows] += sums.row_total
            cols.total[tile.cols] += sums.col_total
        if plan.softplus is not None:
            rows.softplus[tile.rows] += sums.row_softplus
    return rows, cols


class _PairReduction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, u: Tensor, v: Tensor, scale: Tensor, bias: Tensor, plan: Plan
    ) -> tuple[Tensor, ...]:
        acc, world = accumulation_dtype(u.dtype), plan.world
        v_all = world.all_gather(v)  # collective
        own = slice(world.rank * len(v), (world.rank + 1) * len(v))
        with torch.autocast(u.device.type, enabled=False):
            positive = _positive_cosines(u, v, plan, acc)
            rows, cols = _reduce_tiles(u, v_all, plan, acc)
        if plan.two_sided:
            _reduce_over_ranks(cols, world)  # collective
        ctx.plan, ctx.own = plan, own
        ctx.save_for_backward(u, v_all, scale, rows.lse, cols.lse)
        row_sums = PairSums(rows.lse, rows.total, rows.softplus, len(v_all) - rows.excluded, rows.hardest)
        col_count = world.size * len(u) - cols.excluded[own]
        col_sums = PairSums(
            cols.lse[own].clone(),
            cols.total[own].clone(),
            cols.softplus[own].clone(),
            col_count,
            cols.hardest[own].clone(),
        )
        ctx.mark_non_differentiable(
            row_sums.num_negatives,
            row_sums.hardest,
            col_sums.softplus,
            col_sums.num_negatives,
            col_sums.hardest,
        )
        return (positive, *row_sums, *col_sums)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        plan: Plan = ctx.plan
        u, v_all, scale, row_lse, col_lse = ctx.saved_tensors
        depth = len(plan.graded)
        positive_grad, row_grads, col_grads = grads[0], PairSums(*grads[1:6]), PairSums(*grads[6:11])
        row_grad = torch.cat([row_grads.lse[:, :depth], row_grads.total[:, None]], 1)
        col_grad = torch.cat([col_grads.lse[:, :depth], col_grads.total[:, None]], 1)
        col_grad = plan.world.all_gather(col_grad)  # collective
        with torch.autocast(u.device.type, enabled=False):
            exponents = tuple(
                ExponentGradient.prepare(
                    exponent, row_lse[:, k], col_lse[:, k], row_grad[:, k], col_grad[:, k]
                )
                for k, exponent in enumerate(plan.graded)
            )
            du, dv, dscale, dbias = _backward_tiles(
                u, v_all, plan, exponents, (row_grad[:, depth], col_grad[:, depth]), row_grads.softplus,
                scale, needs_v=ctx.needs_input_grad[1],
            )  # fmt: skip
            _add_positive_gradient(du, dv[ctx.own], u, v_all[ctx.own], plan.owner, positive_grad)
        dv_own = (
            _sum_own_over_ranks(dv, ctx.own, plan.world) if ctx.needs_input_grad[1] else None
        )  # collective
        return (
            du.to(u.dtype),
            None if dv_own is None else dv_own.to(u.dtype),
            dscale.to(scale.dtype).reshape(scale.shape),
            dbias.to(scale.dtype),
            None,
        )


def _backward_tiles(
    u: Tensor,
    v: Tensor,
    plan: Plan,
    exponents: tuple[ExponentGradient, ...],
    linear_grads: tuple[Tensor, Tensor],
    softplus_grad: Tensor,
    scale: Tensor,
    *,
    needs_v: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dU, dV over all columns, dscale, dbias) of this rank's rows; dV is still to be summed over ranks."""
    acc = accumulation_dtype(u.dtype)
    du, dv = torch.zeros_like(u, dtype=acc), torch.zeros_like(v, dtype=acc)
    dscale, dbias = du.new_zeros(()), du.new_zeros(())
    # Where every kappa is a multiple of the scale, sum_ij G_ij c_ij = scale * dscale: no extra pass needed.
    proportional = not plan.linear and all(exponent.proportional(scale.item()) for exponent in plan.graded)
    backend = plan.backend(u, v)
    for tile in tiles_of(len(u), len(v), plan.exclusions.tile):
        excluded = plan.exclusions.mask(tile)
        grad = backend.gradient(
            tile, excluded, exponents, linear_grads, softplus_grad, scale_gradient=not proportional
        )
        dscale += grad.scale
        dbias += grad.bias
        backend.add_product(du[tile.rows], grad.pairs, v[tile.cols])
        if needs_v:
            backend.add_product(dv[tile.cols], grad.pairs.T, u[tile.rows])
    if proportional:
        dscale = sum_of_products(u, du, plan.exclusions.tile[0]) / scale.to(acc)
    return du, dv, dscale, dbias


def sum_of_products(a: Tensor, b: Tensor, step: int) -> Tensor:
    """sum(a * b) of two (B, D) tensors, in the dtype of b, `step` rows at a time."""
    parts = [(a[i : i + step].to(b.dtype) * b[i : i + step]).sum() for i in range(0, len(a), step)]
    return torch.stack(parts).sum()


def _positive_cosines(u: Tensor, v: Tensor, plan: Plan, acc: torch.dtype) -> Tensor:
    """(B',): the cosine of each own column with the row that it belongs to, a tile's rows at a time."""
    if not plan.paired:
        return u.new_zeros(0, dtype=acc)
    step = plan.exclusions.tile[0]
    parts = []
    for part in (slice(i, i + step) for i in range(0, len(v), step)):
        rows = u[part] if plan.owner is None else u[plan.owner[part]]
        parts.append((rows.to(acc) * v[part].to(acc)).sum(1))
    return torch.cat(parts)


def _add_positive_gradient(
    du: Tensor, dv: Tensor, u: Tensor, v: Tensor, owner: Tensor | None, grad: Tensor
) -> None:
    if len(grad) == 0:
        return
    if owner is None:
        du.addcmul_(v.to(du.dtype), grad[:, None])
        dv.addcmul_(u.to(du.dtype), grad[:, None])
    else:
        du.index_add_(0, owner, v.to(du.dtype) * grad[:, None])
        dv.addcmul_(u[owner].to(du.dtype), grad[:, None])


def _reduce_over_ranks(cols: _Running, world: World) -> None:
    """Complete the columns' partial sums: log-sum-exps by max, then sum. Two collectives; none in a world of
    one.
    """
    if world.size == 1:
        return
    top = world.all_reduce(torch.cat([cols.lse, cols.hardest[:, None]], 1), op=dist.ReduceOp.MAX)
    top_lse, cols.hardest = top[:, :-1], top[:, -1].contiguous()
    sums = torch.cat([(cols.lse - top_lse).exp(), cols.total[:, None], cols.excluded[:, None]], 1)
    sums = world.all_reduce(sums)
    cols.lse = torch.where(top_lse > EMPTY, top_lse + sums[:, :-2].log(), EMPTY)
    cols.total, cols.excluded = sums[:, -2], sums[:, -1]


def _sum_own_over_ranks(per_column: Tensor, own: slice, world: World) -> Tensor:
    """This rank's columns of the sum over ranks: (N, D) -> (B', D). Collective."""
    if world.size == 1:
        return per_column
    if dist.get_backend(world.group) == dist.Backend.GLOO:  # older gloo has no reduce-scatter
        return world.all_reduce(per_column)[own]
    out = torch.empty_like(per_column[own])
    _reduce_scatter(out, per_column, group=world.group)
    return out


@torch.no_grad()
def mean_negative_cosines(u: Tensor, v: Tensor, plan: Plan, lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """sum_j p_ij c_ij under the softmax of the first exponent, for rows (B,) and own columns (B',). No
    gradient. Collective.

    lses: log-sum-exps of that exponent, of the rows (B,) and of the columns of all ranks (N,).
    """
    acc, world = accumulation_dtype(u.dtype), plan.world
    v_all = world.all_gather(v)
    row_mean, col_mean = u.new_zeros(len(u), dtype=acc), u.new_zeros(len(v_all), dtype=acc)
    exponent = plan.graded[0]
    for tile in tiles_of(len(u), len(v_all), plan.exclusions.tile):
        cosines = u[tile.rows].to(acc) @ v_all[tile.cols].to(acc).T
        excluded = plan.exclusions.mask(tile)
        for side, mean in ((0, row_mean), (1, col_mean)):
            kappa, lse, part = exponent.column(side, tile), lses[side][tile[side]], tile[side]
            weights = (cosines * kappa - (lse[:, None] if side == 0 else lse[None, :])).exp()
            if excluded is not None:
                weights.masked_fill_(excluded, 0.0)
            mean[part] += (weights * cosines).sum(1 - side)
    own = slice(world.rank * len(v), (world.rank + 1) * len(v))
    return row_mean, world.all_reduce(col_mean)[own]
