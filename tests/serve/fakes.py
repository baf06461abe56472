"""A runtime without a model: vectors from a formula, and a gate that holds the device for as long as a test
wants.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence

import numpy as np

from serve.errors import ErrorCode, ServeError
from serve.runtime import Float32, ModelInfo, TokenIds, Tokens, UInt8

START, END = 1, 2
SIDE = 8
POISON = "poison"


def unit(seed_bytes: bytes, dimensions: int) -> Float32:
    seed = int.from_bytes(hashlib.sha256(seed_bytes).digest()[:8], "little")
    vector = np.random.default_rng(seed).standard_normal(dimensions)
    return (vector / np.linalg.norm(vector)).astype(np.float32)


class FakeRuntime:
    """One token a word. A text's vector depends on its words and the fingerprint; an image's on its pixels,
    too.

    `gate`: set while the device may work. `started`: set when a batch has begun. `batches`: (kind, size) of
    each.
    """

    def __init__(
        self,
        fingerprint: str = "fake-1",
        *,
        dimensions: int = 16,
        nested: tuple[int, ...] = (8,),
        probabilities: str = "softmax",
        logit_bias: float = 0.0,
    ) -> None:
        self.info = ModelInfo(
            fingerprint=fingerprint, dimensions=dimensions, context_length=12, image_size=(SIDE, SIDE),
            probabilities=probabilities, logit_scale=10.0, logit_bias=logit_bias, nested_dimensions=nested,
            engine="fake",
        )  # fmt: skip
        self.gate = threading.Event()
        self.gate.set()
        self.started = threading.Event()
        self.batches: list[tuple[str, int]] = []
        self.fail_on: set[int] = set()
        self._vocabulary: dict[str, int] = {}

    def hold(self) -> None:
        self.started.clear()
        self.gate.clear()

    def tokenize(self, text: str, *, truncate: bool) -> Tokens:
        words = text.split()
        room = self.info.context_length - 2
        if len(words) > room and not truncate:
            raise ServeError(
                ErrorCode.TEXT_TOO_LONG, f"the text has {len(words) + 2} tokens; the model reads 12"
            )
        ids = [
            int.from_bytes(hashlib.sha256(word.encode("utf-8", "replace")).digest()[:4], "little")
            for word in words[:room]
        ]
        if POISON in words:
            self.fail_on.add(ids[words.index(POISON)])
        return Tokens(np.array([START, *ids, END], dtype=np.int64), len(ids) + 2, was_cut=len(words) > room)

    def prepare_image(self, pixels: UInt8) -> UInt8:
        rows = np.linspace(0, pixels.shape[0] - 1, SIDE).astype(int)
        columns = np.linspace(0, pixels.shape[1] - 1, SIDE).astype(int)
        return np.ascontiguousarray(pixels[rows][:, columns].transpose(2, 0, 1))

    def encode_images(self, images: Sequence[UInt8]) -> Float32:
        self._work("image", len(images))
        return np.stack([self.vector(image.tobytes()) for image in images])

    def encode_texts(self, texts: Sequence[TokenIds]) -> Float32:
        self._work("text", len(texts))
        if any(int(token) in self.fail_on for ids in texts for token in ids):
            raise RuntimeError("the device cannot do this")
        return np.stack([self.vector(ids.tobytes()) for ids in texts])

    def vector(self, content: bytes) -> Float32:
        return unit(self.info.fingerprint.encode() + content, self.info.dimensions)

    def text_vector(self, text: str) -> Float32:
        return self.vector(self.tokenize(text, truncate=True).ids.tobytes())

    def _work(self, kind: str, size: int) -> None:
        self.batches.append((kind, size))
        self.started.set()
        assert self.gate.wait(30), "a test forgot to open the gate"
