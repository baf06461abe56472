"""Samples that repeat another one: the same bytes, the same picture, nearly the same caption."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import numpy as np
import numpy.typing as npt
import polars as pl

By = Literal["exact", "perceptual", "text"]

HASH_BITS = 64
SHINGLE_CHARS = 5
NUM_PERMUTATIONS = 128


@dataclass(frozen=True)
class DedupOptions:
    by: tuple[By, ...] = ("exact",)
    max_bits: int = 6
    """Perceptual hashes that differ in so many bits, or fewer, are one picture. Copies at other sizes and
    qualities differ by up to 8, different photos by 14 or more; small or flat pictures lie closer."""
    similarity: float = 0.8
    """Captions whose character 5-grams have at least this Jaccard similarity are one caption."""
    keep: Literal["first", "largest"] = "first"


@dataclass(frozen=True)
class Duplicate:
    """Two rows of a table."""

    dropped: int
    kept: int
    by: By
    distance: float
    """0 for exact; bits for perceptual; 1 - similarity for text."""


def find_duplicates(frame: pl.DataFrame, options: DedupOptions) -> list[Duplicate]:
    """Which rows to drop, and for which kept row each. Deterministic.

    Rows are visited in the order of preference; one is dropped if it is close to a row that is kept, so that
    a chain of small differences never joins what is far apart. The kinds in `by` follow one another, each on
    what is left.
    """
    order = _preference(frame, options)
    dropped: dict[int, Duplicate] = {}
    for by in options.by:
        left = [row for row in order if row not in dropped]
        for duplicate in drop_greedily(len(left), _pairs(frame[left], by, options)):
            found = replace(duplicate, dropped=left[duplicate.dropped], kept=left[duplicate.kept], by=by)
            dropped[found.dropped] = found
    # Who was kept at first may have been dropped by a later kind: point to the row that stayed.
    return [replace(d, kept=_final(d.kept, dropped)) for _, d in sorted(dropped.items())]


def _preference(frame: pl.DataFrame, options: DedupOptions) -> list[int]:
    match options.keep:
        case "first":
            return list(range(frame.height))
        case "largest":
            area = (
                frame["original_width"].cast(pl.Int64) * frame["original_height"].cast(pl.Int64)
            ).to_numpy()
            return [int(i) for i in np.argsort(-area, kind="stable")]


def _final(row: int, dropped: dict[int, Duplicate]) -> int:
    while row in dropped:
        row = dropped[row].kept
    return row


def drop_greedily(num_rows: int, pairs: Sequence[tuple[int, int, float]]) -> list[Duplicate]:
    """Of pairs (earlier row, later row, distance), what to drop: later rows that are close to a row that
    stays."""
    near: dict[int, list[tuple[float, int]]] = {}
    for earlier, later, distance in pairs:
        near.setdefault(later, []).append((distance, earlier))
    gone: set[int] = set()
    out: list[Duplicate] = []
    for row in range(num_rows):
        stays = [(distance, earlier) for distance, earlier in near.get(row, ()) if earlier not in gone]
        if stays:
            distance, earlier = min(stays)
            gone.add(row)
            out.append(Duplicate(dropped=row, kept=earlier, by="exact", distance=distance))
    return out


def _pairs(frame: pl.DataFrame, by: By, options: DedupOptions) -> list[tuple[int, int, float]]:
    match by:
        case "exact":
            return equal_pairs(frame["sha256"].to_list())
        case "perceptual":
            return close_hashes(frame["phash"].to_list(), options.max_bits)
        case "text":
            return similar_texts(frame["caption"].to_list(), options.similarity)


def equal_pairs(values: Sequence[str | None]) -> list[tuple[int, int, float]]:
    """(first row with the value, later row with it, 0.0); None equals nothing."""
    first: dict[str, int] = {}
    out: list[tuple[int, int, float]] = []
    for row, value in enumerate(values):
        if value is not None and first.setdefault(value, row) != row:
            out.append((first[value], row, 0.0))
    return out


def close_hashes(hashes: Sequence[str | None], max_bits: int) -> list[tuple[int, int, float]]:
    """All pairs of 64-bit hashes (16 hex digits) within a Hamming distance, exactly; None is close to
    nothing.

    Cut into max_bits + 1 bands, two such hashes agree in at least one band whole (pigeonhole), so only rows
    that share a band's value are compared: Norouzi et al., "Fast exact search in Hamming space",
    https://arxiv.org/abs/1307.2982.
    """
    rows = np.array([row for row, value in enumerate(hashes) if value is not None], dtype=np.int64)
    values = np.array([int(value, 16) for value in hashes if value is not None], dtype=np.uint64)
    found: dict[tuple[int, int], float] = {}
    # Equal hashes come once to the search: a picture that fills half the data must not make all pairs of its
    # copies.
    unique, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    for i, row in enumerate(rows):
        if first[inverse[i]] != i:
            found[int(rows[first[inverse[i]]]), int(row)] = 0.0
    for a, b, distance in _close_unique(unique, max_bits):
        low, high = sorted((int(rows[first[a]]), int(rows[first[b]])))
        found[low, high] = float(distance)
    return [(a, b, distance) for (a, b), distance in sorted(found.items())]


def _close_unique(values: npt.NDArray[np.uint64], max_bits: int) -> Iterator[tuple[int, int, int]]:
    edges = np.linspace(0, HASH_BITS, max_bits + 2).astype(int)
    for low, high in pairwise(edges):
        band = (values >> np.uint64(low)) & np.uint64((1 << int(high - low)) - 1)
        order = np.argsort(band, kind="stable")
        cuts = np.flatnonzero(np.diff(band[order])) + 1
        for bucket in np.split(order, cuts):
            for i in range(len(bucket) - 1):
                distances = np.bitwise_count(values[bucket[i]] ^ values[bucket[i + 1 :]])
                for j in np.flatnonzero(distances <= max_bits):
                    yield int(bucket[i]), int(bucket[i + 1 + j]), int(distances[j])


def similar_texts(texts: Sequence[str | None], similarity: float) -> list[tuple[int, int, float]]:
    """Pairs of captions at or above a Jaccard similarity of their character 5-grams, found by MinHash, then
    checked.

    The check removes every false pair; the search misses a true one now and then (datasketch's LSH, 128
    permutations).
    """
    from datasketch import MinHash, MinHashLSH

    out: list[tuple[int, int, float]] = []
    shingles: dict[int, frozenset[bytes]] = {}
    normal = [None if text is None else normalized(text) for text in texts]
    out.extend(equal_pairs(normal))
    repeated = {later for _, later, _ in out}
    # Set to miss little: what it finds too much, the check below takes out again.
    threshold = 0.85 * similarity
    lsh = MinHashLSH(threshold=threshold, num_perm=NUM_PERMUTATIONS, weights=(0.1, 0.9))
    empty = MinHash(num_perm=NUM_PERMUTATIONS, seed=1)
    for row, text in enumerate(normal):
        if text is None or row in repeated:
            continue
        grams = char_grams(text)
        sketch = empty.copy()
        sketch.update_batch(sorted(grams))
        for other in sorted(lsh.query(sketch)):
            common = len(grams & shingles[other]) / len(grams | shingles[other])
            if common >= similarity:
                out.append((other, row, 1.0 - common))
        lsh.insert(row, sketch)
        shingles[row] = grams
    return sorted(out)


def char_grams(text: str) -> frozenset[bytes]:
    starts = range(max(1, len(text) - SHINGLE_CHARS + 1))
    return frozenset(text[i : i + SHINGLE_CHARS].encode() for i in starts)


def normalized(text: str) -> str:
    """Lower case, words and numbers only, single spaces: what two spellings of a caption have in common."""
    return " ".join(re.findall(r"\w+", text.lower()))
