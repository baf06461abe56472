"""The pairwise sigmoid loss of SigLIP (https://arxiv.org/abs/2303.15343), on the pointwise reducer."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import logsigmoid

from clipstack.errors import ConfigError
from clipstack.losses.inputs import Inputs
from clipstack.losses.monitor import pair_terms
from clipstack.losses.tile_math import Exponent
from clipstack.losses.tiles import Plan, reduce_pairs


class SigmoidPairs:
    """sum over all pairs of softplus(-(z + bias)) for positives, softplus(z + bias) for negatives, divided by
    the images.
    """

    def __call__(self, inputs: Inputs, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss of this rank's images, terms to log). Collective, forward and backward."""
        if inputs.bias is None:
            raise ConfigError(
                'objective.name = "siglip": the model has no logit_bias; set its init_logit_bias, such as -10'
            )
        scale, bias = inputs.scale.item(), inputs.bias.to(inputs.acc)
        plan = Plan(
            inputs.exclusions(),  # collective
            measured=(Exponent(scale, scale),),
            world=inputs.world,
            owner=inputs.owner,
            softplus=(scale, bias.item()),
        )
        cosines, rows, cols = reduce_pairs(inputs.image, inputs.text, inputs.scale, plan, bias)  # collective
        positives = -logsigmoid(inputs.scale * cosines + bias).sum()
        loss = (positives + rows.softplus.sum()) / len(inputs.image)
        terms = pair_terms(inputs, cosines, rows, cols, plain=0)
        terms["effective_negatives"] = 0.5 * (rows.num_negatives.mean() + cols.num_negatives.mean())
        terms["logit_bias"] = bias.detach().clone()
        return loss, terms

    def after_step(self, inputs: Inputs) -> None:
        """Nothing to remember."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to take up."""
