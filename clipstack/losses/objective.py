"""What the trainer calls: embeddings in, the scalar to differentiate and the scalars to log out."""

from __future__ import annotations

from typing import Any, assert_never

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from clipstack.errors import ConfigError
from clipstack.losses.rows import RowLoss
from clipstack.losses.tiles import DEFAULT_TILE, Exclusions, Kappas, PairSums, Plan, accumulation_dtype, dual_lse
from clipstack.losses.types import Embeddings, LossOutput
from clipstack.objective_config import (
    ClipObjective,
    DclObjective,
    DebiasedObjective,
    HardNegativeObjective,
    ObjectiveConfig,
)
from clipstack.world import World, current_world


def build_objective(
    config: ObjectiveConfig | dict[str, Any], world: World | None = None, *, tile: tuple[int, int] = DEFAULT_TILE
) -> Objective:
    """The objective that a recipe's `objective` table (or a dict like {"name": "clip"}) describes.

    world: who takes part; the default process group where None. tile: (rows, columns) of one block of pairs: memory against speed.
    Raises ConfigError naming the field that is wrong.
    """
    if isinstance(config, dict):
        try:
            config = TypeAdapter[Any](ObjectiveConfig).validate_python(config)
        except ValidationError as error:
            first = error.errors()[0]
            raise ConfigError(f"objective.{first['loc']} = {first['input']!r}: {first['msg']}") from error
    return Objective(config, current_world() if world is None else world, tile)


class Objective:
    """One configured objective. Call it once on all features of a step, on every rank."""

    def __init__(self, config: ObjectiveConfig, world: World, tile: tuple[int, int]) -> None:
        self.config = config
        self.world = world
        self.tile = tile

    def __call__(
        self,
        embeddings: Embeddings,
        sample_ids: Tensor | None = None,
        sample_index: Tensor | None = None,
        progress: float = 1.0,
    ) -> LossOutput:
        acc = accumulation_dtype(embeddings.image.dtype)
        scale = embeddings.logit_scale.to(acc).exp()
        row_loss = row_loss_at(self.config, progress)
        plain = RowLoss()
        exclusions = self._exclusions(embeddings, sample_ids)
        kappas = row_loss.kappas(float(scale.detach()))
        table = torch.tensor([[k for k, _ in (*kappas, *plain.kappas(float(scale.detach())))]], dtype=acc, device=scale.device)
        plan = Plan(exclusions, Kappas(table, table, tuple(m for _, m in kappas)), self.world)
        rows, cols = dual_lse(embeddings.image, embeddings.text, scale, plan)
        positive = scale * (embeddings.image.to(acc) * embeddings.text.to(acc)).sum(1)

        def mean_over_anchors(loss: RowLoss, pick: slice) -> Tensor:
            def one(side: PairSums) -> Tensor:
                return loss(positive, side.lse[:, pick], side.count, scale).mean()

            return 0.5 * (one(rows) + one(cols))

        total = mean_over_anchors(row_loss, slice(0, len(kappas)))
        with torch.no_grad():
            clip_loss = mean_over_anchors(plain, slice(-1, None))
        terms = {"loss": total.detach(), "clip_loss": clip_loss, "logit_scale": scale.detach()}
        return LossOutput(total, terms)

    def state_dict(self) -> dict[str, Any]:
        """What must survive a resume."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the state that `state_dict` of an equally configured objective gave."""

    def _exclusions(self, embeddings: Embeddings, sample_ids: Tensor | None) -> Exclusions:
        own = torch.arange(len(embeddings.image), device=embeddings.image.device) + self.world.rank * len(embeddings.image)
        columns = [own]
        if sample_ids is not None and self.config.mask_duplicates:
            ids = sample_ids if sample_ids.dim() == 2 else sample_ids[:, None]
            columns += list(ids.to(own.device).unbind(1))
        everyone = self.world.all_gather(torch.stack(columns, 1)).unbind(1)  # collective
        return Exclusions([(mine, all_.contiguous()) for mine, all_ in zip(columns, everyone, strict=True)], self.tile)


def row_loss_at(config: ObjectiveConfig, progress: float) -> RowLoss:
    """The row loss of a configuration at a share of the training."""
    match config:
        case ClipObjective():
            return RowLoss()
        case DclObjective():
            return RowLoss(alpha=0.0)
        case DebiasedObjective():
            return RowLoss(tau_plus=config.tau_plus)
        case HardNegativeObjective():
            return RowLoss(
                beta=config.beta * _ramp(progress, config.warmup_fraction, config.ramp_fraction),
                tau_plus=config.tau_plus,
                alpha=config.alpha,
                cosine=config.beta_mode == "cosine",
                detach_weights=config.detach_weights,
            )
        case _:
            assert_never(config)


def _ramp(progress: float, warmup: float, ramp: float) -> float:
    """0 during the warm-up, then linearly to 1 over the ramp."""
    if progress < warmup:
        return 0.0
    return min(1.0, (progress - warmup) / ramp) if ramp > 0 else 1.0
