"""An exponential moving average of the weights: each rank averages what it holds of them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from clipstack.training.engine import Engine


class ModelEma:
    """average <- d average + (1 - d) weights after each step, in fp32.

    d = min(decay, (1 + n) / (10 + n)) at step n, as in TensorFlow's ExponentialMovingAverage: early on, the
    random weights of the start are forgotten sooner. Nothing but the step and the average itself decides, so
    a resumed run goes on exactly.
    """

    def __init__(self, engine: Engine, decay: float) -> None:
        self._engine, self._decay = engine, decay
        self._parts = {name: part.detach().clone() for name, part in engine.parts().items()}

    def update(self, step: int) -> None:
        """Take up the weights after step `step`."""
        decay = min(self._decay, (1 + step) / (10 + step))
        for name, part in self._engine.parts().items():
            self._parts[name].lerp_(part, 1 - decay)

    def weights(self, current: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The whole averaged model on the CPU; what does not train, buffers too, is `current`'s. Complete on
        rank 0. Collective."""
        return {**current, **self._engine.whole(self._parts)}

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        self._parts = self._engine.cut(weights)
