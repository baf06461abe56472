"""The tiled engine: log-sum-exp over all pairs of rows and columns, without ever storing the matrix of pairs.

Rows are this rank's features (B, D); columns are gathered from all ranks (N, D). One pass over tiles of C = U V^T serves
both directions. What is kept between forward and backward is O(N (D + K)); the backward pass computes each tile again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from clipstack.world import World

EMPTY = -1e30
"""The log of an empty sum: finite, so that gradients of empty rows are zero and never NaN."""

SAFE_SPAN = 80.0
"""exp() of a difference below this neither overflows nor vanishes in fp32."""

DEFAULT_TILE = (1024, 2048)


class Exclusions:
    """The pairs that are not negatives: those whose ids agree in at least one of several id columns.

    A mask is built only for the tiles in which some id can meet; usually those on the diagonal.
    """

    def __init__(self, pairs: Sequence[tuple[Tensor, Tensor]], tile: tuple[int, int]) -> None:
        """`pairs`: (row ids (B,), column ids (N,)), both int64 and of one meaning; at least one such pair."""
        self.pairs = pairs
        self.tile = tile
        self._meets = self._tiles_that_meet().tolist()

    def _tiles_that_meet(self) -> Tensor:
        """(row tiles, column tiles) bool: some id of the row tile is also in the column tile."""
        rows, cols = len(self.pairs[0][0]), len(self.pairs[0][1])
        device = self.pairs[0][0].device
        meets = torch.zeros(-(-rows // self.tile[0]), -(-cols // self.tile[1]), device=device)
        for row_ids, col_ids in self.pairs:
            groups, index = torch.unique(torch.cat([row_ids, col_ids]), return_inverse=True)
            in_row_tile = torch.zeros(meets.shape[0], len(groups), device=device)
            in_col_tile = torch.zeros(meets.shape[1], len(groups), device=device)
            in_row_tile[torch.arange(rows, device=device) // self.tile[0], index[:rows]] = 1
            in_col_tile[torch.arange(cols, device=device) // self.tile[1], index[rows:]] = 1
            meets += in_row_tile @ in_col_tile.T
        return meets > 0

    def mask(self, row_tile: slice, col_tile: slice) -> Tensor | None:
        """True where a pair is excluded; None where no id of this tile meets another."""
        if not self._meets[row_tile.start // self.tile[0]][col_tile.start // self.tile[1]]:
            return None
        row_ids, col_ids = self.pairs[0]
        excluded = row_ids[row_tile, None] == col_ids[None, col_tile]
        for row_ids, col_ids in self.pairs[1:]:
            excluded |= row_ids[row_tile, None] == col_ids[None, col_tile]
        return excluded


@dataclass(frozen=True)
class Kappas:
    """The inverse temperatures that log-sum-exps are taken at.

    rows: (1 or B, K), columns: (1 or B', K): plain numbers, no gradient flows to them. The gradient of the scale is found
    from `multiples`: rows[:, k] = multiples[k] * scale + a constant. The first len(multiples) of the K are differentiable;
    the rest are measured only.
    """

    rows: Tensor
    cols: Tensor
    multiples: tuple[float, ...]

    @property
    def shared(self) -> bool:
        """One temperature for all rows and columns, so that one exp can serve both directions."""
        return self.rows.shape[0] == 1 and self.rows is self.cols


class PairSums(NamedTuple):
    """What one anchor sees of its negatives. lse: (B, K). total: (B,) sum of cosines, or zeros when not asked for.
    count: (B,) how many negatives. hardest: (B,) largest cosine of a negative; EMPTY where there is none."""

    lse: Tensor
    total: Tensor
    count: Tensor
    hardest: Tensor


@dataclass(frozen=True)
class Plan:
    """How one pass over the pairs is made. `two_sided`: also reduce over the rows, for each column."""

    exclusions: Exclusions
    kappas: Kappas
    world: World = field(default_factory=World)
    two_sided: bool = True
    linear: bool = False


def dual_lse(u: Tensor, v: Tensor, scale: Tensor, plan: Plan) -> tuple[PairSums, PairSums]:
    """log sum_{j in Neg(i)} exp(kappa c_ij) for each row i over all columns of all ranks, and the same for each column.

    u: (B, D), v: (B', D): this rank's rows and columns, equal shapes on all ranks; scale: (). Differentiable in u, v and
    scale; gradients follow the sum-adjoint, so averaging them over ranks gives those of the mean over all anchors.
    fp16 and bf16 features are accumulated in fp32, fp64 in fp64. Collective in both directions.
    """
    out = _DualLse.apply(u, v, scale, plan)
    return PairSums(*out[:4]), PairSums(*out[4:])


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _tiles(rows: int, cols: int, tile: tuple[int, int]) -> Iterator[tuple[slice, slice]]:
    for i in range(0, rows, tile[0]):
        for j in range(0, cols, tile[1]):
            yield slice(i, min(i + tile[0], rows)), slice(j, min(j + tile[1], cols))


def _pick(kappa: Tensor, k: int, part: slice) -> Tensor:
    """(1 or B, K) -> (1 or tile,): the k-th kappa of a part of the anchors."""
    return kappa[:, k] if kappa.shape[0] == 1 else kappa[part, k]


class _Workspace:
    """Two buffers of one tile each, so that the loop over tiles allocates nothing of that size."""

    def __init__(self, u: Tensor, v: Tensor, tile: tuple[int, int]) -> None:
        self.u, self.v = u, v
        size = min(tile[0], len(u)) * min(tile[1], len(v))
        self._cosines, self._scratch = (u.new_empty(size) for _ in range(2))

    def cosines(self, row_tile: slice, col_tile: slice) -> tuple[Tensor, Tensor]:
        """(C, scratch of the same shape) for a tile."""
        rows, cols = self.u[row_tile], self.v[col_tile]
        shape = (len(rows), len(cols))
        cosines = self._cosines[: math.prod(shape)].view(shape)
        torch.mm(rows, cols.T, out=cosines)
        return cosines, self._scratch[: math.prod(shape)].view(shape)


class _Running:
    """Running sums of one direction while tiles go by."""

    def __init__(self, anchors: int, num_kappas: int, like: Tensor) -> None:
        self.lse = like.new_full((anchors, num_kappas), EMPTY)
        self.total = like.new_zeros(anchors)
        self.excluded = like.new_zeros(anchors)
        self.hardest = like.new_full((anchors,), EMPTY)

    def add_lse(self, part: slice, k: int, log_shift: Tensor | float, sums: Tensor) -> None:
        """lse (+)= log_shift + log(sums), where a sum of zero adds nothing."""
        tile_lse = torch.where(sums > 0, sums.log() + log_shift, EMPTY)
        self.lse[part, k] = torch.logaddexp(self.lse[part, k], tile_lse)


def _reduce_tiles(u: Tensor, v: Tensor, plan: Plan, col_kappas: Tensor) -> tuple[_Running, _Running]:
    """One pass over this rank's rows and all columns; the columns' sums are partial: over this rank's rows only."""
    num_kappas = plan.kappas.rows.shape[1]
    rows, cols = _Running(len(u), num_kappas, u), _Running(len(v), num_kappas, u)
    workspace = _Workspace(u, v, plan.exclusions.tile)
    for row_tile, col_tile in _tiles(len(u), len(v), plan.exclusions.tile):
        cosines, scratch = workspace.cosines(row_tile, col_tile)
        excluded = plan.exclusions.mask(row_tile, col_tile)
        if excluded is not None:
            rows.excluded[row_tile] += excluded.sum(1)
            cols.excluded[col_tile] += excluded.sum(0)
        if plan.linear:
            kept = cosines if excluded is None else torch.masked_fill(cosines, excluded, 0.0)
            rows.total[row_tile] += kept.sum(1)
            cols.total[col_tile] += kept.sum(0)
        if excluded is not None:
            cosines.masked_fill_(excluded, -math.inf)
        row_max, col_max = cosines.amax(1), cosines.amax(0)
        torch.maximum(rows.hardest[row_tile], row_max, out=rows.hardest[row_tile])
        torch.maximum(cols.hardest[col_tile], col_max, out=cols.hardest[col_tile])
        _add_exponentials(
            rows, cols, (row_tile, col_tile), cosines, scratch, plan, col_kappas, (row_max, col_max)
        )
    return rows, cols


def _add_exponentials(
    rows: _Running,
    cols: _Running,
    part: tuple[slice, slice],
    cosines: Tensor,
    scratch: Tensor,
    plan: Plan,
    col_kappas: Tensor,
    maxima: tuple[Tensor, Tensor],
) -> None:
    row_max, col_max = (torch.where(m > EMPTY, m, 0.0) for m in maxima)
    for k in range(plan.kappas.rows.shape[1]):
        row_kappa, col_kappa = _pick(plan.kappas.rows, k, part[0]), _pick(col_kappas, k, part[1])
        if plan.kappas.shared:
            kappa = float(row_kappa)
            top = float(row_max.max())
            bottom = float(torch.minimum(row_max.min(), col_max.min()))
            if kappa * (top - bottom) < SAFE_SPAN / 2:
                torch.mul(cosines, kappa, out=scratch).sub_(kappa * top).exp_()
                rows.add_lse(part[0], k, kappa * top, scratch.sum(1))
                cols.add_lse(part[1], k, kappa * top, scratch.sum(0))
                continue
        torch.sub(cosines, row_max[:, None], out=scratch).mul_(row_kappa[:, None]).exp_()
        rows.add_lse(part[0], k, row_kappa * row_max, scratch.sum(1))
        if plan.two_sided:
            torch.sub(cosines, col_max[None, :], out=scratch).mul_(col_kappa[None, :]).exp_()
            cols.add_lse(part[1], k, col_kappa * col_max, scratch.sum(0))


class _DualLse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, v: Tensor, scale: Tensor, plan: Plan) -> tuple[Tensor, ...]:
        acc = accumulation_dtype(u.dtype)
        world = plan.world
        v_all = world.all_gather(v)  # collective
        col_kappas = _gather_kappas(plan)  # collective where each column has its own
        with torch.autocast(u.device.type, enabled=False):
            rows, cols = _reduce_tiles(u.to(acc), v_all.to(acc), plan, col_kappas)
        own = slice(world.rank * len(v), (world.rank + 1) * len(v))
        _reduce_over_ranks(cols, world)  # collective
        ctx.plan, ctx.own = plan, own
        ctx.save_for_backward(u, v_all, scale, rows.lse, cols.lse, col_kappas)
        row_count = len(v_all) - rows.excluded
        col_count = len(u) * world.size - cols.excluded[own]
        out = (rows.lse, rows.total, row_count, rows.hardest)
        out += (cols.lse[own].clone(), cols.total[own].clone(), col_count, cols.hardest[own].clone())
        ctx.mark_non_differentiable(row_count, rows.hardest, col_count, out[-1])
        return out

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        plan: Plan = ctx.plan
        u, v_all, scale, row_lse, col_lse, col_kappas = ctx.saved_tensors
        acc = accumulation_dtype(u.dtype)
        depth = len(plan.kappas.multiples)
        row_grad = torch.cat([grads[0][:, :depth], grads[1][:, None]], 1)
        col_grad = plan.world.all_gather(torch.cat([grads[4][:, :depth], grads[5][:, None]], 1))  # collective
        with torch.autocast(u.device.type, enabled=False):
            du, dv, dscale = _backward_tiles(
                u.to(acc), v_all.to(acc), plan, (row_lse, col_lse), (row_grad, col_grad), col_kappas
            )
        dv = _sum_over_ranks(dv, plan.world)[ctx.own]  # collective
        return du.to(u.dtype), dv.to(u.dtype), dscale.to(scale.dtype).reshape(scale.shape), None


def _backward_tiles(
    u: Tensor,
    v: Tensor,
    plan: Plan,
    lses: tuple[Tensor, Tensor],
    grads: tuple[Tensor, Tensor],
    col_kappas: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dU, dV over all columns, dscale) of this rank's rows; dV is still to be summed over ranks."""
    kappas = plan.kappas
    depth = len(kappas.multiples)
    du, dv, dscale = torch.zeros_like(u), torch.zeros_like(v), u.new_zeros(())
    workspace = _Workspace(u, v, plan.exclusions.tile)
    for row_tile, col_tile in _tiles(len(u), len(v), plan.exclusions.tile):
        cosines, scratch = workspace.cosines(row_tile, col_tile)
        excluded = plan.exclusions.mask(row_tile, col_tile)
        total = torch.zeros_like(cosines)
        for k in range(depth):
            for side, (part, kappa) in enumerate(((row_tile, kappas.rows), (col_tile, col_kappas))):
                anchor_kappa, lse, grad = _pick(kappa, k, part), lses[side][part, k], grads[side][part, k]
                shape = (-1, 1) if side == 0 else (1, -1)
                torch.mul(cosines, anchor_kappa.view(shape), out=scratch).sub_(lse.view(shape))
                if excluded is not None:
                    scratch.masked_fill_(excluded, -math.inf)
                scratch.exp_().mul_(grad.view(shape))
                dscale += kappas.multiples[k] * (scratch * cosines).sum()
                total.addcmul_(scratch, anchor_kappa.view(shape))
        if plan.linear:
            linear = grads[0][row_tile, depth, None] + grads[1][None, col_tile, depth]
            total += linear if excluded is None else linear.masked_fill_(excluded, 0.0)
        du[row_tile].addmm_(total, v[col_tile])
        dv[col_tile].addmm_(total.T, u[row_tile])
    return du, dv, dscale


def _gather_kappas(plan: Plan) -> Tensor:
    return plan.kappas.cols if plan.kappas.cols.shape[0] == 1 else plan.world.all_gather(plan.kappas.cols)


def _reduce_over_ranks(cols: _Running, world: World) -> None:
    """Complete the columns' partial sums: log-sum-exps by max, then sum. Two collectives; none in a world of one."""
    if world.size == 1:
        return
    top = world.all_reduce(torch.cat([cols.lse, cols.hardest[:, None]], 1), op=dist.ReduceOp.MAX)
    top_lse, cols.hardest = top[:, :-1], top[:, -1].contiguous()
    sums = torch.cat([(cols.lse - top_lse).exp(), cols.total[:, None], cols.excluded[:, None]], 1)
    sums = world.all_reduce(sums)
    cols.lse = torch.where(top_lse > EMPTY, top_lse + sums[:, :-2].log(), EMPTY)
    cols.total, cols.excluded = sums[:, -2], sums[:, -1]


def _sum_over_ranks(tensor: Tensor, world: World) -> Tensor:
    return tensor if world.size == 1 else world.all_reduce(tensor)
