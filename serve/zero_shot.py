"""Zero-shot classification as pure functions: prompts, the classifier matrix, probabilities, the answer's top
labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from clipstack.templates import check_template, fill, load_templates
from serve.errors import ErrorCode, ServeError
from serve.items import check_length, too_many
from serve.runtime import Float32, ModelInfo

Float64 = npt.NDArray[np.float64]
DEFAULT_TEMPLATES = load_templates("single")
_TEMPLATES_ARE = 'templates are "openai", "simple" or a list of texts'


@dataclass(frozen=True)
class Prediction:
    label: str
    probability: float
    logit: float


def parse_templates(value: Any, *, limit: int, max_chars: int, param: str = "templates") -> tuple[str, ...]:
    """Templates of a request: a known name, or texts with one placeholder each. Raises ServeError naming the
    entry.
    """
    if value is None:
        return DEFAULT_TEMPLATES
    if isinstance(value, str):
        return named_templates(value, param=param)
    if not isinstance(value, list) or not value:
        raise ServeError(ErrorCode.INVALID_REQUEST, _TEMPLATES_ARE, param=param)
    if len(value) > limit:
        raise too_many(len(value), "templates", limit).at(param)
    for index, template in enumerate(value):
        if not isinstance(template, str) or check_template(template) is not None:
            message = 'a template is a text with one {} for the label, such as "a photo of a {}"'
            raise ServeError(ErrorCode.INVALID_REQUEST, message, param=f"{param}[{index}]")
        check_length(template, max_chars, param=f"{param}[{index}]")
    return tuple(value)


def named_templates(name: str, *, param: str) -> tuple[str, ...]:
    """The sets that evaluation knows by the same names. Raises ServeError."""
    if name not in ("openai", "simple"):
        raise ServeError(ErrorCode.INVALID_REQUEST, _TEMPLATES_ARE, param=param)
    return load_templates(name)


def prompts_of(labels: tuple[str, ...], templates: tuple[str, ...]) -> list[str]:
    """labels x templates prompts, the templates of one label side by side. No format string is ever
    evaluated.
    """
    return [fill(template, label) for label in labels for template in templates]


def classifier_matrix(prompt_vectors: Float32, *, num_templates: int) -> Float32:
    """(labels * templates, D) unit-norm -> (labels, D): the mean over templates, unit-norm again."""
    means = (
        prompt_vectors.reshape(-1, num_templates, prompt_vectors.shape[-1]).astype(np.float64).mean(axis=1)
    )
    unit: Float32 = (means / np.linalg.norm(means, axis=-1, keepdims=True)).astype(np.float32)
    return unit


def logits_of(vectors: Float32, matrix: Float32, info: ModelInfo) -> Float64:
    """(N, D) x (labels, D) -> (N, labels): scaled cosine plus the model's bias."""
    cosine: Float64 = vectors.astype(np.float64) @ matrix.astype(np.float64).T
    return cosine * info.logit_scale + info.logit_bias


def probabilities_of(logits: Float64, how: Literal["softmax", "sigmoid"]) -> Float64:
    """(N, labels) logits -> probabilities: summing to one over the labels, or each label by itself."""
    if how == "sigmoid":
        sigmoid: Float64 = 0.5 * (1.0 + np.tanh(0.5 * logits))
        return sigmoid
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    softmax: Float64 = weights / weights.sum(axis=-1, keepdims=True)
    return softmax


def top_predictions(
    logits: Float64, probabilities: Float64, labels: tuple[str, ...], top_k: int
) -> list[Prediction]:
    """One input's (labels,) rows -> its most probable labels; equal ones in the order given."""
    order = np.argsort(-logits, kind="stable")[:top_k]
    return [Prediction(labels[i], float(probabilities[i]), float(logits[i])) for i in order]
