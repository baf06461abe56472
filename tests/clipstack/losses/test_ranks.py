"""Real gloo ranks against one process: the same loss, and the same gradients after averaging over ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn.functional import normalize

from clipstack.losses import Embeddings, build_objective
from clipstack.world import World, current_world

N, D = 12, 5

CONFIGS: list[dict[str, Any]] = [
    {"name": "clip"},
    {"name": "hard_negative", "beta": 0.5, "tau_plus": 0.01, "alpha": 0.9},
]


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """(images, texts, sample ids) of the global batch, before any tower."""
    generator = torch.Generator().manual_seed(5)
    image, text = (torch.randn(N, D, generator=generator, dtype=torch.float64) for _ in range(2))
    ids = torch.stack([torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 3]), torch.arange(100, 100 + N)], 1)
    return image, text, ids


def step(config: dict[str, Any], world: World) -> dict[str, Tensor]:
    """Loss and gradients of a toy pair of towers over this rank's share, averaged over ranks as data parallelism does."""
    torch.manual_seed(0)
    towers = [torch.nn.Linear(D, D, dtype=torch.float64) for _ in range(2)]
    logit_scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    image, text, ids = (x.chunk(world.size)[world.rank] for x in batch())
    features = [normalize(tower(x), dim=1) for tower, x in zip(towers, (image, text), strict=True)]
    out = build_objective(config, world, tile=(4, 3))(Embeddings(*features, logit_scale), sample_ids=ids)
    out.total.backward()
    named = {f"{t}.{k}": p for t, tower in enumerate(towers) for k, p in tower.named_parameters()}
    named["logit_scale"] = logit_scale
    result = {key: world.mean(p.grad) for key, p in named.items() if p.grad is not None}
    return result | {key: world.mean(value) for key, value in (out.terms | {"total": out.total.detach()}).items()}


def on_rank(rank: int, size: int, store: str, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    results = [step(config, current_world()) for config in CONFIGS]
    if rank == 0:
        torch.save(results, out)
    dist.destroy_process_group()


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_together_give_the_gradients_of_one_process(size: int, tmp_path: Path) -> None:
    mp.spawn(on_rank, (size, str(tmp_path / "store"), str(tmp_path / "out.pt")), nprocs=size)
    together = torch.load(tmp_path / "out.pt", weights_only=True)
    for config, got in zip(CONFIGS, together, strict=True):
        want = step(config, World())
        assert got.keys() == want.keys()
        for key, value in want.items():
            gap = (got[key] - value).abs().max() / value.abs().max().clamp(min=1e-3)
            assert gap <= 1e-12, (config, key, float(gap))
