"""Triton kernels of the tiled engine: a product of two feature blocks with the exponentials as its epilogue.

Checked against the torch tiles in Triton's interpreter on a CPU; not yet run on a GPU.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

EMPTY = tl.constexpr(-1e30)


@triton.jit
def _cosines(u, v, row, col, rows, cols, dim, BLOCK_D: tl.constexpr):
    """(BLOCK_M, BLOCK_N) products of a block of rows with a block of columns, accumulated in fp32."""
    out = tl.zeros((row.shape[0], col.shape[0]), dtype=tl.float32)
    for start in range(0, dim, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        a = tl.load(
            u + row[:, None] * dim + d[None, :], mask=(row[:, None] < rows) & (d[None, :] < dim), other=0.0
        )
        b = tl.load(
            v + col[None, :] * dim + d[:, None], mask=(col[None, :] < cols) & (d[:, None] < dim), other=0.0
        )
        out = tl.dot(a, b, out, input_precision="ieee")
    return out


@triton.jit
def _is_negative(excluded, row, col, rows, cols, MASKED: tl.constexpr):
    inside = (row[:, None] < rows) & (col[None, :] < cols)
    if MASKED:
        out = tl.load(excluded + row[:, None] * cols + col[None, :], mask=inside, other=1)
        inside = inside & (out == 0)
    return inside


@triton.jit
def sums_kernel(
    u, v, excluded, kappas, row_lse, col_lse, row_max, col_max, rows, cols, dim,
    K: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Partial results of one block: row_lse (column blocks, K, rows), col_lse (row blocks, K, cols), and the
    maxima.
    """
    i, j = tl.program_id(0), tl.program_id(1)
    row, col = i * BLOCK_M + tl.arange(0, BLOCK_M), j * BLOCK_N + tl.arange(0, BLOCK_N)
    c = _cosines(u, v, row, col, rows, cols, dim, BLOCK_D)
    c = tl.where(_is_negative(excluded, row, col, rows, cols, MASKED), c, EMPTY)
    by_row, by_col = tl.max(c, 1), tl.max(c, 0)
    tl.store(row_max + j * rows + row, by_row, mask=row < rows)
    tl.store(col_max + i * cols + col, by_col, mask=col < cols)
    for k in tl.static_range(K):
        kappa = tl.load(kappas + k)
        # Each anchor by its own maximum; one without a negative here has only EMPTY entries and stays empty.
        row_sum = tl.sum(tl.exp(kappa * (c - by_row[:, None])), 1)
        col_sum = tl.sum(tl.exp(kappa * (c - by_col[None, :])), 0)
        of_rows = tl.where(by_row > EMPTY, kappa * by_row + tl.log(row_sum), EMPTY)
        of_cols = tl.where(by_col > EMPTY, kappa * by_col + tl.log(col_sum), EMPTY)
        tl.store(row_lse + (j * K + k) * rows + row, of_rows, mask=row < rows)
        tl.store(col_lse + (i * K + k) * cols + col, of_cols, mask=col < cols)


@triton.jit
def gradient_kernel(
    u, v, excluded, kappas, slopes, row_lse, col_lse, row_grad, col_grad, pairs, scale_parts, rows, cols, dim,
    K: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One block of the gradient of the cosines, and sum_k slopes_k sum(G_k c) of the block for the scale.

    row_lse, row_grad: (K, rows); col_lse, col_grad: (K, cols); empty anchors have lse = +inf. scale_parts:
    (blocks,).
    """
    i, j = tl.program_id(0), tl.program_id(1)
    row, col = i * BLOCK_M + tl.arange(0, BLOCK_M), j * BLOCK_N + tl.arange(0, BLOCK_N)
    c = _cosines(u, v, row, col, rows, cols, dim, BLOCK_D)
    negative = _is_negative(excluded, row, col, rows, cols, MASKED)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    scale_part = 0.0
    for k in tl.static_range(K):
        kappa = tl.load(kappas + k)
        lse_r = tl.load(row_lse + k * rows + row, mask=row < rows, other=float("inf"))
        lse_c = tl.load(col_lse + k * cols + col, mask=col < cols, other=float("inf"))
        grad_r = tl.load(row_grad + k * rows + row, mask=row < rows, other=0.0)
        grad_c = tl.load(col_grad + k * cols + col, mask=col < cols, other=0.0)
        g = grad_r[:, None] * tl.exp(kappa * c - lse_r[:, None]) + grad_c[None, :] * tl.exp(
            kappa * c - lse_c[None, :]
        )
        g = tl.where(negative, kappa * g, 0.0)
        scale_part += tl.load(slopes + k) * tl.sum(tl.sum(g * c, 1), 0)
        total += g
    tl.store(scale_parts + i * tl.num_programs(1) + j, scale_part)
    where = row[:, None] * cols + col[None, :]
    tl.store(
        pairs + where, total.to(pairs.dtype.element_ty), mask=(row[:, None] < rows) & (col[None, :] < cols)
    )
