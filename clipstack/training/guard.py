"""When training diverges: which steps are skipped, and when to go back to a checkpoint and leave data out."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping
from enum import Enum
from typing import Any

from clipstack.config.models import GuardConfig
from clipstack.errors import DivergenceError

MEDIAN_OVER = 101
"""Steps whose losses the running median is taken over."""
MEDIAN_FROM = 20
"""Losses needed before any is called a spike: the first ones say little."""
SPREADS = 9.0
"""Median deviations that a rise of one median has at least: about six standard deviations of normal noise."""


class Verdict(Enum):
    """What a step's loss and gradient mean for it."""

    FINE = "fine"
    SKIP = "skip"
    ROLL_BACK = "roll back"


class Guard:
    """Judges each step from numbers that all ranks share, so that all judge alike. Its state is in every
    checkpoint."""

    def __init__(self, config: GuardConfig) -> None:
        self._config = config
        self._losses: deque[float] = deque(maxlen=MEDIAN_OVER)
        self._bad_steps: list[int] = []
        self._rollbacks = 0
        self.reason = ""
        """Why the last verdict was not FINE, for the user."""

    def judge_loss(self, step: int, loss: float | None) -> Verdict:
        """Before the backward pass. `loss`: the mean over the ranks; None where it is not finite on some
        rank."""
        if loss is None:
            return self._bad(step, "the loss is not finite")
        factor = self._config.spike_factor
        if factor is not None and len(self._losses) >= MEDIAN_FROM and loss > self._highest(factor):
            self.reason = (
                f"the loss {loss:.4g} of step {step} lies above {self._highest(factor):.4g} "
                f"(guard.spike_factor = {factor:g}, running median {statistics.median(self._losses):.4g})"
            )
            return Verdict.ROLL_BACK
        return Verdict.FINE

    def judge_update(self, step: int, loss: float, *, applied: bool) -> Verdict:
        """After the optimizer's step, which leaves out a gradient that is not finite."""
        if not applied:
            return self._bad(step, "the gradient is not finite")
        self._losses.append(loss)
        self._bad_steps.clear()
        return Verdict.FINE

    def _bad(self, step: int, reason: str) -> Verdict:
        self._bad_steps.append(step)
        self.reason = f"{reason} at step {step}"
        if len(self._bad_steps) < self._config.max_skips:
            return Verdict.SKIP
        if len(self._bad_steps) > 1:
            self.reason += f", {len(self._bad_steps)} in a row"
        return Verdict.ROLL_BACK

    def _highest(self, factor: float) -> float:
        """The largest loss that is no spike: `factor` times the running median.

        Objectives such as dcl cross zero, where that would call any loss a spike; so the rise is measured by
        the usual spread where that is larger than the median.
        """
        median = statistics.median(self._losses)
        deviation = statistics.median(abs(loss - median) for loss in self._losses)
        return median + (factor - 1) * max(abs(median), SPREADS * deviation)

    def count_rollback(self) -> None:
        """Raises DivergenceError where the recipe allows no further one."""
        self._rollbacks += 1
        limit = self._config.max_rollbacks
        if self._rollbacks > limit:
            raise DivergenceError(
                f"guard.max_rollbacks = {limit}: training diverged again ({self.reason}); resume from the "
                "last checkpoint into "
                "another run.dir with a smaller optim.lr, a longer optim.warmup_fraction or a smaller "
                "optim.grad_clip_norm"
            )

    def state(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "losses": list(self._losses),
            "bad_steps": list(self._bad_steps),
            "rollbacks": self._rollbacks,
        }

    def restore(self, state: Mapping[str, Any], *, keep_rollbacks: bool = False) -> None:
        """keep_rollbacks: for a roll-back, which must not forget the ones before it."""
        self._losses = deque(state["losses"], maxlen=MEDIAN_OVER)
        self._bad_steps = list(state["bad_steps"])
        if not keep_rollbacks:
            self._rollbacks = state["rollbacks"]


def is_good(guard_state: Mapping[str, Any]) -> bool:
    """Whether a checkpoint with this state was taken in good times: one to go back to."""
    return not guard_state["bad_steps"]
