"""What is in shards, in numbers: sizes, captions, formats, rights, duplicates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import polars as pl

from data_pipelines.rights import RIGHTS_COLUMNS
from data_pipelines.shard_rows import ShardRows

QUANTILES = (0.0, 0.05, 0.5, 0.95, 1.0)
TOP = 10
"""So many values of a column are listed by name."""


@dataclass(frozen=True)
class Spread:
    """A column of numbers: its mean and the quantiles of `QUANTILES`."""

    mean: float
    quantiles: tuple[float, ...]


@dataclass(frozen=True)
class Shares:
    """A column of names: how many samples bear each of the most frequent, how many names there are, how many
    bear none."""

    top: tuple[tuple[str, int], ...]
    distinct: int
    missing: int


@dataclass(frozen=True)
class Stats:
    shards: int
    samples: int
    unusable: int
    """Samples without an image that can be read."""
    image_bytes: int
    spreads: dict[str, Spread]
    formats: Shares
    labels: Shares
    rights: dict[str, Shares]
    languages: Shares
    duplicate_images: int
    """Samples whose image bytes an earlier sample has."""
    duplicate_captions: int
    duplicate_looks: int | None
    """Samples whose perceptual hash an earlier sample has; None where there are no hashes."""
    without_caption: int


NUMBERS = {
    "width": pl.col("width"),
    "height": pl.col("height"),
    "short side": pl.min_horizontal("width", "height"),
    "aspect ratio": pl.max_horizontal("width", "height") / pl.min_horizontal("width", "height"),
    "image KB": pl.col("image_bytes") / 1000,
    "caption characters": pl.col("caption_chars"),
    "caption words": pl.col("caption_words"),
}


def compute_stats(rows: ShardRows, *, num_shards: int) -> Stats:
    """Pure. Captions are counted where there are any, duplicates over all shards."""
    frame = rows.frame
    captioned = frame.filter(pl.col("caption").is_not_null())
    hashed = frame.filter(pl.col("phash").is_not_null())
    spreads = {
        name: _spread((captioned if name.startswith("caption") else frame).select(number).to_series())
        for name, number in NUMBERS.items()
    }
    return Stats(
        shards=num_shards,
        samples=frame.height,
        unusable=len(rows.unusable),
        image_bytes=int(frame["image_bytes"].sum()),
        spreads={name: spread for name, spread in spreads.items() if spread is not None},
        formats=_shares(frame["format"]),
        labels=_shares(frame["label"].cast(pl.String)),
        rights={name: _shares(frame[name]) for name in RIGHTS_COLUMNS if name != "url"},
        languages=_shares(frame["language"]),
        duplicate_images=frame.height - frame["sha256"].n_unique(),
        duplicate_captions=captioned.height - captioned["caption"].n_unique(),
        duplicate_looks=hashed.height - hashed["phash"].n_unique() if hashed.height else None,
        without_caption=frame.height - captioned.height,
    )


def _spread(column: pl.Series) -> Spread | None:
    if not column.len():
        return None
    values = tuple(float(column.quantile(q, "nearest") or 0.0) for q in QUANTILES)
    return Spread(mean=float(column.cast(pl.Float64).mean() or 0.0), quantiles=values)  # type: ignore[arg-type]


def _shares(column: pl.Series) -> Shares:
    named = column.drop_nulls()
    # Ties by name, so that equal data give equal reports.
    counts = named.value_counts().sort(["count", named.name], descending=[True, False]).head(TOP)
    return Shares(
        top=tuple((str(name), int(count)) for name, count in counts.iter_rows()),
        distinct=named.n_unique(),
        missing=column.len() - named.len(),
    )


def share_tables(stats: Stats) -> list[tuple[str, Shares]]:
    """Those that say something: rights always, since their absence is news too."""
    optional = (("label", stats.labels), ("language", stats.languages))
    return [
        ("format", stats.formats),
        *stats.rights.items(),
        *((name, shares) for name, shares in optional if shares.top),
    ]


def histogram(column: pl.Series, *, bins: int = 24) -> list[tuple[float, float, int]]:
    """(from, to, count) of equal bins between the 0.5 % and 99.5 % quantiles; what lies outside counts in the
    end bins."""
    if not column.len():
        return []
    low = float(column.quantile(0.005, "nearest") or 0.0)
    high = float(column.quantile(0.995, "nearest") or 0.0)
    if high <= low:
        return [(low, low, column.len())]
    whole = column.dtype.is_integer()
    if whole:
        bins = min(bins, int(high - low) + 1)
    width = (high - low + (1 if whole else 0)) / bins
    places = ((column.cast(pl.Float64) - low) / width).floor().clip(0, bins - 1).cast(pl.Int64)
    counts: dict[Any, int] = dict(places.value_counts().iter_rows())
    # A bar of whole numbers ends with the last number in it, not with the first of the next.
    inside = 1 if whole else 0
    return [(low + i * width, low + (i + 1) * width - inside, counts.get(i, 0)) for i in range(bins)]
