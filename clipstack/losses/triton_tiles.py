"""The arithmetic of one tile on CUDA: Triton kernels that never write the exponentials to memory.

The torch tiles are the reference and the default. These are checked against them in Triton's interpreter on a
CPU and were not yet run on a GPU, so they are used only where asked for.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from clipstack.errors import ConfigError
from clipstack.losses.tile_math import EMPTY, Exponent, ExponentGradient, Tile, TileGradient, TileSums

BLOCK = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_D": 64}


def require_triton(device: torch.device) -> None:
    """Raises ConfigError where the kernels cannot run: without triton, or on a device other than CUDA."""
    if importlib.util.find_spec("triton") is None:
        raise ConfigError("CLIPSTACK_TRITON=1: triton is not installed; pip install triton, or unset it")
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigError(
            f"CLIPSTACK_TRITON=1: the kernels need CUDA, this process runs on {device.type}; unset it"
        )


class TritonTiles:
    """Tiles of fp32, bf16 or fp16 features with temperatures that all anchors share."""

    def __init__(self, u: Tensor, v: Tensor, exponents: tuple[Exponent, ...]) -> None:
        self._u, self._v = u.contiguous(), v.contiguous()
        self._kappas = self._numbers([exponent.shared for exponent in exponents])
        # The gradient of the cosines in bf16 for bf16 features, so that tensor cores serve the products that
        # follow; fp16 has too few exponents for it.
        self._pairs_dtype = torch.bfloat16 if u.dtype == torch.bfloat16 else torch.float32

    def _numbers(self, values: list[float | None]) -> Tensor:
        return torch.tensor(values, device=self._u.device, dtype=torch.float32)

    def _blocks(self, tile: Tile) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """(rows, columns, number of blocks each way) of a tile."""
        u, v = self._u[tile.rows], self._v[tile.cols]
        return u, v, (-(-len(u) // BLOCK["BLOCK_M"]), -(-len(v) // BLOCK["BLOCK_N"]))

    def sums(self, tile: Tile, excluded: Tensor | None, *, two_sided: bool) -> TileSums:
        from clipstack.losses.triton_kernels import sums_kernel

        u, v, grid = self._blocks(tile)
        count = len(self._kappas)
        row_lse = self._kappas.new_empty(grid[1], count, len(u))
        col_lse = self._kappas.new_empty(grid[0], count, len(v))
        row_max, col_max = self._kappas.new_empty(grid[1], len(u)), self._kappas.new_empty(grid[0], len(v))
        sums_kernel[grid](
            u, v, _bytes(excluded, u), self._kappas, row_lse, col_lse, row_max, col_max,
            len(u), len(v), u.shape[1],
            K=count, MASKED=excluded is not None, **BLOCK,
        )  # fmt: skip
        zero = self._kappas.new_zeros(())
        return TileSums(
            row_lse.logsumexp(0).clamp(min=EMPTY).T, col_lse.logsumexp(0).clamp(min=EMPTY).T,
            row_max.amax(0), col_max.amax(0), zero, zero, zero,
        )  # fmt: skip

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
        from clipstack.losses.triton_kernels import gradient_kernel

        u, v, grid = self._blocks(tile)
        pairs = torch.empty(len(u), len(v), device=u.device, dtype=self._pairs_dtype)
        scale_parts = self._kappas.new_empty(grid[0] * grid[1])
        slopes = self._numbers([e.exponent.multiple / (e.exponent.shared or 1.0) for e in exponents])
        row_lse, col_lse, row_grad, col_grad = (
            torch.stack([values[side][part] for values in table])
            for table in ([e.lses for e in exponents], [e.grads for e in exponents])
            for side, part in enumerate(tile)
        )
        gradient_kernel[grid](
            u, v, _bytes(excluded, u), self._kappas, slopes, row_lse, col_lse, row_grad, col_grad,
            pairs, scale_parts,
            len(u), len(v), u.shape[1], K=len(exponents), MASKED=excluded is not None, **BLOCK,
        )  # fmt: skip
        return TileGradient(pairs, scale_parts.sum(), self._kappas.new_zeros(()))

    def add_product(self, out: Tensor, a: Tensor, b: Tensor) -> None:
        out.add_(a @ b.to(a.dtype))


def _bytes(excluded: Tensor | None, instead: Tensor) -> Tensor:
    """The mask as the kernels read it; any tensor where there is none, since it is not read then."""
    return instead if excluded is None else excluded.contiguous().view(torch.uint8)
