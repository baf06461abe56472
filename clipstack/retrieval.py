"""Image-text retrieval as pure functions on features, in tiles: the matrix of all similarities is never held.

A query's rank is the number of gallery items that come before its best match; of equally similar items the
one with the lower index comes first, so that a model that maps everything to one point scores chance and not
100 %.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from clipstack.world import World

Int64 = npt.NDArray[np.int64]
RECALL_AT = (1, 5, 10)
TILE = 1024
"""Rows and columns of a tile: 4 MiB of fp32, small enough to stay near the processor."""


class Ranks(NamedTuple):
    """0 is a hit at the first place."""

    image_to_text: Int64
    """(N,) for each image, of the best placed of its captions"""
    text_to_image: Int64
    """(M,) for each caption, of its image"""


def retrieval_ranks(
    images: Tensor,
    texts: Tensor,
    owner: Tensor | None = None,
    *,
    world: World | None = None,
    tile: int = TILE,
) -> Ranks:
    """images (N, D) and texts (M, D) unit-norm; owner (M,) int64: the row of the image that each caption
    belongs to, none: caption i to image i. Every image needs a caption.

    Time N * M * D, memory tile^2. With a world, ranks share the work and every rank gets the whole answer;
    its size changes no bit of it. Raises ValueError for an owner that does not fit. Collective.
    """
    world = world or World()
    owner = torch.arange(len(texts), device=texts.device) if owner is None else owner.to(texts.device)
    if len(owner) != len(texts):
        raise ValueError(f"owner: {len(owner)} numbers for {len(texts)} texts")
    captions = owner.bincount(minlength=len(images))  # (N,)
    if len(captions) > len(images):
        raise ValueError(f"owner: names image {len(captions) - 1} of {len(images)}")
    if not bool((captions > 0).all()):
        raise ValueError(f"owner: image {int(captions.argmin())} has no text")
    tiles = _Tiles(images, texts, tile)
    own = _scores_of_pairs(tiles, owner)  # (M,)
    best_text = _best_text(own, owner, len(images))  # (N,) index of each image's best caption
    rows = _Target(own[best_text], best_text)
    columns = _Target(own, owner)
    before_text = torch.zeros(len(images), dtype=torch.int64, device=texts.device)
    before_image = torch.zeros(len(texts), dtype=torch.int64, device=texts.device)
    for row, column in tiles.of_rank(world):
        scores = tiles.scores(row, column)
        before_text[row] += _count_before(scores, rows.part(row), column.start, dim=1)
        before_image[column] += _count_before(scores, columns.part(column), row.start, dim=0)
    ranks = (world.all_reduce(part).cpu().numpy() for part in (before_text, before_image))
    return Ranks(*ranks)


class _Tiles:
    """Blocks of the similarity matrix. The same block always comes out of the same product, so equal to the
    bit."""

    def __init__(self, images: Tensor, texts: Tensor, size: int) -> None:
        self._images, self._texts = images, texts
        self.rows, self.columns = _slices(len(images), size), _slices(len(texts), size)
        self._buffer = images.new_empty(min(size, len(images)) * min(size, len(texts)))

    def scores(self, row: slice, column: slice) -> Tensor:
        """(rows, columns), valid until the next call."""
        images, texts = self._images[row], self._texts[column]
        out = self._buffer[: len(images) * len(texts)].view(len(images), len(texts))
        return torch.mm(images, texts.T, out=out)

    def of_rank(self, world: World) -> Iterator[tuple[slice, slice]]:
        for row in self.rows[world.rank :: world.size]:
            for column in self.columns:
                yield row, column


def _slices(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _scores_of_pairs(tiles: _Tiles, owner: Tensor) -> Tensor:
    """(M,) similarity of each caption and its image, out of the very tiles that are counted later."""
    found = torch.empty(len(owner), device=owner.device)
    for column in tiles.columns:
        image = owner[column]
        low, high = int(image.min()), int(image.max())
        for row in tiles.rows:
            if row.start <= high and low < row.stop:
                mine = ((image >= row.start) & (image < row.stop)).nonzero()[:, 0]
                found[column.start + mine] = tiles.scores(row, column)[image[mine] - row.start, mine]
    return found


def _best_text(own: Tensor, owner: Tensor, num_images: int) -> Tensor:
    """(N,) index of the caption that is most similar to its image; of equal ones the first."""
    by_score = own.argsort(descending=True, stable=True)
    first = by_score[owner[by_score].argsort(stable=True)]  # grouped by image, the best first
    starts = torch.searchsorted(owner[first], torch.arange(num_images, device=owner.device))
    return first[starts]


class _Target(NamedTuple):
    """What a query looks for: its similarity and its place in the gallery."""

    score: Tensor
    place: Tensor

    def part(self, rows: slice) -> _Target:
        return _Target(self.score[rows], self.place[rows])


def _count_before(scores: Tensor, target: _Target, start: int, *, dim: int) -> Tensor:
    """How many gallery items of a tile come before each query's target: (queries,).

    dim: along which the gallery runs, from place `start` on; the queries run along the other.
    """
    stop = start + scores.shape[dim]
    # Equal scores count where they stand before the target. To the left of it that is x >= target, or x > the
    # next smaller number: one comparison for whole tiles.
    below = torch.nextafter(target.score, torch.full_like(target.score, -torch.inf))
    bound = torch.where(target.place >= stop, below, target.score)
    count = _count_true(scores > bound.unsqueeze(dim), dim)
    inside = ((target.place >= start) & (target.place < stop)).nonzero()[:, 0]
    if len(inside):
        place = torch.arange(start, stop, device=scores.device).unsqueeze(1 - dim)
        equal = scores.index_select(1 - dim, inside) == target.score[inside].unsqueeze(dim)
        count[inside] += (equal & (place < target.place[inside].unsqueeze(dim))).sum(dim=dim)
    return count


def _count_true(mask: Tensor, dim: int) -> Tensor:
    """mask.sum(dim) of a (Q, G) bool tensor, some twenty times as fast: eight counters in each 64-bit
    word."""
    rows, columns = mask.shape
    words = F.pad(mask, (0, -columns % 8)).view(torch.int64)  # (Q, G / 8)
    # A counter is a byte, so at most 255 words are added before the bytes are taken apart.
    sums = torch.stack([part.sum(dim=dim) for part in torch.split(words, 255, dim=dim)])
    counters = sums.view(torch.uint8).sum(dim=0, dtype=torch.int64)
    return counters[:columns] if dim == 0 else counters.view(rows, 8).sum(dim=1)


def recall_at(ranks: Int64, k: int) -> float:
    """Share of queries whose match is among the first k."""
    return float((ranks < k).mean())


def median_rank(ranks: Int64) -> float:
    """1 is the first place."""
    return float(np.median(ranks) + 1)


RETRIEVAL_METRICS = tuple(
    f"{direction}_{metric}"
    for direction in Ranks._fields
    for metric in (*(f"r{k}" for k in RECALL_AT), "median_rank")
)


def retrieval_metrics(ranks: Ranks) -> dict[str, float]:
    """Recalls as fractions 0-1, median ranks from 1."""
    out: dict[str, float] = {}
    for direction, of_direction in ranks._asdict().items():
        out |= {f"{direction}_r{k}": recall_at(of_direction, k) for k in RECALL_AT}
        out[f"{direction}_median_rank"] = median_rank(of_direction)
    return out
