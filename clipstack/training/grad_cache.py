"""GradCache: a rank's share of the batch through the towers, all at once or in micro-batches with exact
gradients.

Adding up the losses of micro-batches would not give the loss of the batch: each would know only its own
negatives. The exact way is GradCache (https://arxiv.org/abs/2101.06983): features of all micro-batches
without a graph, one loss on all of them, then each micro-batch again with a graph, which takes the loss's
gradient at its features. Activations are held for one micro-batch only, so memory does not grow with the
batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from clipstack.losses.types import Embeddings


class Part(NamedTuple):
    """Some rows of a rank's share, still as the loader made them: uint8 images, tokens, and a key a row for
    dropout."""

    images: Tensor
    tokens: Tensor
    keys: Tensor

    def cut(self, size: int) -> list[Part]:
        """Parts of `size` rows each."""
        return [Part(*(tensor[i : i + size] for tensor in self)) for i in range(0, len(self.tokens), size)]


Encode = Callable[[Part], Embeddings]
"""Both towers on some rows. Equal calls draw equal dropout."""


class Backward(Protocol):
    def __call__(self, loss: Tensor) -> None:
        """Gradients of a scalar, added to those of the same step and averaged over ranks."""


class Passes(Protocol):
    """`forward` then `backward`, once each a step. Both are collective."""

    def forward(self, share: Part) -> Embeddings:
        """Embeddings of the whole share, to compute the loss on."""

    def backward(self, loss: Tensor) -> None:
        """The parameters' gradients of the loss on what `forward` gave."""


def make_passes(encode: Encode, backward: Backward, *, share: int, micro_batch_size: int | None) -> Passes:
    """share: rows of this rank; micro_batch_size: rows at once, None for all of them."""
    if micro_batch_size is None or micro_batch_size == share:
        return OnePass(encode, backward)
    return GradCache(encode, backward, micro_batch_size)


class OnePass:
    """The whole share at once."""

    def __init__(self, encode: Encode, backward: Backward) -> None:
        self._encode, self._backward = encode, backward

    def forward(self, share: Part) -> Embeddings:
        return self._encode(share)

    def backward(self, loss: Tensor) -> None:
        self._backward(loss)


class GradCache:
    """A micro-batch at a time, with the gradients of the whole share at once."""

    def __init__(self, encode: Encode, backward: Backward, micro_batch_size: int) -> None:
        self._encode, self._backward, self._size = encode, backward, micro_batch_size
        self._parts: Sequence[Part] = ()
        self._leaves: Embeddings | None = None

    def forward(self, share: Part) -> Embeddings:
        self._parts = share.cut(self._size)
        with torch.no_grad():
            features = [self._encode(part) for part in self._parts]
        first = features[0]
        self._leaves = Embeddings(
            image=_leaf(torch.cat([part.image for part in features])),
            text=_leaf(torch.cat([part.text for part in features])),
            logit_scale=_leaf(first.logit_scale),
            logit_bias=None if first.logit_bias is None else _leaf(first.logit_bias),
        )
        return self._leaves

    def backward(self, loss: Tensor) -> None:
        assert self._leaves is not None, "forward comes first"
        loss.backward()  # type: ignore[no-untyped-call]  # through the objective, down to the features
        images, texts = self._leaves.image, self._leaves.text
        for i, part in enumerate(self._parts):
            rows = slice(i * self._size, i * self._size + len(part.tokens))
            again = self._encode(part)
            surrogate = (again.image * _grad(images)[rows]).sum() + (again.text * _grad(texts)[rows]).sum()
            # The scale and the bias have the whole loss's gradient already: it counts once, not once a part.
            # The other parts give zero, since ZeRO expects every parameter in every pass.
            counts = float(i == 0)
            surrogate = surrogate + again.logit_scale * _grad(self._leaves.logit_scale) * counts
            if again.logit_bias is not None and self._leaves.logit_bias is not None:
                surrogate = surrogate + again.logit_bias * _grad(self._leaves.logit_bias) * counts
            self._backward(surrogate)
        self._parts, self._leaves = (), None


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


def _grad(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
