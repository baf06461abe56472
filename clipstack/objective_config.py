"""The objective table of a recipe: one frozen model for each objective, told apart by `name`. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Share = Annotated[float, Field(ge=0.0, le=1.0)]


class _Base(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    mask_duplicates: bool = True
    """Do not count a pair as a negative when its image or its caption is the anchor's own (needs sample ids)."""


class ClipObjective(_Base):
    """The symmetric softmax loss of CLIP (Radford et al. 2021)."""

    name: Literal["clip"] = "clip"


class HardNegativeObjective(_Base):
    """Hard-negative importance sampling (Robinson et al. 2021), with HN-NCE's alpha and debiasing."""

    name: Literal["hard_negative"] = "hard_negative"
    beta: Annotated[float, Field(ge=0.0)] = 0.25
    """Hardness: how much harder negatives weigh more. 0 is CLIP."""
    tau_plus: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Assumed probability that a negative is in truth a positive (debiasing). 0 turns it off."""
    alpha: Share = 1.0
    """Weight of the positive in the denominator. 1 is CLIP's, 0 decouples."""
    beta_mode: Literal["logit", "cosine"] = "logit"
    """logit: beta multiplies the scaled logits. cosine: the cosines, so that hardness does not grow with the scale."""
    detach_weights: bool = False
    """Do not let gradients flow through the importance weights."""
    warmup_fraction: Share = 0.0
    """Share of the training during which beta is 0."""
    ramp_fraction: Share = 0.0
    """Share of the training over which beta then rises linearly to its value."""


class DebiasedObjective(_Base):
    """The debiased contrastive loss (Chuang et al. 2020)."""

    name: Literal["debiased"] = "debiased"
    tau_plus: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    """Assumed probability that a negative is in truth a positive."""


class DclObjective(_Base):
    """The decoupled contrastive loss (Yeh et al. 2022): no positive in the denominator."""

    name: Literal["dcl"] = "dcl"


ObjectiveConfig = Annotated[
    ClipObjective | HardNegativeObjective | DebiasedObjective | DclObjective,
    Field(discriminator="name"),
]
