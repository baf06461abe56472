"""The page of `clipstack eval --html`: one file, no scripts, nothing from the network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from clipstack.errors import DataError, SampleError, ShardError
from clipstack.evaluation.report import Example, Report
from clipstack.files import write_text
from clipstack.loading.eval_loader import EvalSamples
from data_pipelines.images import open_image
from data_pipelines.page import document, number_card, thumbnail

MAX_MATRIX_CLASSES = 60
"""A matrix of more classes cannot be read; the most frequent confusions are listed instead."""
MAX_CONFUSIONS = 30

_STYLE = """
svg { max-width: 460px; }
svg .bar { fill: var(--a); } svg .line { fill: none; stroke: var(--a); stroke-width: 2; }
svg .other { fill: none; stroke: var(--b); stroke-width: 2; } svg .axis { stroke: var(--line); fill: none; }
"""


def write_page(path: Path, report: Report, samples: EvalSamples | None) -> None:
    """Raises DataError where the file cannot be written. samples: where the examples' images come from."""
    page = render_page(report, samples)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, page)
    except OSError as error:
        raise DataError(f"--html {path}: cannot be written: {error.strerror}") from error


def render_page(report: Report, samples: EvalSamples | None) -> str:
    """Equal reports give equal pages."""
    source = report.source
    sections = [
        _cards(report),
        *_curves(report),
        *_confusion(report),
        *_per_class(report),
        *(_examples(report, samples) if samples is not None else []),
        *_skipped(report),
    ]
    told = [f"model {source.model}", f"fingerprint {source.fingerprint}", f"data {source.data}"]
    if source.templates is not None:
        told.append(f"templates: {source.templates}")
    title = f"{report.task}: {source.model}"
    head = f'<h1>{escape(title)}</h1><p class="soft">{escape(" · ".join(told))}</p>'
    return document(title, head + "".join(sections), style=_STYLE)


def _cards(report: Report) -> str:
    cards = [("samples", f"{report.n:,}", "")]
    for name, value in report.metrics.items():
        low, high = report.intervals.get(name, (math.nan, math.nan))
        spread = f"<br><i>95 %: {low:.3f} to {high:.3f}</i>" if name in report.intervals else ""
        cards.append((name.replace("_", " "), f"{value:.3f}" if math.isfinite(value) else "none", spread))
    inner = "".join(number_card(value, name, spread) for name, value, spread in cards)
    return f'<div class="grid">{inner}</div>'


def _curves(report: Report) -> list[str]:
    out = []
    if "reliability" in report.details:
        out.append("<h2>Reliability</h2>" + _reliability(report.details["reliability"]))
    if "recall_curve" in report.details:
        out.append("<h2>Recall at k</h2>" + _recall(report.details["recall_curve"]))
    return out


def _reliability(bins: Mapping[str, Sequence[float]]) -> str:
    """Accuracy of each bin of confidence; a calibrated model follows the diagonal."""
    count = len(bins["count"])
    bars = "".join(_bin_bar(bins, k, width=400 / count) for k in range(count))
    axis = '<path class="axis" d="M30 10V210H430"/><path class="other" d="M30 210L430 10"/>'
    return _figure(bars + axis, "confidence of the prediction", "share that is right")


def _bin_bar(bins: Mapping[str, Sequence[float]], k: int, *, width: float) -> str:
    height = 200 * bins["accuracy"][k]
    numbers = f"confidence {bins['confidence'][k]:.3f}, accuracy {bins['accuracy'][k]:.3f}"
    told = f"{bins['count'][k]:,} samples, {numbers}"
    return (
        f'<rect class="bar" x="{30 + k * width + 1:.1f}" y="{210 - height:.1f}" width="{width - 2:.1f}" '
        f'height="{height:.1f}"><title>{told}</title></rect>'
    )


def _recall(curves: Mapping[str, Sequence[Sequence[float]]]) -> str:
    parts, legend = [], []
    for (direction, points), style in zip(curves.items(), ("line", "other"), strict=False):
        last = math.log10(max(points[-1][0], 10))
        path = "L".join(
            f"{30 + 400 * math.log10(k) / last:.1f} {210 - 200 * recall:.1f}" for k, recall in points
        )
        parts.append(f'<path class="{style}" d="M{path}"/>')
        legend.append(f"{'blue' if style == 'line' else 'red'}: {direction.replace('_', ' ')}")
    axis = '<path class="axis" d="M30 10V210H430"/>'
    return _figure("".join(parts) + axis, f"k, from 1, logarithmic ({'; '.join(legend)})", "share found")


def _figure(inner: str, x_label: str, y_label: str) -> str:
    return (
        f'<div class="card"><svg viewBox="0 0 440 240" role="img">{inner}'
        f'<text x="30" y="230">{escape(x_label)}</text><text x="34" y="18">{escape(y_label)}</text>'
        '<text x="10" y="18">1</text><text x="10" y="214">0</text></svg></div>'
    )


def _confusion(report: Report) -> list[str]:
    if "confusion" not in report.details:
        return []
    names, cells = report.details["classnames"], report.details["confusion"]
    drawn = _matrix(names, cells) if len(names) <= MAX_MATRIX_CLASSES else ""
    wrong = sorted((cell for cell in cells if cell[0] != cell[1]), key=lambda cell: -cell[2])[:MAX_CONFUSIONS]
    rows = "".join(
        f'<tr><td>{escape(names[true])}</td><td>{escape(names[said])}</td><td class="n">{count:,}</td></tr>'
        for true, said, count in wrong
    )
    listed = f"<table><tr><th>true</th><th>predicted</th><th>count</th></tr>{rows}</table>"
    return [f'<h2>Confusion</h2><div class="card scroll">{drawn}{listed if rows else "none"}</div>']


def _matrix(names: Sequence[str], cells: Sequence[Sequence[int]]) -> str:
    """Rows are true classes, columns predicted ones; a full cell is a whole row."""
    side = 400 / len(names)
    totals = [0] * len(names)
    for true, _, count in cells:
        totals[true] += count
    squares = "".join(
        f'<rect class="bar" x="{20 + said * side:.2f}" y="{20 + true * side:.2f}" width="{side:.2f}" '
        f'height="{side:.2f}" fill-opacity="{count / totals[true]:.3f}"><title>{escape(names[true])} as '
        f"{escape(names[said])}: {count}</title></rect>"
        for true, said, count in cells
    )
    frame = '<rect class="axis" x="20" y="20" width="400" height="400"/>'
    return (
        f'<svg viewBox="0 0 440 440" role="img">{squares}{frame}'
        '<text x="20" y="14">predicted class; point at a cell for its names</text></svg>'
    )


def _per_class(report: Report) -> list[str]:
    if "per_class" not in report.details:
        return []
    rows = "".join(
        f'<tr><td>{escape(row["class"])}</td><td class="n">{row["n"]:,}</td>'
        f'<td class="n">{_share(row["recall"])}</td><td class="n">{_share(row["precision"])}</td></tr>'
        for row in sorted(
            report.details["per_class"], key=lambda row: (row["recall"] is None, row["recall"] or 0)
        )
    )
    head = "<tr><th>class</th><th>samples</th><th>recall</th><th>precision</th></tr>"
    return [f'<h2>Classes, the worst first</h2><div class="card scroll"><table>{head}{rows}</table></div>']


def _share(value: float | None) -> str:
    return "none" if value is None else f"{value:.1%}"


def _examples(report: Report, samples: EvalSamples) -> list[str]:
    out = []
    for title, is_good in (("Best examples", True), ("Worst examples", False)):
        figures = "".join(_example(one, samples) for one in report.examples if one.is_good == is_good)
        if figures:
            out.append(f'<h2>{title}</h2><div class="grid">{figures}</div>')
    return out


def _example(example: Example, samples: EvalSamples) -> str:
    key = "/".join(samples.place(example.sample))
    caption = f'<figcaption title="{escape(key)}">{escape(example.caption)}</figcaption>'
    return f'<figure class="card">{_thumbnail(samples, example.sample, key)}{caption}</figure>'


def _thumbnail(samples: EvalSamples, sample: int, alt: str) -> str:
    """No picture, but its name, where the image has become unreadable since it was evaluated."""
    try:
        image = open_image(samples.read(sample).image, max_pixels=samples.max_image_pixels)
    except (SampleError, ShardError):
        return f'<img alt="{escape(alt)}" src="data:,">'
    return thumbnail(image, alt)


def _skipped(report: Report) -> list[str]:
    counts = {name: count for name, count in report.skipped.counts().items() if count}
    if not counts and not report.skipped.examples:
        return []
    rows = "".join(
        f'<tr><td>{escape(name.replace("_", " "))}</td><td class="n">{count:,}</td></tr>'
        for name, count in counts.items()
    )
    listed = "".join(
        f"<tr><td>{escape(bad.shard)}</td><td>{escape(bad.key or '')}</td><td>{escape(bad.reason)}</td></tr>"
        for bad in report.skipped.examples
    )
    return [f'<h2>Left out</h2><div class="card scroll"><table>{rows}</table><table>{listed}</table></div>']
