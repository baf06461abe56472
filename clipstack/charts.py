"""The few drawings on our HTML pages, as SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

Points = Sequence[tuple[float, float]]

COLOURS = ("var(--a)", "var(--b)", "var(--c)", "var(--d)", "var(--e)", "var(--f)")
WIDTH, HEIGHT = 460, 220
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 10, 30


def line_chart(title: str, series: Mapping[str, Points], *, x_label: str = "step") -> str:
    """Lines over a common x axis, with a legend where there are several. Values that are not finite leave
    gaps."""
    finite = {name: [(x, y) for x, y in points if math.isfinite(y)] for name, points in series.items()}
    xs = [x for points in finite.values() for x, _ in points]
    ys = [y for points in finite.values() for _, y in points]
    if not xs:
        return f'<div class="card"><b>{escape(title)}</b><p class="soft">no values</p></div>'
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))
    x_low, x_high = min(*xs, x_ticks[0]), max(*xs, x_ticks[-1])
    y_low, y_high = min(*ys, y_ticks[0]), max(*ys, y_ticks[-1])

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - x_low) / ((x_high - x_low) or 1) * (WIDTH - LEFT - RIGHT)
        down = HEIGHT - BOTTOM - (y - y_low) / ((y_high - y_low) or 1) * (HEIGHT - TOP - BOTTOM)
        return round(across, 1), round(down, 1)

    parts = []
    for tick in y_ticks:
        _, y = place(x_low, tick)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}" stroke="var(--line)"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{tick:g}</text>')
    for tick in x_ticks:
        x, _ = place(tick, y_low)
        parts.append(f'<text x="{x}" y="{HEIGHT - 12}" text-anchor="middle">{tick:g}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 1}" text-anchor="end">{escape(x_label)}</text>')
    for number, points in enumerate(finite.values()):
        drawn = " ".join("{},{}".format(*place(x, y)) for x, y in thinned(points))
        colour = COLOURS[number % len(COLOURS)]
        parts.append(f'<polyline points="{drawn}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
    legend = (
        ""
        if len(finite) < 2
        else " ".join(
            f'<span style="color:{COLOURS[i % len(COLOURS)]}">■</span> {escape(name)}'
            for i, name in enumerate(finite)
        )
    )
    label = escape(title, quote=True)
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    return f'<div class="card"><b>{escape(title)}</b>{svg}<div class="soft">{legend}</div></div>'


def thinned(points: Points, most: int = 600) -> Points:
    """At most about `most` points, by keeping every k-th and the last."""
    every = max(1, len(points) // most)
    return points if every == 1 else [*points[::every], points[-1]]


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers from `low` to `high`."""
    if high <= low:
        return [low]
    raw = (high - low) / about
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= raw)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 10) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def bar(share: float, mark: float | None = None, *, width: int = 220) -> str:
    """A share in [0, 1] as a bar, with a mark at `mark`, such as chance."""
    line = (
        ""
        if mark is None
        else f'<line x1="{mark * width:.1f}" x2="{mark * width:.1f}" y1="0" y2="14" stroke="var(--ink)"/>'
    )
    return (
        f'<svg viewBox="0 0 {width} 14" style="width:{width}px">'
        f'<rect width="{width}" height="14" fill="var(--line)" rx="3"/>'
        f'<rect width="{share * width:.1f}" height="14" fill="var(--a)" rx="3"/>{line}</svg>'
    )
