"""Linear probe and k nearest neighbours on frozen features, by scikit-learn."""

from __future__ import annotations

import warnings

import numpy as np
import numpy.typing as npt

from clipstack.errors import ConfigError

Features = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]
Hits = npt.NDArray[np.bool_]

MAX_ITERATIONS = 1000


def linear_probe_hits(
    train_x: Features, train_y: Labels, x: Features, y: Labels, *, inverse_penalty: float
) -> Hits:
    """(N,) whether logistic regression on (M, D) training features is right about each of (N, D). L-BFGS, L2
    penalty.

    inverse_penalty: scikit-learn's C. https://arxiv.org/abs/2103.00020, appendix A.3.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=inverse_penalty, max_iter=MAX_ITERATIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        try:
            model.fit(train_x, train_y)
        except ConvergenceWarning as error:
            raise ConfigError(
                f"--inverse-penalty {inverse_penalty}: no convergence in {MAX_ITERATIONS} iterations; "
                "take a smaller one"
            ) from error
    hits: Hits = model.predict(x) == y
    return hits


def knn_hits(train_x: Features, train_y: Labels, x: Features, y: Labels, *, neighbours: int) -> Hits:
    """(N,) whether the majority of the most similar training features is of the right class."""
    from sklearn.neighbors import KNeighborsClassifier

    if neighbours > len(train_x):
        raise ConfigError(
            f"--neighbours {neighbours}: more than the {len(train_x)} training samples; take fewer"
        )
    model = KNeighborsClassifier(n_neighbors=neighbours, metric="cosine")
    hits: Hits = model.fit(train_x, train_y).predict(x) == y
    return hits
