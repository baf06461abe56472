"""The tables of benchmarks/quality.py: means over seeds with their intervals, paired where that is right."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.quality_arms import ARMS, BASE, ON_SHAPES, PEER

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval; half is infinite where one run cannot tell."""

    mean: float
    half: float

    def percent(self, *, signed: bool = False) -> str:
        mean = f"{100 * self.mean:{'+' if signed else ''}.1f}"
        return mean if math.isinf(self.half) else f"{mean} ± {100 * self.half:.1f}"


def mean_interval(values: Sequence[float]) -> Interval:
    """Student's interval of a mean, at 95 %."""
    from scipy.stats import t

    count = len(values)
    mean = sum(values) / count
    if count < 2:
        return Interval(mean, math.inf)
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1))
    return Interval(mean, float(t.ppf((1 + LEVEL) / 2, count - 1)) * spread / math.sqrt(count))


def welch_interval(ours: Sequence[float], theirs: Sequence[float]) -> Interval:
    """Interval of the difference of two means whose runs have nothing in common (Welch 1947), at 95 %."""
    from scipy.stats import ttest_ind

    difference = sum(ours) / len(ours) - sum(theirs) / len(theirs)
    if min(len(ours), len(theirs)) < 2:
        return Interval(difference, math.inf)
    found = ttest_ind(ours, theirs, equal_var=False).confidence_interval(LEVEL)
    return Interval(difference, float(found.high - found.low) / 2)


def read_results(out: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(out.glob("*-seed*.json"))]


def report(results: Sequence[Mapping[str, Any]], *, value: str = "top1") -> str:
    """Markdown. Ours share seeds, weights at the start and order of data, so their differences are paired;
    against open_clip they are not."""
    lines = []
    peers = [result for result in results if result["arm"] == PEER]
    peer = {result["seed"]: result["values"][value] for result in peers}
    for budget in ("samples", "time"):
        group = [result for result in results if result["budget"] == budget]
        if not group:
            continue
        if budget == "time":  # the others were cut to the time of the peer's runs at equal samples
            group += peers
        arms = {arm: {r["seed"]: r["values"][value] for r in group if r["arm"] == arm} for arm in ARMS}
        arms = {arm: by_seed for arm, by_seed in arms.items() if by_seed}
        lines += [
            f"\nequal {budget}\n",
            "| arm | seeds | top-1, % | minus clip | minus open_clip | samples | seconds | core-seconds |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        for arm, by_seed in arms.items():
            cells = [arm, str(len(by_seed)), mean_interval(list(by_seed.values())).percent()]
            base = arms.get(BASE, {})
            shared = [by_seed[seed] - base[seed] for seed in by_seed if seed in base]
            paired = shared and arm not in (BASE, PEER)
            cells.append(mean_interval(shared).percent(signed=True) if paired else "")
            against = peer and arm != PEER
            unpaired = welch_interval(list(by_seed.values()), list(peer.values())) if against else None
            cells.append(unpaired.percent(signed=True) if unpaired else "")
            runs = [result for result in group if result["arm"] == arm]
            for figure in ("samples", "train_s", "cpu_s"):
                cells.append(f"{sum(result[figure] for result in runs) / len(runs):,.0f}")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def report_shapes(results: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: every factor of the demo's test, a row an arm; under each arm what differs from clip, paired
    by seed."""
    names = list(results[0]["values"])
    lines = [f"| arm | seeds | {' | '.join(names)} |", f"| --- | --- |{' --- |' * len(names)}"]
    base = {result["seed"]: result["values"] for result in results if result["arm"] == BASE}
    for arm in ON_SHAPES:
        mine = {result["seed"]: result["values"] for result in results if result["arm"] == arm}
        if not mine:
            continue
        cells = [mean_interval([values[name] for values in mine.values()]).percent() for name in names]
        lines.append(f"| {arm} | {len(mine)} | {' | '.join(cells)} |")
        shared = [seed for seed in mine if seed in base and arm != BASE]
        if shared:
            gains = [[mine[seed][name] - base[seed][name] for seed in shared] for name in names]
            cells = [mean_interval(gain).percent(signed=True) for gain in gains]
            lines.append(f"| {arm} minus clip | {len(shared)} | {' | '.join(cells)} |")
    return "\n".join(lines)
