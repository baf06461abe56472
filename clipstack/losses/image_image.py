"""SimCLR's loss between two views of each image (https://arxiv.org/abs/2002.05709), as SLIP adds it."""

from __future__ import annotations

import torch
from torch import Tensor

from clipstack.errors import ConfigError
from clipstack.losses.inputs import Inputs
from clipstack.losses.rows import RowLoss
from clipstack.losses.tile_math import Exponent
from clipstack.losses.tiles import Exclusions, Plan, reduce_pairs


def image_image_loss(inputs: Inputs, temperature: float) -> Tensor:
    """Mean over this rank's 2B anchors; the negatives of a view are both views of all other images. ()
    Collective.
    """
    if inputs.view is None:
        raise ConfigError(
            "objective.image_image: embeddings have no image_view; give a second view of each image"
        )
    both = torch.cat([inputs.image, inputs.view])
    # Of the ids, those of the image alone: its place in the batch and, where given, its hash.
    ids = inputs.row_ids[:, :2].repeat(2, 1)
    size = len(inputs.image)
    kappa = 1.0 / temperature
    plan = Plan(
        Exclusions(ids, inputs.world.all_gather(ids), inputs.tile),  # collective
        graded=(Exponent(kappa, kappa),),
        world=inputs.world,
        owner=torch.arange(2 * size, device=both.device).roll(size),  # the other view of the same image
        two_sided=False,
    )
    scale = torch.full((), kappa, dtype=inputs.acc, device=both.device)
    cosines, rows, _ = reduce_pairs(both, both, scale, plan)  # collective
    return RowLoss()(kappa * cosines, rows.lse, rows.num_negatives, scale).mean()
