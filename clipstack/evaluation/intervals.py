"""How far to trust a measured share: bootstrap over samples, done exactly on the counts of distinct outcomes.

Drawing N samples with replacement and counting outcomes is one multinomial draw, so that a million samples
cost what their few distinct outcomes cost. Efron and Tibshirani, An Introduction to the Bootstrap, chapter 6.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]
Statistic = Callable[[Int64, Int64], Float64]
"""(u, k) distinct outcomes and (R, u) how often each was drawn -> (R,) the statistic of each resample."""

RESAMPLES = 2000
LEVEL = 0.95


def bootstrap(outcomes: Int64, statistic: Statistic, *, seed: int = 0, resamples: int = RESAMPLES) -> Float64:
    """outcomes (N, k), one row a sample -> (resamples,) values of the statistic."""
    cells, counts = np.unique(outcomes, axis=0, return_counts=True)
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(len(outcomes), counts / counts.sum(), size=resamples)
    return statistic(cells, drawn)


def percentile_interval(values: Float64, *, level: float = LEVEL) -> tuple[float, float]:
    """The middle share `level` of the values."""
    low, high = np.nanquantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def two_sided_p(differences: Float64) -> float:
    """How often a resampled difference lies on the other side of zero, twice the smaller tail.

    Never 0: with R resamples nothing below 2 / (R + 1) can be told.
    """
    tail = min((differences <= 0).sum(), (differences >= 0).sum())
    return float(min(1.0, 2 * (tail + 1) / (len(differences) + 1)))


def share(cells: Int64, drawn: Int64) -> Float64:
    """Statistic of rows (hits, trials): all hits by all trials."""
    hits: Float64 = (drawn @ cells[:, 0]) / (drawn @ cells[:, 1])
    return hits


def mean_recall(cells: Int64, drawn: Int64) -> Float64:
    """Statistic of rows (class, hit): the mean of the recalls of the classes that were drawn."""
    return class_means(cells[:, 0], cells[:, 1], drawn)


def class_means(label: Int64, value: Int64, drawn: Int64) -> Float64:
    """(R,) the mean over classes of the mean value in each class, for `drawn` (R, u) counts of u outcomes."""
    classes, place = np.unique(label, return_inverse=True)
    total = np.zeros((len(drawn), len(classes)))
    trials = np.zeros((len(drawn), len(classes)))
    for cell, column in enumerate(place):
        trials[:, column] += drawn[:, cell]
        total[:, column] += drawn[:, cell] * value[cell]
    means = np.divide(total, trials, out=np.full_like(total, np.nan), where=trials > 0)
    out: Float64 = np.nanmean(means, axis=1)
    return out


def clusters(hit: npt.NDArray[np.bool_], owner: Int64) -> Int64:
    """(m,) hits of queries and (m,) the sample each belongs to -> (samples, 2) hits and queries of each
    sample.

    Captions of one image are drawn together: they are not independent.
    """
    trials = np.bincount(owner)
    hits = np.bincount(owner, weights=hit).astype(np.int64)
    return np.stack([hits, trials], axis=1)[trials > 0]
