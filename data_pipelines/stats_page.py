"""The page of `clipstack data stats --html`: one file, no scripts, nothing from the network."""

from __future__ import annotations

from html import escape
from pathlib import Path

import polars as pl

from data_pipelines.errors import DataError, SampleError
from data_pipelines.images import open_image
from data_pipelines.inputs.reading import read_item
from data_pipelines.page import document, number_card, thumbnail
from data_pipelines.shard_rows import ShardRows
from data_pipelines.stats import NUMBERS, Shares, Stats, histogram, share_tables

NUM_SAMPLES = 12


def write_page(path: Path, stats: Stats, rows: ShardRows, *, title: str) -> None:
    """Raises DataError where the file cannot be written."""
    page = render_page(stats, rows, title=title)
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise DataError(f"--html {path}: cannot be written: {error.strerror}") from error


def render_page(stats: Stats, rows: ShardRows, *, title: str) -> str:
    """Equal data give the equal page."""
    total = max(stats.samples, 1)
    cards = [
        ("samples", f"{stats.samples:,}"),
        ("shards", f"{stats.shards:,}"),
        ("image data", f"{stats.image_bytes / 1e6:,.1f} MB"),
        ("duplicate images", f"{stats.duplicate_images / total:.1%}"),
        ("duplicate captions", f"{stats.duplicate_captions / total:.1%}"),
    ]
    if stats.duplicate_looks is not None:
        cards.append(("equal perceptual hash", f"{stats.duplicate_looks / total:.1%}"))
    if stats.without_caption:
        cards.append(("without a caption", f"{stats.without_caption / total:.1%}"))
    if stats.unusable:
        cards.append(("unusable", f"{stats.unusable:,}"))
    shares = "".join(_share_card(name, value, total) for name, value in share_tables(stats))
    body = (
        f'<h1>{escape(title)}</h1><p class="soft">Written by clipstack data stats</p>',
        f'<div class="grid">{"".join(number_card(value, name) for name, value in cards)}</div>',
        "<h2>Samples</h2>",
        f'<div class="grid">{_samples(rows)}</div>',
        "<h2>Sizes and captions</h2>",
        '<p class="soft">The end bars hold everything beyond them.</p>',
        f'<div class="grid wide">{_histograms(rows.frame)}</div>',
        "<h2>Where from, and what</h2>",
        f'<div class="grid wide">{shares}</div>',
    )
    return document(f"Data: {title}", "\n".join(body))


def _samples(rows: ShardRows) -> str:
    """A few, spread evenly over the data."""
    count = min(NUM_SAMPLES, rows.frame.height)
    picked = rows.frame[[i * rows.frame.height // count for i in range(count)]] if count else rows.frame
    out = []
    for row in picked.iter_rows(named=True):
        item = rows.inputs.items[row["place"]]
        try:
            image = thumbnail(open_image(read_item(item).image))
        except SampleError as error:
            image = f'<span class="soft">{escape(str(error))}</span>'
        caption = escape(row["caption"] or "")
        size = f'<span class="soft">{escape(item.origin)}, {row["width"]} × {row["height"]}</span>'
        out.append(f'<figure class="card">{image}<figcaption>{caption}<br>{size}</figcaption></figure>')
    return "".join(out)


def _histograms(frame: pl.DataFrame) -> str:
    out = []
    for name, number in NUMBERS.items():
        if name in ("width", "height"):
            continue  # the short side and the shape say it better
        column = frame.filter(pl.col("caption").is_not_null()) if name.startswith("caption") else frame
        bars = histogram(column.select(number).to_series())
        if bars:
            out.append(f'<div class="card"><h3>{_title(name)}</h3>{_bars(bars)}</div>')
    return "".join(out)


def _bars(bars: list[tuple[float, float, int]]) -> str:
    width, height = 320, 110
    step = width / len(bars)
    most = max(count for _, _, count in bars)
    parts = []
    for i, (low, high, count) in enumerate(bars):
        tall = height * count / most
        hint = f"{_edge(low)} to {_edge(high)}: {count:,}"
        parts.append(
            f'<rect x="{i * step + 0.5:.1f}" y="{height - tall:.1f}" width="{max(step - 1, 0.5):.1f}" '
            f'height="{tall:.1f}" fill="var(--a)"><title>{hint}</title></rect>'
        )
    label = f"{_edge(bars[0][0])} to {_edge(bars[-1][1])}"
    parts.append(f'<text x="0" y="{height + 14}">{_edge(bars[0][0])}</text>')
    parts.append(f'<text x="{width}" y="{height + 14}" text-anchor="end">{_edge(bars[-1][1])}</text>')
    opening = f'<svg viewBox="0 0 {width} {height + 18}" role="img" aria-label="histogram, {label}">'
    return opening + "".join(parts) + "</svg>"


def _title(name: str) -> str:
    return name[:1].upper() + name[1:]


def _edge(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 20 or value == int(value) else f"{value:.2f}"


def _share_card(name: str, shares: Shares, total: int) -> str:
    lines = [f'<tr><td>{escape(value)}</td><td class="n">{count:,}</td></tr>' for value, count in shares.top]
    if shares.distinct > len(shares.top):
        more = f"and {shares.distinct - len(shares.top):,} more"
        lines.append(f'<tr class="soft"><td>{more}</td><td></td></tr>')
    if shares.missing:
        share = f"{shares.missing:,} ({shares.missing / total:.0%})"
        lines.append(f'<tr class="soft"><td>not known</td><td class="n">{share}</td></tr>')
    table = f"<table>{''.join(lines)}</table>"
    return f'<div class="card"><h3>{escape(_title(name))}</h3>{table}</div>'
