"""Real DeepSpeed at ZeRO 0 to 3: each parameter's averaged gradient is that of one process on the global
batch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from clipstack.losses import Embeddings, build_objective
from clipstack.world import World
from tests.clipstack.losses.ranks import run_ranks

N, D = 12, 8
CLIP: dict[str, Any] = {"name": "clip"}
HARD: dict[str, Any] = {"name": "hard_negative", "beta": 0.5, "tau_plus": 0.01, "alpha": 0.9}
MORE: list[dict[str, Any]] = [
    {"name": "siglip"},
    {"name": "dcl"},
    {"name": "hard_negative", "beta": 2.0, "beta_mode": "cosine", "queue_size": 7},
    {"name": "clip", "mixing": {"top_k": 4, "count": 3}},
    {"name": "clip", "individual_temperature": {"gamma": 0.6}},
]


class Towers(nn.Module):
    """Two small towers, a temperature of shape (1,), which ZeRO can flatten, and a bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image = nn.Sequential(nn.Linear(D, 16), nn.GELU(), nn.Linear(16, D))
        self.text = nn.Sequential(nn.Linear(D, 16), nn.GELU(), nn.Linear(16, D))
        self.logit_scale = nn.Parameter(torch.tensor([2.0]))
        self.logit_bias = nn.Parameter(torch.tensor([-3.0]))

    def forward(self, images: Tensor, texts: Tensor) -> Embeddings:
        features = [normalize(tower(x), dim=1) for tower, x in ((self.image, images), (self.text, texts))]
        return Embeddings(features[0], features[1], self.logit_scale.reshape(()), self.logit_bias.reshape(()))


def batch(world: World) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    images, texts = (torch.randn(N, D, generator=generator) for _ in range(2))
    ids = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 3])
    return tuple(x.chunk(world.size)[world.rank] for x in (images, texts, ids))  # type: ignore[return-value]


def loss_of(model: Any, config: dict[str, Any], world: World) -> Tensor:
    images, texts, ids = batch(world)
    return build_objective(config, world, tile=(4, 3))(model(images, texts), ids, sample_index=ids).total


def alone(config: dict[str, Any]) -> dict[str, Tensor]:
    model = Towers()
    loss_of(model, config, World()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def under_deepspeed(
    world: World, stages: list[int], configs: list[dict[str, Any]]
) -> list[dict[str, Tensor]]:
    """Averaged gradients, stage by stage and configuration by configuration."""
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    # Gloo serves; nothing is compiled.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    out = []
    for stage in stages:
        for config in configs:
            model = Towers()
            settings = {
                "train_micro_batch_size_per_gpu": N // world.size, "train_batch_size": N,
                "gradient_clipping": 0.0,
                "zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True,
                "steps_per_print": 10**9,
            }  # fmt: skip
            optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
            engine, *_ = deepspeed.initialize(
                model=model, optimizer=optimizer, config=settings, dist_init_required=False
            )
            engine.backward(loss_of(engine, config, world))
            names = [(name, parameter) for name, parameter in engine.module.named_parameters()]
            grads = {name: p.grad if stage == 0 else safe_get_full_grad(p) for name, p in names}
            out.append({name: grad.clone() for name, grad in grads.items() if grad is not None})
            engine.destroy()
    return out


def assert_equal_gradients(got: dict[str, Tensor], want: dict[str, Tensor], label: object) -> None:
    for name, value in want.items():
        if float(value.abs().max()) > 0:
            gap = float((got[name].reshape(value.shape) - value).abs().max() / value.abs().max())
            assert gap <= 5e-6, (label, name, gap)


def check(size: int, configs: list[dict[str, Any]], folder: Path) -> None:
    stages = [0, 1, 2, 3]
    for per_rank in run_ranks(under_deepspeed, size, folder, stages, configs):
        labels = [(stage, config) for stage in stages for config in configs]
        for label, got in zip(labels, per_rank, strict=True):
            want = alone(label[1])
            assert "logit_scale" in want
            assert_equal_gradients(got, want, label)


def test_gradients_at_every_zero_stage_are_those_of_one_process(tmp_path: Path) -> None:
    check(2, [CLIP, HARD], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_gradients_at_every_zero_stage_for_the_rest_of_the_family(size: int, tmp_path: Path) -> None:
    check(size, [CLIP, HARD, *MORE], tmp_path)
