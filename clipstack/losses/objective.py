"""What the trainer calls: embeddings in, the scalar to differentiate and the scalars to log out."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Protocol, assert_never

import torch
from torch import Tensor

from clipstack.config.objectives import (
    OBJECTIVES,
    ClipObjective,
    DclObjective,
    DebiasedObjective,
    HardNegativeObjective,
    ObjectiveConfig,
    SiglipObjective,
    parse_objective,
)
from clipstack.errors import CheckpointError, ConfigError
from clipstack.losses.image_image import image_image_loss
from clipstack.losses.individual import IndividualPairs
from clipstack.losses.inputs import NONFINITE, Inputs, NonFiniteError, check
from clipstack.losses.sigmoid import SigmoidPairs
from clipstack.losses.softmax import SoftmaxPairs
from clipstack.losses.tiles import CPU_TILE, CUDA_TILE
from clipstack.losses.triton_tiles import require_triton
from clipstack.losses.types import Embeddings, LossOutput
from clipstack.world import World, current_world

STATE_VERSION = 1


class PairLoss(Protocol):
    """A loss over all image-text pairs, with the state that it carries from step to step."""

    def __call__(self, inputs: Inputs, progress: float) -> tuple[Tensor, dict[str, Tensor]]: ...
    def after_step(self, inputs: Inputs) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def build_objective(
    config: ObjectiveConfig | Mapping[str, Any],
    world: World | None = None,
    *,
    tile: tuple[int, int] | None = None,
    triton: bool | None = None,
) -> Objective:
    """The objective that a recipe's `objective` table, or a dict like {"name": "clip"}, describes.

    world: who takes part; the default process group where None. tile: rows and columns of one block of pairs,
    memory against speed. triton: use the CUDA kernels; where None, if the environment has CLIPSTACK_TRITON=1.
    Raises ConfigError naming the field that is wrong.
    """
    if not isinstance(config, OBJECTIVES):
        config = parse_objective(config)
    world = current_world() if world is None else world
    if tile is None:
        tile = CUDA_TILE if world.device.type == "cuda" else CPU_TILE
    if min(tile) < 1:
        raise ConfigError(f"tile = {tile}: give two numbers of at least 1")
    use_triton = os.environ.get("CLIPSTACK_TRITON") == "1" if triton is None else triton
    if use_triton:
        require_triton(world.device)
    return Objective(config, world, tile=tile, triton=use_triton)


class Objective:
    """One configured objective: call it once a step, on every rank, on all of the rank's features.

    The total is the mean over this rank's own anchors. Averaging parameter gradients over ranks, as data
    parallelism does, then gives exactly the gradient of the loss on the global batch, logit_scale included:
    no other factor is needed.
    """

    def __init__(self, config: ObjectiveConfig, world: World, *, tile: tuple[int, int], triton: bool) -> None:
        self.config = config
        self._world = world
        self._tile = tile
        self._pairs = _pair_loss(config, triton=triton)

    def __call__(
        self,
        embeddings: Embeddings,
        sample_ids: Tensor | None = None,
        sample_index: Tensor | None = None,
        progress: float = 1.0,
    ) -> LossOutput:
        """total () to differentiate, and detached scalars to log. Collective, forward and backward.

        sample_ids: (B, C) int64, equal in any column means: not a negative; (B', C) with a row for each
        caption is allowed where captions have owners. sample_index: (B,) int64, position in the data set, for
        state kept by sample. progress: share of the training done, for schedules. Queues and running
        normalisers move on only where gradients are recorded. Raises EmbeddingsError, on all ranks, for what
        no objective can use; NonFiniteError among them for NaN and infinity.
        """
        if not 0.0 <= progress <= 1.0:
            raise ConfigError(
                f"progress = {progress}: must lie in [0, 1]; give the share of the training that is done"
            )
        inputs = check(
            embeddings, sample_ids, sample_index,
            world=self._world, tile=self._tile, mask_duplicates=self.config.mask_duplicates,
        )  # fmt: skip
        total, terms = self._pairs(inputs, progress)
        if self.config.image_image is not None:
            image_image = image_image_loss(inputs, self.config.image_image.temperature)
            total = total + self.config.image_image.weight * image_image
            terms["image_image_loss"] = image_image.detach()
        terms = {"loss": total.detach(), **terms}
        if self._world.any(not bool(torch.isfinite(total))):  # collective
            raise NonFiniteError(f"{NONFINITE}loss of {self.config.name}: lower the learning rate")
        if torch.is_grad_enabled():
            self._pairs.after_step(inputs)
        return LossOutput(total, terms)

    def state_dict(self) -> dict[str, Any]:
        """What must survive a resume: the same on all ranks, and good for any number of them."""
        return {"version": STATE_VERSION, "name": self.config.name, **self._pairs.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the state of an equally configured objective. Raises CheckpointError for another's."""
        mine = self.state_dict()
        if state.get("version") != STATE_VERSION:
            raise CheckpointError(
                f"objective state: version {state.get('version')}, this clipstack reads {STATE_VERSION}; "
                "resume with the clipstack that wrote it"
            )
        if state.get("name") != self.config.name or state.keys() != mine.keys():
            raise CheckpointError(
                f"objective state: written by {state.get('name')!r} with {sorted(state)}, the recipe's "
                f"objective is {self.config.name!r} with {sorted(mine)}; resume with the checkpoint's recipe"
            )
        self._pairs.load_state_dict(
            {key: value for key, value in state.items() if key not in ("version", "name")}
        )


def _pair_loss(config: ObjectiveConfig, *, triton: bool) -> PairLoss:
    match config:
        case ClipObjective(individual_temperature=individual) if individual is not None:
            return IndividualPairs(individual)
        case ClipObjective() | HardNegativeObjective() | DebiasedObjective() | DclObjective():
            return SoftmaxPairs(config, triton=triton)
        case SiglipObjective():
            return SigmoidPairs()
        case _:
            assert_never(config)
