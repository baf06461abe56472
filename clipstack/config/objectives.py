"""The objective table of a recipe: one frozen model for each objective, told apart by `name`. Imports no
torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails

from clipstack.errors import ConfigError

Share = Annotated[float, Field(ge=0.0, le=1.0)]
TauPlus = Annotated[float, Field(ge=0.0, lt=1.0)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class ImageImageTerm(_Frozen):
    """SimCLR's loss between two views of each image, added to the image-text loss (SLIP, Mu et al. 2022)."""

    weight: float = Field(default=1.0, gt=0.0)
    """What the term is multiplied by before it is added."""
    temperature: float = Field(default=0.1, gt=0.0)
    """Its fixed temperature."""


class MixingTerm(_Frozen):
    """Synthetic hard negatives, mixed from each anchor's hardest ones (MoCHi, Kalantidis et al. 2020)."""

    top_k: int = Field(default=64, ge=2)
    """How many of the hardest negatives of an anchor are mixed from."""
    count: int = Field(default=16, ge=0)
    """Negatives for each anchor that are mixed from two of its hardest."""
    query_count: int = Field(default=0, ge=0)
    """Negatives for each anchor that are mixed from the anchor itself and one of its hardest."""
    seed: int = Field(default=0, ge=0)
    """Decides which ones are mixed, and how."""

    @model_validator(mode="after")
    def _makes_something(self) -> MixingTerm:
        if self.count + self.query_count == 0:
            raise ValueError("count and query_count are both 0; give one of them a positive number")
        return self


class IndividualTemperature(_Frozen):
    """A temperature for every sample, learned by robust optimisation (iSogCLR, Qiu et al. 2023; FastCLIP, Wei
    et al. 2024).
    """

    gamma: float = Field(default=0.8, gt=0.0, le=1.0)
    """Weight of this step's estimate in the running normaliser of a sample. 1 forgets all earlier steps."""
    gamma_decay_fraction: Share = 0.0
    """Share of the training over which gamma falls from 1 to its value, along half a cosine. 0 keeps it
    constant.
    """
    rho: float = Field(default=8.5, ge=0.0)
    """Radius of the robust problem: larger keeps temperatures lower."""
    lr: float = Field(default=1e-3, ge=0.0)
    """Learning rate of the temperatures. 0 fixes them."""
    tau_init: float = Field(default=0.07, gt=0.0)
    """Temperature of a sample that was never seen."""
    tau_min: float = Field(default=0.01, gt=0.0)
    """Lower bound of the temperatures."""
    tau_max: float = Field(default=1.0, gt=0.0)
    """Upper bound of the temperatures."""
    eps: float = Field(default=1e-14, ge=0.0)
    """Added to the running normaliser, so that an anchor whose negatives are all far keeps a finite weight.
    """

    @model_validator(mode="after")
    def _ordered(self) -> IndividualTemperature:
        if not self.tau_min <= self.tau_init <= self.tau_max:
            raise ValueError(
                f"tau_init = {self.tau_init} must lie between tau_min = {self.tau_min} "
                f"and tau_max = {self.tau_max}"
            )
        return self


def _true_is_default(value: Any) -> Any:
    return {True: {}, False: None}[value] if isinstance(value, bool) else value


class _Objective(_Frozen):
    mask_duplicates: bool = True
    """Do not count a pair as a negative when its image or its caption is the anchor's own (needs sample ids).
    """
    image_image: Annotated[ImageImageTerm | None, BeforeValidator(_true_is_default)] = None
    """Add an image-image term between two views of each image; none: off."""


class _Softmax(_Objective):
    queue_size: int = Field(default=0, ge=0)
    """Pairs of earlier steps kept as further negatives, without gradient (MoCo, He et al. 2020). 0 turns it
    off.
    """
    mixing: Annotated[MixingTerm | None, BeforeValidator(_true_is_default)] = None
    """Add synthetic hard negatives; none: off."""


class _Smoothed(_Softmax):
    label_smoothing: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the target spread evenly over the positive and all negatives."""


class ClipObjective(_Smoothed):
    """The symmetric softmax loss of CLIP (Radford et al. 2021)."""

    name: Literal["clip"] = "clip"
    """The symmetric softmax loss."""
    individual_temperature: Annotated[IndividualTemperature | None, BeforeValidator(_true_is_default)] = None
    """A learned temperature for every sample in place of the global one; none: off."""

    @model_validator(mode="after")
    def _individual_stands_alone(self) -> ClipObjective:
        others = [name for name in ("queue_size", "mixing", "label_smoothing") if getattr(self, name)]
        if self.individual_temperature is not None and others:
            raise ValueError(
                f"individual_temperature cannot be combined with {' or '.join(others)}; drop one of them"
            )
        return self


class HardNegativeObjective(_Smoothed):
    """Hard-negative importance sampling (Robinson et al. 2021), with debiasing and HN-NCE's weight of the
    positive.
    """

    name: Literal["hard_negative"] = "hard_negative"
    """Softmax, hard negatives weighed up."""
    beta: float = Field(default=0.25, ge=0.0)
    """Hardness: how much more the hard negatives weigh. 0 is CLIP."""
    tau_plus: TauPlus = 0.0
    """Assumed probability that a negative is in truth a positive (debiasing). 0 turns it off."""
    alpha: Share = 1.0
    """Weight of the positive in the denominator. 1 is CLIP's, 0 decouples."""
    beta_mode: Literal["logit", "cosine"] = "logit"
    """logit: beta multiplies the scaled logits. cosine: the cosines, so that hardness does not grow with the
    scale.
    """
    detach_weights: bool = False
    """Stop the gradient through the importance weights."""
    warmup_fraction: Share = 0.0
    """Share of the training during which beta is 0."""
    ramp_fraction: Share = 0.0
    """Share of the training over which beta then rises linearly to its value."""


class DebiasedObjective(_Smoothed):
    """The debiased contrastive loss (Chuang et al. 2020)."""

    name: Literal["debiased"] = "debiased"
    """Softmax, corrected for negatives that are positives."""
    tau_plus: TauPlus = 0.1
    """Assumed probability that a negative is in truth a positive."""


class DclObjective(_Softmax):
    """The decoupled contrastive loss (Yeh et al. 2022): no positive in the denominator."""

    name: Literal["dcl"] = "dcl"
    """Softmax, without the positive in the denominator."""


class SiglipObjective(_Objective):
    """The pairwise sigmoid loss of SigLIP (Zhai et al. 2023). Needs a model with a logit_bias."""

    name: Literal["siglip"] = "siglip"
    """The pairwise sigmoid loss."""


OBJECTIVES = (ClipObjective, HardNegativeObjective, DebiasedObjective, DclObjective, SiglipObjective)

ObjectiveConfig = Annotated[
    ClipObjective | HardNegativeObjective | DebiasedObjective | DclObjective | SiglipObjective,
    Field(discriminator="name"),
]


def parse_objective(table: Mapping[str, Any]) -> ObjectiveConfig:
    """Validate an objective table. Raises ConfigError in one line that names each wrong field."""
    if not isinstance(table, Mapping):
        raise ConfigError(f'objective = {table!r}: give a table such as {{name = "clip"}}')
    adapter: TypeAdapter[ObjectiveConfig] = TypeAdapter(ObjectiveConfig)
    try:
        return adapter.validate_python(dict(table))
    except ValidationError as error:
        details = error.errors(include_url=False)
        raise ConfigError(
            "; ".join(describe_objective_error(detail, detail["loc"]) for detail in details)
        ) from error


def describe_objective_error(detail: ErrorDetails, loc: tuple[int | str, ...]) -> str:
    """One line for one validation error: the field, its value, what is wrong and the fix. loc: the place
    below `objective`.
    """
    name, *path = loc or ("",)
    key = ".".join(["objective", *map(str, path)])
    value = detail["input"]
    bounds = detail.get("ctx", {})
    match detail["type"]:
        case "union_tag_not_found":
            return f"objective.name: missing; give one of {', '.join(_names())}"
        case "union_tag_invalid":
            return f"objective.name = {bounds['tag']!r}: no such objective; give one of {', '.join(_names())}"
        case "extra_forbidden":
            known = _options(str(name), path[:-1])
            near = difflib.get_close_matches(str(path[-1]), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(known)}"
            return f"{key}: {name!r} has no such option; {hint}"
        case "value_error":
            return f"{key}: {detail['msg'].removeprefix('Value error, ')}"
        case "greater_than_equal":
            return f"{key} = {value!r}: must be >= {bounds['ge']:g}; give such a number"
        case "greater_than":
            return f"{key} = {value!r}: must be > {bounds['gt']:g}; give such a number"
        case "less_than_equal":
            return f"{key} = {value!r}: must be <= {bounds['le']:g}; give such a number"
        case "less_than":
            return f"{key} = {value!r}: must be < {bounds['lt']:g}; give such a number"
        case _:
            return f"{key} = {value!r}: {detail['msg'][0].lower()}{detail['msg'][1:]}"


def _names() -> list[str]:
    return [objective.model_fields["name"].default for objective in OBJECTIVES]


def _options(name: str, path: list[int | str]) -> list[str]:
    """The options of an objective, or of the table inside it that `path` leads to."""
    objective = next(model for model in OBJECTIVES if model.model_fields["name"].default == name)
    tables: dict[str, type[BaseModel]] = {
        "image_image": ImageImageTerm, "mixing": MixingTerm, "individual_temperature": IndividualTemperature
    }  # fmt: skip
    model = tables[str(path[0])] if path else objective
    return [field for field in model.model_fields if field != "name"]
