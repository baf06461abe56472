"""Objectives for image-text features, exact over all ranks, on one tiled engine."""

from clipstack.losses.inputs import EmbeddingsError, NonFiniteError
from clipstack.losses.objective import Objective, build_objective
from clipstack.losses.types import Embeddings, LossOutput

__all__ = ["Embeddings", "EmbeddingsError", "LossOutput", "NonFiniteError", "Objective", "build_objective"]
