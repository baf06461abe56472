"""The bootstrap on counts against the bootstrap on samples."""

from __future__ import annotations

import numpy as np
import pytest

from clipstack.evaluation.intervals import (
    bootstrap,
    class_means,
    clusters,
    mean_recall,
    percentile_interval,
    share,
    two_sided_p,
)


def test_the_interval_is_that_of_drawing_samples_one_by_one() -> None:
    rng = np.random.default_rng(0)
    label, hit = rng.integers(0, 4, 400), rng.integers(0, 2, 400)
    rows = np.stack([label, hit], axis=1)
    ours = percentile_interval(bootstrap(rows, mean_recall, resamples=4000))
    drawn = []
    for _ in range(4000):
        pick = rng.integers(0, 400, 400)
        drawn.append(np.mean([hit[pick][label[pick] == k].mean() for k in range(4)]))
    assert ours == pytest.approx(percentile_interval(np.array(drawn)), abs=4e-3)


def test_captions_of_one_image_are_drawn_together() -> None:
    # Ten images with ten equal captions each are ten observations, not a hundred.
    owner = np.repeat(np.arange(10), 10)
    hit = np.repeat([True, False] * 5, 10)
    low, high = percentile_interval(bootstrap(clusters(hit, owner), share))
    alone_low, alone_high = percentile_interval(bootstrap(clusters(hit, np.arange(100)), share))
    assert high - low > 2.5 * (alone_high - alone_low)


def test_equal_models_do_not_differ_and_unequal_ones_do() -> None:
    nothing = bootstrap(np.array([[0, 1]] * 50), share)
    assert two_sided_p(nothing) == 1.0
    gain = bootstrap(np.array([[1, 1]] * 20 + [[0, 1]] * 30), share)
    assert two_sided_p(gain) < 0.01


def test_class_means_weigh_every_class_equally() -> None:
    label, value = np.array([0, 0, 1]), np.array([1, 0, 1])
    assert class_means(label, value, np.array([[3, 1, 2]]))[0] == pytest.approx((0.75 + 1) / 2)
