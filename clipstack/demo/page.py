"""The page at the end of `clipstack demo`: what was trained, what it knows and what not, in plain words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from clipstack.charts import bar, line_chart
from clipstack.config import Recipe
from clipstack.demo.examination import Examined, Example
from clipstack.demo.scores import Score
from clipstack.files import write_text
from clipstack.run_log import METRICS_FILE, read_jsonl
from data_pipelines.page import document, picture

MEANING = {
    "colour": "names the colour of a single thing",
    "shape": "names its shape",
    "size": "tells small from large",
    "place": "says where in the picture it is",
    "colour x shape": "names colour and shape together, though the two never met in training",
    "colour in pair": "names the colour of one of two things",
    "shape in pair": "names the shape of one of two things",
    "size in pair": "tells small from large when there are two",
    "background": "names the ground that they lie on",
    "relation": "tells which of two things is left of, right of, above or below the other",
    "binding": "knows which of two things has which colour: the rival caption has the colours swapped",
    "order": "tells 'A left of B' from 'B left of A'",
    "image to text R@1": "finds the caption of a picture among all test captions",
}

_STYLE = """
.card img { width: 100%; image-rendering: pixelated; border-radius: 4px; display: block; }
.right { color: var(--c); } .wrong { color: var(--b); }
"""


def write_page(
    path: Path,
    run_dir: Path,
    examined: Examined,
    lessons: Sequence[Recipe],
    *,
    num_pictures: int,
    minutes: float,
) -> Path:
    """`lessons`: the recipes of the trainings, in order; `run_dir` is the last one's. num_pictures: what was
    drawn for training. Returns `path`."""
    metrics = [line for line in read_jsonl(run_dir / METRICS_FILE) if "event" not in line]
    charts = [
        line_chart("Loss", {"loss": [(m["step"], m["loss"]) for m in metrics]}),
        line_chart(
            "Logit scale (its log)", {"logit_scale": [(m["step"], m["logit_scale"]) for m in metrics]}
        ),
        line_chart("Learning rate", {"lr": [(m["step"], m["lr"]) for m in metrics]}),
        line_chart("Samples a second", {"samples/s": [(m["step"], m["samples_per_s"]) for m in metrics]}),
    ]
    rows = "".join(_row(name, score) for name, score in examined.scores.items())
    body = [
        "<h1>A CLIP model, trained here just now</h1>",
        f'<p class="soft">{_what_was_done(lessons, num_pictures, minutes)}</p>',
        "<h2>What it knows</h2>",
        "<p>Every question is about pictures whose colour and shape never met in training, in images or "
        "captions. The mark in each bar is what guessing would reach.</p>",
        f'<div class="scroll"><table>{rows}</table></div>',
        f"<p>{_verdict(examined.scores)}</p>",
        "<h2>Which caption it picks</h2>",
        f"<p>Each picture below searches all {examined.num_captions:,} captions of the test set.</p>",
        f'<div class="grid">{"".join(map(_example, examined.examples))}</div>',
        "<h2>How it learned</h2>",
        "<p>The second lesson. The first one, on what stands where, came before it.</p>",
        f'<div class="grid wide">{"".join(charts)}</div>',
        "<h2>What to try next</h2>",
        f"<p>Serve it: <code>clipstack serve --model {escape(str(run_dir))}</code>. "
        "Train on your own pictures: <code>clipstack data build --help</code>, then a recipe from "
        "<code>configs/</code>.</p>",
    ]
    write_text(path, document("clipstack demo", "".join(body), style=_STYLE))
    return path


def _what_was_done(lessons: Sequence[Recipe], num_pictures: int, minutes: float) -> str:
    seen = sum(recipe.train.steps * recipe.train.batch_size for recipe in lessons)
    steps = " and ".join(f"{recipe.train.steps:,}" for recipe in lessons)
    took = f" in {minutes:.1f} minutes" if minutes > 0.1 else ""
    return (
        f"A vision transformer and a text transformer, from random weights, on {num_pictures:,} drawn "
        f"pictures with captions{took}: lessons of {steps} steps of {lessons[-1].train.batch_size}, {seen:,} "
        f"samples seen in all, objective {lessons[-1].objective.name}."
    )


def _row(name: str, score: Score) -> str:
    return (
        f"<tr><td><b>{escape(name)}</b></td><td>{bar(score.accuracy, score.chance)}</td>"
        f'<td class="n">{score.accuracy:.1%}</td><td class="n soft">chance {score.chance:.1%}</td>'
        f'<td class="soft">{escape(MEANING.get(name, ""))}</td></tr>'
    )


def _verdict(scores: Mapping[str, Score]) -> str:
    """In words: what it has, what it half has, and what it has not."""
    learned: list[str] = []
    partly: list[str] = []
    missing: list[str] = []
    for name, score in scores.items():
        lift = (score.accuracy - score.chance) / (1 - score.chance)
        (learned if lift > 0.7 else partly if lift > 0.15 else missing).append(name)
    parts = [(learned, "It has learned"), (partly, "it has partly learned"), (missing, "it has not learned")]
    said = [f"{words} {_listed(names)}" for names, words in parts if names]
    text = "; ".join(said)
    return f"{text[0].upper()}{text[1:]}."


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _example(example: Example) -> str:
    chosen, true = example.chosen, example.true
    if chosen == true:
        words = f'<span class="right">✓ {escape(chosen)}</span>'
    else:
        words = (
            f'<span class="wrong">✗ {escape(chosen)}</span><br><span class="soft">true: {escape(true)}</span>'
        )
    return f'<div class="card">{picture(example.image_png, true)}<div>{words}</div></div>'
