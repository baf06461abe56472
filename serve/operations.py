"""What the API does, without HTTP: embed, classify, compare. Each works on one leased version from start to
end.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from serve.batching import Budget
from serve.decoding import DecodePool
from serve.errors import ErrorCode, ServeError
from serve.items import Item
from serve.label_sets import MatrixCache, MatrixKey
from serve.runtime import Float32, ModelInfo
from serve.versions import Encoded, Version, until
from serve.zero_shot import (
    Float64,
    Prediction,
    classifier_matrix,
    logits_of,
    probabilities_of,
    prompts_of,
    top_predictions,
)

PROMPT_CHUNK = 64
NEUTRAL_LABEL = ""
MAX_PREDICTIONS = 100_000  # of one reply: some 8 MB of JSON, which the event loop writes
INLINE_LOGITS = 2000  # up to these, they are computed in the event loop: cheaper than a trip to the pool


@dataclass(frozen=True)
class Classified:
    predictions: list[list[Prediction]]
    abstained: list[bool]
    encoded: Encoded


async def embed(
    version: Version,
    items: Sequence[Item],
    budget: Budget,
    *,
    deadline: float,
    truncate: bool,
    param: str = "input",
) -> Encoded:
    """Vectors of the items. Raises ServeError."""
    with budget.reserve(len(items), deadline=deadline):
        return await version.encode(items, deadline=deadline, truncate=truncate, param=param)


def shorten(encoded: Encoded, dimensions: int | None, version: Version) -> Encoded:
    """The first `dimensions` components, unit-norm again. Raises ServeError where the model was not trained
    for it.
    """
    if dimensions is None or dimensions == version.info.dimensions:
        return encoded
    check_dimensions(dimensions, version)
    head = encoded.vectors[:, :dimensions]
    unit = head / np.linalg.norm(head, axis=-1, keepdims=True)
    return Encoded(unit, encoded.num_tokens, encoded.cut)


def check_dimensions(dimensions: int | None, version: Version) -> None:
    """Raises ServeError dimensions_unsupported."""
    widths = (*version.info.nested_dimensions, version.info.dimensions)
    if dimensions is not None and dimensions not in widths:
        known = ", ".join(str(width) for width in sorted(set(widths)))
        message = f"this model was not trained for {dimensions} dimensions; it has {known}"
        raise ServeError(ErrorCode.DIMENSIONS_UNSUPPORTED, message, param="dimensions")


@dataclass(frozen=True)
class Question:
    """How inputs are to be classified."""

    labels: tuple[str, ...]
    templates: tuple[str, ...]
    is_registered: bool  # the labels are a label set's: their matrix is worth finishing when nobody waits
    top_k: int
    multi_label: bool
    abstain_below: float | None


async def classify(
    version: Version,
    items: Sequence[Item],
    question: Question,
    budget: Budget,
    cache: MatrixCache,
    pool: DecodePool,
    *,
    deadline: float,
    truncate: bool,
) -> Classified:
    """Probabilities of the labels for each item. Raises ServeError."""
    check_top_k(len(items), question)
    # A model trained with softmax says nothing of one label by itself. Beside the neutral prompt (the
    # template with no
    # label) it does: the probability is that of the label against "none in particular".
    against_neutral = question.multi_label and version.info.probabilities == "softmax"
    columns = (*question.labels, NEUTRAL_LABEL) if against_neutral else question.labels
    key = MatrixKey(version.info.fingerprint, columns, question.templates)
    num_prompts = 0 if key in cache else min(len(columns) * len(question.templates), PROMPT_CHUNK)
    with budget.reserve(min(len(items) + num_prompts, budget.max_items), deadline=deadline):
        async with until(deadline, version.clock):
            matrix = await cache.get(key, build_matrix(version, key), keep=question.is_registered)
        encoded = await version.encode(items, deadline=deadline, truncate=truncate, param="inputs")
    work = partial(judge, encoded.vectors, matrix, version.info, question, against_neutral=against_neutral)
    if len(items) * len(question.labels) <= INLINE_LOGITS:
        predictions, abstained = work()
    else:
        async with until(deadline, version.clock):
            predictions, abstained = await pool.run(work, deadline=deadline)
    return Classified(predictions, abstained, encoded)


def check_top_k(num_items: int, question: Question) -> None:
    """Raises ServeError invalid_request where the reply would hold too much: a small request could ask for
    gigabytes.
    """
    if (count := num_items * min(question.top_k, len(question.labels))) > MAX_PREDICTIONS:
        message = (
            f"{num_items} inputs with top_k {question.top_k} are {count} predictions; "
            f"one reply may hold {MAX_PREDICTIONS}: ask for fewer, or send several requests"
        )
        raise ServeError(ErrorCode.INVALID_REQUEST, message, param="top_k")


def judge(
    vectors: Float32, matrix: Float32, info: ModelInfo, question: Question, *, against_neutral: bool
) -> tuple[list[list[Prediction]], list[bool]]:
    """(N, D) inputs and the (labels, D) classifier -> for each input its best labels, and whether it is
    abstained on. against_neutral: the classifier's last row is the prompt without a label.
    """
    logits = logits_of(vectors, matrix, info)
    if against_neutral:
        logits, neutral = logits[:, :-1], logits[:, -1:]
        probabilities = probabilities_of(logits - neutral, "sigmoid")
    else:
        probabilities = probabilities_of(logits, info.probabilities)
    predictions = [
        top_predictions(*rows, question.labels, question.top_k)
        for rows in zip(logits, probabilities, strict=True)
    ]
    return predictions, abstentions(probabilities, question.abstain_below)


def abstentions(probabilities: Float64, below: float | None) -> list[bool]:
    """(N, labels) -> for each input, whether even its best label is less probable than `below`."""
    return [below is not None and float(row.max()) < below for row in probabilities]


def build_matrix(version: Version, key: MatrixKey) -> Callable[[], Awaitable[Float32]]:
    """A function that computes the classifier matrix of `key` through the version's own queue."""

    async def build() -> Float32:
        # A few labels at a time: all prompts of a large label set, or their vectors, would fill the memory.
        num_templates = len(key.templates)
        step = max(1, PROMPT_CHUNK // num_templates)
        parts = []
        with version.lease():
            for start in range(0, len(key.labels), step):
                prompts = prompts_of(key.labels[start : start + step], key.templates)
                vectors = await version.encode_prompts(
                    prompts, first_label=start, per_label=num_templates, chunk=PROMPT_CHUNK
                )
                parts.append(classifier_matrix(vectors, num_templates=num_templates))
        return np.concatenate(parts)

    return build


@dataclass(frozen=True)
class Compared:
    cosines: Float64  # (texts, images)
    encoded: Encoded


async def compare(
    version: Version,
    texts: Sequence[Item],
    images: Sequence[Item],
    budget: Budget,
    *,
    deadline: float,
    truncate: bool,
) -> Compared:
    """Cosine of every text with every image. Raises ServeError whose param names texts[i] or images[i]."""
    items = [*texts, *images]
    try:
        encoded = await embed(version, items, budget, deadline=deadline, truncate=truncate, param="item")
    except ServeError as error:
        if error.param is None:
            raise
        raise error.at(_two_lists(error.param, len(texts))) from error
    vectors = encoded.vectors.astype(np.float64)
    return Compared(vectors[: len(texts)] @ vectors[len(texts) :].T, encoded)


def _two_lists(param: str, num_texts: int) -> str:
    index = int(param.removeprefix("item[").removesuffix("]"))
    return f"texts[{index}]" if index < num_texts else f"images[{index - num_texts}]"
