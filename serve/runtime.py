"""What the server asks of an inference engine, and the types that pass between them. Imports numpy and
nothing heavier.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from clipstack.errors import ClipstackError

Float32 = npt.NDArray[np.float32]
UInt8 = npt.NDArray[np.uint8]
TokenIds = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Gate:
    """How close an engine's vectors are to the reference: open_clip's own fp32 forward of Pillow-decoded
    images.

    Least cosine over the gate's inputs after the reference's mean vector is subtracted: raw cosines of a
    badly damaged tower can still exceed 0.999.
    """

    image: float
    text: float


@dataclass(frozen=True)
class ModelInfo:
    """What clients and the rest of the server may know of a loaded model."""

    fingerprint: str
    dimensions: int
    context_length: int
    image_size: tuple[int, int]  # height, width in pixels
    probabilities: Literal["softmax", "sigmoid"]
    logit_scale: float  # factor on the cosine, not its logarithm
    logit_bias: float = 0.0
    nested_dimensions: tuple[int, ...] = ()  # shorter widths that the model was trained for
    engine: str = "torch"
    device: str = "cpu"
    dtype: str = "float32"
    parameters: int = 0
    gate: Gate | None = None


@dataclass(frozen=True)
class Tokens:
    """One text as the text tower reads it.

    ids: (L,) int64, L <= context_length. count: tokens of the text, start and end included, padding not.
    """

    ids: TokenIds
    count: int
    was_cut: bool = False


class Runtime(Protocol):
    """One loaded model. Every method may be called from any thread."""

    @property
    def info(self) -> ModelInfo: ...

    def tokenize(self, text: str, *, truncate: bool) -> Tokens:
        """Raises ServeError: text_too_long unless `truncate`, text_special_token."""
        ...

    def prepare_image(self, pixels: UInt8) -> UInt8:
        """(H, W, 3) RGB of any size -> (3, height, width) of the model's size, not normalised yet."""
        ...

    def encode_images(self, images: Sequence[UInt8]) -> Float32:
        """N prepared images -> (N, D) unit-norm."""
        ...

    def encode_texts(self, texts: Sequence[TokenIds]) -> Float32:
        """N token rows of any lengths -> (N, D) unit-norm."""
        ...


class SelfTestError(ClipstackError):
    """A freshly loaded model whose vectors are not what they must be."""


def available_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Crowd:
    """Threads of this process that compute just now, for all of its models: they share its cores."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._preparing = 0
        self._batches = 0

    @contextmanager
    def preparing(self) -> Iterator[None]:
        """A thread that prepares an item."""
        with self._lock:
            self._preparing += 1
        try:
            yield
        finally:
            with self._lock:
                self._preparing -= 1

    @contextmanager
    def batch(self, threads: int) -> Iterator[int]:
        """A forward pass. Gives how many of `threads` it should use: those that prepare have one each, and
        all passes share the others.
        """
        with self._lock:
            self._batches += 1
            fair = max(1, (threads - self._preparing) // self._batches)
        try:
            yield fair
        finally:
            with self._lock:
                self._batches -= 1


CROWD = Crowd()


class RuntimeLoader(Protocol):
    """Loads a model by its spec, in a thread of its own. Raises ClipstackError."""

    def __call__(self) -> Runtime: ...
