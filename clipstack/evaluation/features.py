"""Features of a whole data set: every rank encodes its share, every rank gets all of them, in the data's
order."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from clipstack.loading.eval_loader import EvalBatch
from clipstack.losses.types import Embeddings
from clipstack.preprocess import Preprocess
from clipstack.world import World

TEXTS_PER_CALL = 256
"""At most so many texts are encoded at once, grouped by the image batch that they come with and never by
rank: features are the same for any number of ranks, to the bit."""


class Encoder(Protocol):
    """A ClipModel, or a training engine, whose calls may be collective: every rank makes equally many of each
    kind."""

    def encode_image(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) normalised -> (N, D) unit-norm"""

    def encode_text(self, tokens: Tensor) -> Tensor:
        """(N, L) int64 -> (N, D) unit-norm"""

    def trim_tokens(self, tokens: Tensor) -> Tensor:
        """Cut off what the text tower never reads."""

    def forward(self, images: Tensor | None, tokens: Tensor | None) -> Embeddings: ...


class Features(NamedTuple):
    """n usable samples in the order of the data, the same on every rank."""

    sample: Tensor
    """(n,) int64 position in the data set"""
    label: Tensor
    """(n,) int64 class; -1 where there is none"""
    images: Tensor
    """(n, D) unit-norm"""
    texts: Tensor
    """(m, D) unit-norm, the captions of one image side by side; m is 0 where captions were not asked for"""
    owner: Tensor
    """(m,) int64 row of `images` that each caption belongs to"""


def encode_all(
    encoder: Encoder,
    batches: Iterable[EvalBatch],
    *,
    preprocess: Preprocess,
    world: World,
    captions: Callable[[tuple[str, ...]], tuple[str, ...]] | None,
) -> Features:
    """Both towers over the batches of an EvalLoader. Collective.

    captions: picks those to encode of each sample's stored ones; None encodes no text.
    """
    images, label, sample = [], [], []
    pieces: list[_Piece] = []
    for batch in batches:
        images.append(
            encoder.encode_image(preprocess.normalize(batch.images.to(world.device, non_blocking=True)))
        )
        label.append(batch.class_index)
        sample.append(torch.where(batch.mask, batch.sample_index, -1))
        if captions is not None:
            pieces += _pieces(batch, captions)
    texts, text_sample = _encode_pieces(encoder, pieces, preprocess, world, like=images[0])
    all_sample = world.all_gather(torch.cat(sample).to(world.device))
    order = _order_of_used(all_sample)
    used = all_sample[order]
    by_sample = text_sample.argsort(stable=True)  # one rank holds all captions of an image, in their order
    return Features(
        sample=used,
        label=world.all_gather(torch.cat(label).to(world.device))[order],
        images=world.all_gather(torch.cat(images))[order],
        texts=texts[by_sample],
        owner=torch.searchsorted(used, text_sample[by_sample]),
    )


def encode_texts(encoder: Encoder, texts: list[str], *, preprocess: Preprocess, world: World) -> Tensor:
    """(N, D) unit-norm, every rank encoding all of them. Collective."""
    parts = [
        encode_tokens(encoder, preprocess.tokenize(texts[start : start + TEXTS_PER_CALL]), world)
        for start in range(0, len(texts), TEXTS_PER_CALL)
    ]
    return torch.cat(parts)


def encode_tokens(encoder: Encoder, tokens: Tensor, world: World) -> Tensor:
    """(N, context_length) int64 on the CPU -> (N, D)."""
    return encoder.encode_text(encoder.trim_tokens(tokens).to(world.device))


def logit_scale_of(encoder: Encoder, preprocess: Preprocess, world: World) -> float:
    """The factor on cosines, exp of the model's log scale. Collective."""
    # Through forward, since a sharded engine gathers its parameters nowhere else.
    tokens = preprocess.tokenize([""]).to(world.device)
    return math.exp(float(encoder.forward(None, tokens).logit_scale))


class _Piece(NamedTuple):
    """Captions that are encoded together."""

    texts: list[str]
    sample: list[int]


def _pieces(batch: EvalBatch, captions: Callable[[tuple[str, ...]], tuple[str, ...]]) -> Iterator[_Piece]:
    rows = zip(batch.sample_index.tolist(), batch.captions, batch.mask.tolist(), strict=True)
    pairs = [(text, sample) for sample, stored, used in rows if used for text in captions(stored)]
    for start in range(0, len(pairs), TEXTS_PER_CALL):
        texts, sample = zip(*pairs[start : start + TEXTS_PER_CALL], strict=True)
        yield _Piece(list(texts), list(sample))


def _encode_pieces(
    encoder: Encoder, pieces: list[_Piece], preprocess: Preprocess, world: World, *, like: Tensor
) -> tuple[Tensor, Tensor]:
    """(m, D) features of all ranks' texts and (m,) their samples, in rank order. Collective."""
    texts, sample = [like.new_empty((0, like.shape[1]))], [torch.empty(0, dtype=torch.int64)]
    # Ranks may hold different numbers of captions: those that run out encode an empty text, which nobody
    # keeps.
    for k in range(_max_over_ranks(len(pieces), world)):
        piece = pieces[k] if k < len(pieces) else _Piece([""], [-1])
        texts.append(encode_tokens(encoder, preprocess.tokenize(piece.texts), world))
        sample.append(torch.tensor(piece.sample))
    rows = _max_over_ranks(sum(map(len, sample)), world)
    all_sample = world.all_gather(_padded(torch.cat(sample).to(world.device), rows, fill=-1))
    all_texts = world.all_gather(_padded(torch.cat(texts), rows, fill=0))
    return all_texts[all_sample >= 0], all_sample[all_sample >= 0]


def _max_over_ranks(value: int, world: World) -> int:
    return int(world.all_reduce(torch.tensor(value, device=world.device), op=dist.ReduceOp.MAX))


def _padded(rows: Tensor, length: int, *, fill: int) -> Tensor:
    padding = rows.new_full((length - len(rows), *rows.shape[1:]), fill)
    return torch.cat([rows, padding])


def _order_of_used(sample: Tensor) -> Tensor:
    """Rows with a sample, in the order of the data."""
    order = sample.argsort(stable=True)
    return order[sample[order] >= 0]
