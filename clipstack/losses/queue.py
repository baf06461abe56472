"""A queue of earlier steps' features as further negatives (MoCo, https://arxiv.org/abs/1911.05722)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from clipstack.errors import CheckpointError, ConfigError
from clipstack.losses.inputs import Inputs
from clipstack.losses.negatives import Negatives
from clipstack.losses.tiles import Exclusions, Plan, reduce_pairs
from clipstack.world import World

_FIELDS = ("image", "text", "image_ids", "text_ids")


class FeatureQueue:
    """The newest `size` images and captions of the global batch, the same on all ranks, oldest first.

    An image of the batch is compared with the captions in the queue, a caption with its images. Their sample
    ids are kept too, so that a duplicate from an earlier step is no negative either.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._kept: dict[str, Tensor] | None = None

    def __len__(self) -> int:
        return 0 if self._kept is None else len(self._kept["image"])

    def negatives(self, inputs: Inputs, plan: Plan) -> tuple[Negatives, Negatives] | None:
        """What it adds for this rank's images (B, ...) and captions (B', ...); None while it is empty."""
        if self._kept is None:
            return None
        kept = {name: tensor.to(inputs.image.device) for name, tensor in self._kept.items()}
        if kept["text_ids"].shape[1] != inputs.row_ids.shape[1] - 1:
            raise ConfigError(
                f"sample_ids: the queue holds {kept['text_ids'].shape[1]} ids a pair, this step brings "
                f"{inputs.row_ids.shape[1] - 1}; give the same ids at every step"
            )
        image_side = self._one_side(
            inputs.image, inputs.row_ids, kept["text"], kept["text_ids"], inputs, plan
        )
        text_side = self._one_side(
            inputs.text, inputs.col_ids, kept["image"], kept["image_ids"], inputs, plan
        )
        return image_side, text_side

    @staticmethod
    def _one_side(
        anchors: Tensor, anchor_ids: Tensor, kept: Tensor, kept_ids: Tensor, inputs: Inputs, plan: Plan
    ) -> Negatives:
        exclusions = Exclusions(anchor_ids[:, 1:], kept_ids, inputs.tile)
        # Every rank holds the whole queue: a world of one, without collectives.
        alone = World(device=inputs.world.device)
        queue_plan = replace(
            plan, exclusions=exclusions, world=alone, owner=None, paired=False, two_sided=False
        )
        return Negatives.of(reduce_pairs(anchors, kept.to(anchors.dtype), inputs.scale, queue_plan)[1])

    def push(self, inputs: Inputs) -> None:
        """Take up the global batch of this step, and let the oldest go. Collective."""
        gather = inputs.world.all_gather
        new = {
            "image": gather(inputs.image.detach()),
            "text": gather(inputs.text.detach()),
            "image_ids": gather(inputs.row_ids)[:, 1:],
            "text_ids": gather(inputs.col_ids)[:, 1:],
        }
        old = self._kept or {name: tensor[:0] for name, tensor in new.items()}
        # What a checkpoint brought lies on the CPU until here.
        self._kept = {
            name: torch.cat([old[name].to(new[name].device), new[name]])[-self._size :].clone()
            for name in _FIELDS
        }

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self._kept or {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state and set(state) != set(_FIELDS):
            raise CheckpointError(f"objective state: a queue with {sorted(state)}, not {sorted(_FIELDS)}")
        self._kept = {name: state[name][-self._size :].clone() for name in _FIELDS} if state else None
