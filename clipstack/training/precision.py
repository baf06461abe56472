"""fp32 or bf16: which of them a run computes in, measured where the recipe leaves it open."""

from __future__ import annotations

import statistics
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor

from clipstack.config import Recipe
from clipstack.errors import ConfigError
from clipstack.model import ClipModel
from clipstack.world import World

Precision = Literal["fp32", "bf16"]
BF16_MIN_SPEEDUP = 1.15
"""bf16 has to win clearly, so that two equal launches decide alike."""


def faster_precision(
    model: ClipModel, device: torch.device, *, batch_size: int = 8, rounds: int = 5
) -> Precision:
    """fp32 or bf16 autocast, whichever is measured to be faster for a forward and backward pass of this
    model.

    Flags do not tell: CPUs that list bf16 instructions can be slower with them. The medians of alternating
    rounds decide.
    """
    size = model.record.preprocess_cfg["size"]
    height, width = (size, size) if isinstance(size, int) else size
    images = torch.zeros(batch_size, 3, height, width, device=device)
    tokens = torch.ones(batch_size, model.record.context_length, dtype=torch.int64, device=device)
    seconds: dict[Precision, list[float]] = {"fp32": [], "bf16": []}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for _ in range(rounds + 1):
            for precision, timings in seconds.items():
                timings.append(_time_pass(model, images, tokens, precision))
    model.zero_grad(set_to_none=True)
    fp32, bf16 = (statistics.median(seconds[p][1:]) for p in ("fp32", "bf16"))  # the first round warms up
    return "bf16" if fp32 / bf16 >= BF16_MIN_SPEEDUP else "fp32"


def _time_pass(model: ClipModel, images: Tensor, tokens: Tensor, precision: Precision) -> float:
    _wait_for(images.device)
    start = time.perf_counter()
    with autocast(images.device, precision):
        embeddings = model(images, tokens)
    (embeddings.image * embeddings.text).sum().backward()
    _wait_for(images.device)
    return time.perf_counter() - start


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    """What a forward pass in this precision runs under; parameters stay fp32."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()


def with_precision(recipe: Recipe, precision: str) -> Recipe:
    """The recipe with `train.precision` set."""
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"precision": precision})})


def resolve_precision(recipe: Recipe, model: ClipModel, world: World, *, decided: Precision | None) -> Recipe:
    """The recipe with "auto" replaced by what the main rank measures. Collective."""
    if recipe.train.precision != "auto":
        if decided not in (None, recipe.train.precision):
            raise ConfigError(
                f"train.precision = {recipe.train.precision!r}: --deepspeed_config decides {decided!r}; make "
                "them agree"
            )
        return recipe
    if decided is not None:
        return with_precision(recipe, decided)
    return with_precision(
        recipe, world.from_main(lambda: faster_precision(model.to(world.device), world.device))
    )
