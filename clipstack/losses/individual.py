"""A temperature for every sample (iSogCLR, https://arxiv.org/abs/2305.11965; FastCLIP,
https://arxiv.org/abs/2407.01445).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from clipstack.config.objectives import IndividualTemperature
from clipstack.errors import CheckpointError, ConfigError
from clipstack.losses.inputs import Inputs
from clipstack.losses.monitor import pair_terms
from clipstack.losses.tile_math import EMPTY, Exponent
from clipstack.losses.tiles import Plan, mean_negative_cosines, reduce_pairs

IMAGE, TEXT = 0, 1


class IndividualPairs:
    """sum_i tau_i (log(eps + u_i) + rho) over images and captions, where u_i runs after g_i = mean_j
    exp((c_ij - c_ii) / tau_i) with weight gamma, and each tau_i descends its own gradient.

    State, the same on all ranks: log u and tau of each sample seen, by its position in the data set; (2, M)
    each, for images and captions, grown as positions come. The gradient of the features is tau_i / (eps +
    u_i) times that of g_i.
    """

    def __init__(self, config: IndividualTemperature) -> None:
        self._config = config
        self._log_u = torch.full((2, 0), -math.inf, dtype=torch.float64)
        self._tau = torch.full((2, 0), config.tau_init, dtype=torch.float64)
        self._pending: tuple[Tensor, Tensor, Tensor] | None = None

    def __call__(self, inputs: Inputs, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss of this rank's anchors, terms to log). Collective, forward and backward."""
        if inputs.sample_index is None:
            raise ConfigError(
                "sample_index: missing; individual_temperature needs each sample's position in the data set"
            )
        if inputs.owner is not None:
            raise ConfigError(
                "text_owner: individual_temperature takes one caption for each image; drop one of the two"
            )
        index = inputs.world.all_gather(inputs.sample_index.to(inputs.image.device))  # collective
        self._make_room(index)
        place = slice(inputs.world.rank * len(inputs.image), (inputs.world.rank + 1) * len(inputs.image))
        tau = self._tau[:, index].to(inputs.acc)
        scale = inputs.scale.item()
        plan = Plan(
            inputs.exclusions(),  # collective
            graded=(Exponent(1 / tau[IMAGE, place], 1 / tau[TEXT]),),
            measured=(Exponent(scale, scale),),
            world=inputs.world,
        )
        cosines, rows, cols = reduce_pairs(inputs.image, inputs.text, inputs.scale, plan)  # collective
        lses = rows.lse[:, 0].detach(), inputs.world.all_gather(cols.lse[:, 0].detach())  # collective
        mean_cosines = mean_negative_cosines(inputs.image, inputs.text, plan, lses)  # collective
        losses, log_us, taus = [], [], []
        for side, sums in ((IMAGE, rows), (TEXT, cols)):
            own_tau, own_log_u = tau[side, place], self._log_u[side, index[place]].to(inputs.acc)
            log_g = sums.lse[:, 0] - sums.num_negatives.clamp(min=1).log() - cosines / own_tau
            log_u = self._running(own_log_u, log_g.detach(), progress)
            log_weight = torch.logaddexp(log_u, log_u.new_tensor(self._config.eps).log())
            share = (log_g.detach() - log_weight).exp()
            surrogate = own_tau * share * log_g
            value = own_tau * (log_weight + self._config.rho)
            some = sums.num_negatives > 0
            losses.append(torch.where(some, surrogate + (value - surrogate).detach(), 0.0 * surrogate).mean())
            slope = log_weight + self._config.rho - share * (mean_cosines[side] - cosines.detach()) / own_tau
            new_tau = (own_tau - self._config.lr * slope).clamp(self._config.tau_min, self._config.tau_max)
            log_us.append(torch.where(some, log_u, own_log_u))
            taus.append(torch.where(some, new_tau, own_tau))
        everyone = inputs.world.all_gather(torch.stack([*log_us, *taus], 1).double())  # collective
        self._pending = index, everyone[:, :2].T, everyone[:, 2:].T
        # The global temperature has no part in this loss; a zero gradient serves optimizers that want one.
        loss = 0.5 * (losses[IMAGE] + losses[TEXT]) + 0.0 * inputs.scale
        terms = pair_terms(inputs, cosines, rows, cols, plain=1)
        terms["effective_negatives"] = 0.5 * (rows.num_negatives.mean() + cols.num_negatives.mean())
        terms["temperature"] = tau[:, place].mean()
        return loss, terms

    def _running(self, log_u: Tensor, log_g: Tensor, progress: float) -> Tensor:
        """log((1 - gamma) u + gamma g); g alone for a sample that was never seen."""
        gamma = gamma_at(self._config, progress)
        if gamma == 1.0:
            return log_g
        mixed = torch.logaddexp(log_u + math.log1p(-gamma), log_g + math.log(gamma))
        return torch.where(log_u > EMPTY, mixed, log_g)

    def _make_room(self, index: Tensor) -> None:
        low, high = (int(x) for x in torch.aminmax(index))
        if low < 0:
            raise ConfigError(f"sample_index = {low}: must be >= 0; give positions in the data set")
        self._log_u, self._tau = (state.to(index.device) for state in (self._log_u, self._tau))
        room = self._log_u.shape[1]
        if high >= room:
            more = max(high + 1, 2 * room) - room
            self._log_u = torch.cat([self._log_u, self._log_u.new_full((2, more), -math.inf)], 1)
            self._tau = torch.cat([self._tau, self._tau.new_full((2, more), self._config.tau_init)], 1)

    def after_step(self, inputs: Inputs) -> None:
        """Take up the running normalisers and temperatures of this step; of a sample that came twice, the
        first of them.
        """
        assert self._pending is not None
        index, log_u, tau = self._pending
        order = torch.argsort(index, stable=True)
        is_first = torch.ones_like(index, dtype=torch.bool)
        is_first[1:] = index[order][1:] != index[order][:-1]
        first = order[is_first]
        self._log_u[:, index[first]] = log_u[:, first]
        self._tau[:, index[first]] = tau[:, first]
        self._pending = None

    def state_dict(self) -> dict[str, Any]:
        return {"log_u": self._log_u.clone(), "tau": self._tau.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if set(state) != {"log_u", "tau"} or state["log_u"].shape != state["tau"].shape:
            raise CheckpointError(
                f"objective state: {sorted(state)}, not log_u and tau of individual temperatures"
            )
        self._log_u, self._tau = state["log_u"].double().clone(), state["tau"].double().clone()


def gamma_at(config: IndividualTemperature, progress: float) -> float:
    """From 1 at the start to gamma after `gamma_decay_fraction` of the training, along half a cosine."""
    if progress >= config.gamma_decay_fraction:
        return config.gamma
    cosine = 0.5 * (1 + math.cos(math.pi * progress / config.gamma_decay_fraction))
    return config.gamma + (1 - config.gamma) * cosine
