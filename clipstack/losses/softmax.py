"""The softmax family on the engine: CLIP, hard negatives, debiased, decoupled; with a queue, mixing and label
smoothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, assert_never

import torch
from torch import Tensor

from clipstack.config.objectives import ClipObjective, DclObjective, DebiasedObjective, HardNegativeObjective
from clipstack.losses.inputs import Inputs
from clipstack.losses.mixing import Mixer
from clipstack.losses.monitor import effective_count, pair_terms
from clipstack.losses.negatives import Negatives
from clipstack.losses.queue import FeatureQueue
from clipstack.losses.rows import RowLoss
from clipstack.losses.tile_math import Exponent
from clipstack.losses.tiles import Plan, reduce_pairs

SoftmaxConfig = ClipObjective | HardNegativeObjective | DebiasedObjective | DclObjective


class SoftmaxPairs:
    """One objective of the softmax family. Its state: the queue and the mixer's count of steps."""

    def __init__(self, config: SoftmaxConfig, *, triton: bool) -> None:
        self._config = config
        self._triton = triton
        self._queue = FeatureQueue(config.queue_size) if config.queue_size else None
        self._mixer = Mixer(config.mixing) if config.mixing is not None else None
        self._label_smoothing = 0.0 if isinstance(config, DclObjective) else config.label_smoothing

    def __call__(self, inputs: Inputs, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss of this rank's anchors, terms to log). Collective, forward and backward."""
        row_loss = row_loss_at(self._config, progress)
        exponents = Exponents.of(row_loss, inputs.scale.item())
        plan = Plan(
            inputs.exclusions(),  # collective
            exponents.graded,
            exponents.measured,
            inputs.world,
            inputs.owner,
            linear=self._label_smoothing > 0,
            triton=self._triton,
        )
        cosines, rows, cols = reduce_pairs(inputs.image, inputs.text, inputs.scale, plan)  # collective
        image_side, text_side = Negatives.of(rows), Negatives.of(cols)
        for source in (self._queue, self._mixer):
            if source is not None:
                more = source.negatives(inputs, plan)  # collective
                if more is not None:
                    image_side, text_side = image_side.merge(more[0]), text_side.merge(more[1])
        positive = inputs.scale * cosines

        def loss_of(side: Negatives) -> Tensor:
            return row_loss(
                positive, side.lse[:, : len(exponents.graded)], side.count, inputs.scale,
                label_smoothing=self._label_smoothing, total=inputs.scale * side.total,
            )  # fmt: skip

        per_text = (
            inputs.of_owner(image_side.lse),
            inputs.of_owner(image_side.count),
            inputs.of_owner(image_side.total),
        )
        loss = 0.5 * (inputs.image_mean(loss_of(Negatives(*per_text))) + loss_of(text_side).mean())
        with torch.no_grad():
            terms = pair_terms(inputs, cosines, rows, cols, exponents.plain)
            terms["effective_negatives"] = 0.5 * (
                effective_count(image_side, exponents.spread).mean()
                + effective_count(text_side, exponents.spread).mean()
            )
            if self._queue is not None:
                terms["queue_filled"] = inputs.scale.new_tensor(len(self._queue))
        return loss, terms

    def after_step(self, inputs: Inputs) -> None:
        """Take this step's features into the state. Collective where there is a queue."""
        if self._queue is not None:
            self._queue.push(inputs)
        if self._mixer is not None:
            self._mixer.step += 1

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {}
        if self._queue is not None:
            state["queue"] = self._queue.state_dict()
        if self._mixer is not None:
            state["mixing_step"] = self._mixer.step
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self._queue is not None:
            self._queue.load_state_dict(state["queue"])
        if self._mixer is not None:
            self._mixer.step = int(state["mixing_step"])


@dataclass(frozen=True)
class Exponents:
    """Which log-sum-exps a step takes, and where to find those for the logs.

    plain: the index of kappa = scale, CLIP's own. spread: the indices of beta z and 2 beta z, whose
    log-sum-exps give the effective number of negatives; None where all weigh the same.
    """

    graded: tuple[Exponent, ...]
    measured: tuple[Exponent, ...]
    plain: int
    spread: tuple[int, int] | None

    @staticmethod
    def of(row_loss: RowLoss, scale: float) -> Exponents:
        kappas = row_loss.kappas(scale)
        values = [kappa for kappa, _ in kappas]
        wanted = [scale] if row_loss.beta == 0.0 else [scale, 2 * values[1]]
        extra = [kappa for kappa in dict.fromkeys(wanted) if kappa not in values]
        values += extra
        return Exponents(
            graded=tuple(Exponent(kappa, kappa, multiple) for kappa, multiple in kappas),
            measured=tuple(Exponent(kappa, kappa) for kappa in extra),
            plain=values.index(scale),
            spread=None if row_loss.beta == 0.0 else (1, values.index(2 * values[1])),
        )


def row_loss_at(config: SoftmaxConfig, progress: float) -> RowLoss:
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
                beta=config.beta * ramp(progress, config.warmup_fraction, config.ramp_fraction),
                tau_plus=config.tau_plus,
                alpha=config.alpha,
                cosine=config.beta_mode == "cosine",
                detach_weights=config.detach_weights,
            )
        case _:
            assert_never(config)


def ramp(progress: float, warmup: float, length: float) -> float:
    """0 during the warm-up, then linearly to 1 over `length`; 1 at the end of the training in any case."""
    if progress >= min(1.0, warmup + length):
        return 1.0
    return max(0.0, (progress - warmup) / length) if length > 0 else 0.0
