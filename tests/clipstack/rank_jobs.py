"""What ranks do in tests, run through `launching.Zygote`: each function gets argv and returns an exit code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.utils import safe_get_full_grad
from torch import Tensor

from clipstack.config import Recipe, parse_recipe
from clipstack.engine import Engine, start_distributed
from clipstack.losses import build_objective
from clipstack.losses.types import Embeddings
from clipstack.model import ClipModel, build_model
from clipstack.world import World

BOUND = 5e-6
"""max |difference| / max |reference| of a gradient in fp32."""

MODEL: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "patch_size": 4, "width": 16, "layers": 2, "head_width": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 2},
}


def tiny_recipe(
    *, model: Mapping[str, Any] | None = None, train: Mapping[str, Any] | None = None, **tables: Any
) -> Recipe:
    return parse_recipe(
        {
            "model": {**MODEL, **(model or {})},
            "data": {"train": "."},
            "train": {"steps": 10, "batch_size": 8, "precision": "fp32", **(train or {})},
            "optim": {"grad_clip_norm": 0.0},
            **tables,
        }
    )


def global_batch(size: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """images (B, 3, 16, 16), tokens (B, 8), sample_ids (B, 2) in which two images and two captions are equal."""
    rng = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 3, 16, 16, generator=rng)
    tokens = torch.randint(1, 62, (size, 8), generator=rng)
    tokens[torch.arange(size), 3 + torch.arange(size) % 5] = 63  # end of text, at different lengths
    ids = torch.arange(2 * size).reshape(size, 2)
    ids[size - 1, 0], ids[1, 1] = ids[0, 0], ids[2, 1]
    return images, tokens, ids


def reference(recipe: Recipe) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one process on the whole global batch, with nothing but torch."""
    model = build_model(recipe.model, seed=recipe.seed)
    images, tokens, ids = global_batch(recipe.train.batch_size)
    objective = build_objective(recipe.objective, World())
    loss = objective(model(images, tokens), sample_ids=ids)
    loss.total.backward()
    return float(loss.total), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def share(world: World, *tensors: Tensor) -> list[Tensor]:
    return [tensor.chunk(world.size)[world.rank] for tensor in tensors]


def engine_gradients(engine: Engine) -> dict[str, Tensor]:
    """The averaged gradients that the next step would use, whole. Collective."""
    names = [(n, p) for n, p in engine.model.named_parameters() if p.requires_grad]
    if engine.zero_stage == 0:
        return {name: p.grad.clone() for name, p in names if p.grad is not None}
    return {name: safe_get_full_grad(p).clone() for name, p in names}


def worst(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> tuple[float, str]:
    """(max |difference| / max |reference|, name) of the parameter that differs most."""
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    return max(
        (float((ours[n].reshape(t.shape) - t).abs().max() / t.abs().max().clamp_min(1e-12)), n) for n, t in theirs.items()
    )


def every_stage_gives_the_gradients_of_one_process(argv: Sequence[str]) -> int:
    world = start_distributed()
    for objective in ({"name": "clip"}, {"name": "hard_negative", "beta": 0.5}):
        for stage in (0, 1, 2, 3):
            recipe = tiny_recipe(train={"zero_stage": stage}, objective=objective)
            expected_loss, expected = reference(recipe)
            engine = Engine(build_model(recipe.model, seed=recipe.seed), recipe, world)
            images, tokens, ids = share(world, *global_batch(recipe.train.batch_size))
            loss = build_objective(recipe.objective, world)(engine.forward(images, tokens), sample_ids=ids)
            engine.backward(loss.total)
            error, name = worst(engine_gradients(engine), expected)
            mean = float(world.mean(loss.total.detach()))
            print(f"{objective['name']} stage {stage}: {error:.1e} ({name}), loss {abs(mean - expected_loss):.1e}")
            assert error <= BOUND, (objective, stage, name, error)
            assert abs(mean - expected_loss) <= 1e-6 * abs(expected_loss)
            assert "towers.logit_scale" in expected
            pass
    return 0
