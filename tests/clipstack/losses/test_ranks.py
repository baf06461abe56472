"""Real gloo ranks against one process: the same loss, and the same gradients after averaging over ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from clipstack.losses import Embeddings, build_objective
from clipstack.world import World
from tests.clipstack.losses.ranks import run_ranks

N, D = 12, 5

CONFIGS: list[dict[str, Any]] = [
    {"name": "clip"},
    {"name": "clip", "mask_duplicates": False, "label_smoothing": 0.1},
    {"name": "clip", "queue_size": 15, "image_image": {"weight": 0.5}},
    {"name": "clip", "mixing": {"top_k": 4, "count": 3, "query_count": 2}},
    {"name": "clip", "individual_temperature": {"gamma": 0.6, "lr": 0.01}},
    {"name": "hard_negative", "beta": 0.5, "tau_plus": 0.01, "alpha": 0.9, "label_smoothing": 0.1},
    {"name": "hard_negative", "beta": 2.0, "beta_mode": "cosine", "queue_size": 7},
    {"name": "hard_negative", "beta": 0.5, "detach_weights": True},
    {"name": "debiased", "tau_plus": 0.05},
    {"name": "dcl"},
    {"name": "siglip"},
]
CAPTIONS_EACH = [1, 2]
LOCAL_TERMS = {"uniformity"}  # estimated from each rank's own features


def share_of(tensor: Tensor, world: World) -> Tensor:
    return tensor.chunk(world.size)[world.rank]


def towers_and_batch(
    captions: int, world: World, seed: int
) -> tuple[dict[str, Tensor], Embeddings, Tensor, Tensor]:
    """(parameters, this rank's embeddings, sample ids, sample index) of a toy pair of towers on a share of a
    fixed batch.
    """
    torch.manual_seed(0)
    towers = {side: torch.nn.Linear(D, D, dtype=torch.float64) for side in ("image", "text")}
    parameters = {f"{side}.{key}": p for side, tower in towers.items() for key, p in tower.named_parameters()}
    for name, value in (("logit_scale", 2.0), ("logit_bias", -3.0)):
        parameters[name] = torch.tensor(value, dtype=torch.float64, requires_grad=True)
    generator = torch.Generator().manual_seed(seed)
    image, view, text = (
        torch.randn(n, D, generator=generator, dtype=torch.float64) for n in (N, N, N * captions)
    )
    ids = torch.stack([torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 3]), torch.arange(100, 100 + N)], 1)
    features = {
        side: normalize(towers[tower](share_of(x, world)), dim=1)
        for side, tower, x in (("image", "image", image), ("view", "image", view), ("text", "text", text))
    }
    owner = None if captions == 1 else torch.arange(N // world.size).repeat_interleave(captions)
    embeddings = Embeddings(
        features["image"],
        features["text"],
        parameters["logit_scale"],
        parameters["logit_bias"],
        features["view"],
        owner,
    )
    return parameters, embeddings, share_of(ids, world), share_of(torch.arange(N), world)


def second_step(config: dict[str, Any], captions: int, world: World) -> dict[str, Tensor]:
    """Terms and gradients of the second of two steps, averaged over ranks as data parallelism does."""
    objective = build_objective(config, world, tile=(4, 3))
    for seed in (1, 2):
        parameters, embeddings, ids, index = towers_and_batch(captions, world, seed)
        out = objective(embeddings, sample_ids=ids, sample_index=index)
    out.total.backward()
    result = {key: world.mean(p.grad) for key, p in parameters.items() if p.grad is not None}
    return result | {key: world.mean(term) for key, term in out.terms.items() if key not in LOCAL_TERMS}


def all_results(world: World) -> list[dict[str, Tensor]]:
    return [
        second_step(config, captions, world)
        for captions in CAPTIONS_EACH
        for config in CONFIGS
        if captions == 1 or "individual_temperature" not in config
    ]


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_together_give_the_loss_and_gradients_of_one_process(size: int, tmp_path: Path) -> None:
    together = run_ranks(all_results, size, tmp_path)[0]
    for number, (got, want) in enumerate(zip(together, all_results(World()), strict=True)):
        assert got.keys() == want.keys() and "logit_scale" in want and "image.weight" in want
        for key, value in want.items():
            gap = (got[key] - value).abs().max() / value.abs().max().clamp(min=1e-3)
            assert gap <= 1e-12, (number, key, float(gap))
