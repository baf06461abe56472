"""`clipstack compare A.json B.json`: two evaluations side by side, and whether their difference is more than
luck."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clipstack.errors import ConfigError
from clipstack.evaluation.intervals import bootstrap, class_means, percentile_interval, two_sided_p
from clipstack.evaluation.report import check_writable, read_json, write_object

Int64 = npt.NDArray[np.int64]
Evaluation = Mapping[str, Any]
SIGNIFICANT = 0.05
SAMPLES = ("sample", "owner", "label")
"""Outcomes that say what was asked; they must be equal for answers to be paired."""
RANKS = {
    "top1": ("rank", 1),
    "top5": ("rank", 5),
    "image_to_text_r1": ("image_to_text", 1),
    "image_to_text_r5": ("image_to_text", 5),
    "image_to_text_r10": ("image_to_text", 10),
    "text_to_image_r1": ("text_to_image", 1),
    "text_to_image_r5": ("text_to_image", 5),
    "text_to_image_r10": ("text_to_image", 10),
}
"""Metric to its outcome and how good a rank has to be."""
HITS = {"accuracy": "correct", "linear_probe_top1": "linear_probe_top1", "knn_top1": "knn_top1"}


@dataclass(frozen=True)
class Row:
    """One metric of both. low, high: 95 % interval of B - A; p: two-sided; None where there is no test."""

    metric: str
    a: float
    b: float
    low: float | None = None
    high: float | None = None
    p: float | None = None

    @property
    def difference(self) -> float:
        return self.b - self.a


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", type=Path, metavar="A.json", help="what clipstack eval --json wrote")
    parser.add_argument("b", type=Path, metavar="B.json", help="another one, of the same task and data")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the comparison there")


def run(args: argparse.Namespace) -> int:
    """`clipstack compare`. Raises ConfigError."""
    check_writable("--json", args.json)
    a, b = read_json(args.a), read_json(args.b)
    rows = compare(a, b, names=(str(args.a), str(args.b)))
    print(table(a, b, rows))
    if args.json is not None:
        write_object(args.json, [row.__dict__ for row in rows])
    return 0


def compare(a: Evaluation, b: Evaluation, *, names: tuple[str, str] = ("A", "B")) -> list[Row]:
    """Paired bootstrap over samples; captions of one image are drawn together. Raises ConfigError for what
    cannot be paired."""
    _check_paired(a, b, names)
    return [_row(a, b, metric) for metric, value in a.items() if _is_metric(metric, value, b)]


def _check_paired(a: Evaluation, b: Evaluation, names: tuple[str, str]) -> None:
    if a["task"] != b["task"]:
        raise ConfigError(
            f"{names[1]}: task {b['task']}, and {names[0]} has {a['task']}; compare equal tasks"
        )
    if a["data_digest"] != b["data_digest"]:
        raise ConfigError(
            f"{names[1]}: its data ({b['data']}) are not those of {names[0]} ({a['data']}); "
            "evaluate both models on the same data"
        )
    if a["outcomes"].keys() != b["outcomes"].keys():
        differing = sorted(a["outcomes"].keys() ^ b["outcomes"].keys())
        raise ConfigError(f"{names[1]}: {names[0]} and it differ in the outcomes {differing}; evaluate again")
    for name in SAMPLES:
        if not np.array_equal(a["outcomes"].get(name, ()), b["outcomes"].get(name, ())):
            raise ConfigError(
                f"{names[1]}: its {b['n']} samples are not the {a['n']} of {names[0]}, though the data are; "
                "other samples were skipped: see `skipped` in both"
            )


def _is_metric(name: str, value: Any, other: Evaluation) -> bool:
    numbers = isinstance(value, float) and isinstance(other.get(name), float)
    return numbers and name not in ("format", "n", "logit_scale", "inverse_penalty")


def _row(a: Evaluation, b: Evaluation, metric: str) -> Row:
    differences = _resampled_differences(a, b, metric)
    if differences is None:
        return Row(metric, a[metric], b[metric])
    low, high = percentile_interval(differences)
    return Row(metric, a[metric], b[metric], low, high, two_sided_p(differences))


def _resampled_differences(a: Evaluation, b: Evaluation, metric: str) -> npt.NDArray[np.float64] | None:
    """(R,) B - A of each resample, or None for a metric that is no mean over samples."""
    hits = [_hits(evaluation["outcomes"], metric) for evaluation in (a, b)]
    if hits[0] is None or hits[1] is None:
        return None
    gain = hits[1].astype(np.int64) - hits[0]
    if metric == "mean_per_class_recall":
        rows = np.stack([a["outcomes"]["label"], gain], axis=1)
        return bootstrap(rows, lambda cells, drawn: class_means(cells[:, 0], cells[:, 1], drawn))
    owner = a["outcomes"]["owner"] if metric.startswith("text_to_image") else np.arange(len(gain))
    trials = np.bincount(owner)
    gains = np.bincount(owner, weights=gain).astype(np.int64)
    return bootstrap(
        np.stack([gains, trials], axis=1), lambda cells, drawn: (drawn @ cells[:, 0]) / (drawn @ cells[:, 1])
    )


def _hits(outcomes: Mapping[str, Int64], metric: str) -> Int64 | None:
    """(N,) 1 where the sample or query was answered rightly."""
    if metric in RANKS:
        name, places = RANKS[metric]
        return (outcomes[name] < places).astype(np.int64)
    if metric == "mean_per_class_recall":
        return (outcomes["rank"] < 1).astype(np.int64)
    return outcomes[HITS[metric]] if metric in HITS else None


def table(a: Evaluation, b: Evaluation, rows: list[Row]) -> str:
    """What the terminal shows."""
    lines = [
        f"A: {a['model']} ({a['fingerprint'][:12]})",
        f"B: {b['model']} ({b['fingerprint'][:12]})",
        f"{a['task']} on {a['data']}, {a['n']:,} samples; paired bootstrap, 95 %",
        "",
        f"{'metric':<28}{'A':>10}{'B':>10}{'B - A':>10}   interval of B - A      p",
    ]
    return "\n".join(lines + [_line(row) for row in rows])


def _line(row: Row) -> str:
    line = f"{row.metric:<28}{row.a:>10.4f}{row.b:>10.4f}{row.difference:>+10.4f}"
    if row.p is None or row.low is None or row.high is None:
        return line
    verdict = "" if row.p < SIGNIFICANT else "  (may be luck)"
    return f"{line}   {row.low:+.4f} to {row.high:+.4f}   {row.p:.4f}{verdict}"
