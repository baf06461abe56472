"""The task probe of `clipstack eval`: what can be learned from frozen image features."""

from __future__ import annotations

from typing import Any

import numpy as np

from clipstack.errors import ConfigError, DataError
from clipstack.evaluation.data import EvalData
from clipstack.evaluation.intervals import bootstrap, percentile_interval, share
from clipstack.evaluation.report import Report
from clipstack.evaluation.task import Setup, encode_data, first_reason, source_of, with_counts


def probe_report(
    setup: Setup, train: EvalData, test: EvalData, *, neighbours: int, inverse_penalty: float
) -> Report:
    """Linear probe and k nearest neighbours on frozen image features. Raises DataError without labelled
    samples.

    Labels are the data's own numbers, except between two trees, whose classes are matched by their folders'
    names. Raises ConfigError for a class that only the test data have.
    """
    from clipstack.evaluation.probes import knn_hits, linear_probe_hits

    numbers = _numbers_in(train, test)
    train_features, train_skipped = encode_data(setup, train, with_texts=False)
    features, skipped = encode_data(setup, test, with_texts=False)
    parts = []
    for data, part, left_out in ((train, train_features, train_skipped), (test, features, skipped)):
        known = part.label >= 0
        if not bool(known.any()):
            raise DataError(f"{data.path}: no sample with a class; {first_reason(left_out, part, 0)}")
        parts.append((part.images[known].cpu().numpy(), part.label[known].cpu().numpy()))
    (train_x, train_y), (x, y) = parts
    y = y if numbers is None else numbers[y]

    def fit() -> tuple[Any, Any]:
        return (
            linear_probe_hits(train_x, train_y, x, y, inverse_penalty=inverse_penalty),
            knn_hits(train_x, train_y, x, y, neighbours=neighbours),
        )

    linear, nearest = setup.world.from_main(fit)
    hits = {"linear_probe_top1": linear, "knn_top1": nearest}
    once = np.ones(len(y), dtype=np.int64)
    return Report(
        task="probe",
        n=len(y),
        source=source_of(setup, test, None),
        metrics={name: float(hit.mean()) for name, hit in hits.items()},
        intervals={
            name: percentile_interval(bootstrap(np.stack([hit.astype(np.int64), once], axis=1), share))
            for name, hit in hits.items()
        },
        skipped=with_counts(skipped, without_class=int((features.label < 0).sum())),
        details={
            "n_train": len(train_y),
            "train_data": train.path,
            "neighbours": neighbours,
            "inverse_penalty": inverse_penalty,
        },
        outcomes={
            "sample": features.sample[features.label >= 0].cpu().numpy(),
            **{name: hit.astype(np.int64) for name, hit in hits.items()},
        },
    )


def _numbers_in(train: EvalData, test: EvalData) -> Any:
    """(C,) the training data's number of each class of the test data; None where both count alike."""
    if train.folders is None or test.folders is None:
        return None
    unknown = [name for name in test.folders if name not in train.folders]
    if unknown:
        raise ConfigError(
            f"--data {test.path}: {len(unknown)} class folders that --train-data {train.path} lacks, such as "
            f"{unknown[0]!r}"
        )
    return np.array([train.folders.index(name) for name in test.folders])
