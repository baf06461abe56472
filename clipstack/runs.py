"""`clipstack runs RUN...`: what runs reached, as a table, and how, as curves on one HTML page."""

from __future__ import annotations

import argparse
import json
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from clipstack.charts import Points, line_chart
from clipstack.checkpoint.finding import is_finished
from clipstack.checkpoint.folder import newest_step
from clipstack.checkpoint.layout import RECIPE_FILE
from clipstack.errors import ConfigError
from clipstack.files import write_text
from clipstack.run_log import EVAL_FILE, METRICS_FILE, read_jsonl
from data_pipelines.page import document

CURVES = {
    "loss": "Loss (the run's own objective)",
    "clip_loss": "CLIP loss (comparable between objectives)",
    "logit_scale": "Log of the logit scale",
    "grad_norm": "Norm of the gradient, before clipping",
    "samples_per_s": "Samples a second",
    "data_wait_fraction": "Share of the time spent waiting for data",
}
EVALUATED = ("top1", "image_to_text_r1", "text_to_image_r1", "clip_loss")
"""Metrics of eval.jsonl that the table shows, where there are such."""


@dataclass(frozen=True)
class Run:
    """A run folder, read."""

    name: str
    recipe: Mapping[str, Any]
    lines: Sequence[Mapping[str, Any]]
    events: Sequence[Mapping[str, Any]]
    evaluations: Sequence[Mapping[str, Any]]
    is_finished: bool

    @property
    def steps(self) -> int:
        return int(self.recipe["train"]["steps"])

    def curve(self, metric: str) -> Points:
        return [(line["step"], line[metric]) for line in self.lines if line.get(metric) is not None]


def begun(folders: Sequence[Path]) -> Iterator[Path]:
    """The folders of runs that got as far as their recipe; the others are named on stderr. Raises ConfigError
    where all are others."""
    left_out = 0
    for folder in folders:
        if (folder / RECIPE_FILE).is_file():
            yield folder
        else:
            left_out += 1
            print(f"{folder}: left out, it has no {RECIPE_FILE}", file=sys.stderr)
    if left_out == len(folders):
        raise ConfigError(f"none of the {left_out} is a run folder; name runs, such as runs/*")


def read_run(folder: Path, name: str) -> Run:
    """Raises ConfigError for a folder that holds no run."""
    if not (folder / RECIPE_FILE).is_file():
        raise ConfigError(f"{folder}: not a run folder ({RECIPE_FILE} is missing); name runs, such as runs/*")
    lines = _lines(folder / METRICS_FILE)
    recipe = tomllib.loads((folder / RECIPE_FILE).read_text(encoding="utf-8"))
    return Run(
        name=name,
        recipe=recipe,
        lines=[line for line in lines if "event" not in line],
        events=[line for line in lines if "event" in line],
        evaluations=_lines(folder / EVAL_FILE),
        is_finished=is_finished(folder, step=newest_step(folder), steps=int(recipe["train"]["steps"])),
    )


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        return read_jsonl(path) if path.is_file() else []
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: {error.doc[:60]!r} is not JSON; the file was changed by hand") from error


def summary(run: Run) -> dict[str, str]:
    """A row of the table."""
    last = run.lines[-1] if run.lines else {}
    step = int(last.get("step", 0))
    row = {
        "run": run.name,
        "state": "finished" if run.is_finished else f"step {step}/{run.steps}",
        "objective": str(run.recipe.get("objective", {}).get("name", "clip")),
        "batch": str(run.recipe["train"]["batch_size"]),
        "lr": f"{run.recipe['optim']['lr']:g}",
        "loss": _number(_smooth(run.curve("loss"))),
        "clip_loss": _number(_smooth(run.curve("clip_loss"))),
        "samples/s": _number(_median([y for _, y in run.curve("samples_per_s")]), digits=0),
        "events": str(len(run.events)) if run.events else "",
    }
    newest = run.evaluations[-1] if run.evaluations else {}
    return row | {f"val {name}": _number(newest[name]) for name in EVALUATED if name in newest}


def _smooth(points: Points, over: int = 20) -> float | None:
    """The mean of the last values: a single step's loss is noise."""
    tail = [y for _, y in points[-over:]]
    return sum(tail) / len(tail) if tail else None


def _median(values: Sequence[float]) -> float | None:
    return sorted(values)[len(values) // 2] if values else None


def _number(value: float | None, digits: int = 4) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """The rows as aligned text; columns that are empty everywhere are left out."""
    columns = [
        name for name in dict.fromkeys(name for row in rows for name in row) if any(r.get(name) for r in rows)
    ]
    cells = [columns, *([row.get(name, "") for name in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in cells
    )


def page(runs: Sequence[Run]) -> str:
    """One page: the table, the curves of all runs over each other, what differs between the recipes,
    events."""
    rows = [summary(run) for run in runs]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    charts = [line_chart(title, {run.name: run.curve(key) for run in runs}) for key, title in CURVES.items()]
    validation = sorted({key for run in runs for line in run.evaluations for key in line if key in EVALUATED})
    charts += [
        line_chart(
            f"Validation: {key}",
            {run.name: [(e["step"], e[key]) for e in run.evaluations if key in e] for run in runs},
        )
        for key in validation
    ]
    events = [
        f"<li>{escape(run.name)}, step {event['step']}: {escape(str(event['message']))}</li>"
        for run in runs
        for event in run.events
    ]
    body = [
        "<h1>Runs</h1>",
        _html_table(columns, [[row.get(name, "") for name in columns] for row in rows]),
        "<h2>Curves</h2>",
        f'<div class="grid wide">{"".join(charts)}</div>',
    ]
    differences = recipe_differences(runs)
    if differences:
        body.append("<h2>Where the recipes differ</h2>")
        body.append(_html_table(["key", *(run.name for run in runs)], differences))
    if events:
        body.append(f"<h2>Events</h2><ul>{''.join(events)}</ul>")
    return document("Runs", "".join(body))


def recipe_differences(runs: Sequence[Run]) -> list[list[str]]:
    """[key, value in each run] for each key of the recipes whose values are not all equal."""
    flat = [dict(_flat(run.recipe)) for run in runs]
    keys = sorted({key for one in flat for key in one} - {"run.dir"})
    rows = [[key, *(str(one.get(key, "")) for one in flat)] for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    return [
        pair
        for key, value in tree.items()
        for pair in (
            _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(prefix + key, value)]
        )
    ]


def _html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["".join(f"<th>{escape(name)}</th>" for name in head)]
    lines += ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    return f'<div class="scroll"><table>{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>'


def names_of(folders: Sequence[Path]) -> list[str]:
    """Folder names, or whole paths where two folders have one name."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    parser.add_argument(
        "--html", type=Path, metavar="OUT.html", help="also write a page with curves of all runs"
    )


def run(args: argparse.Namespace) -> int:
    folders = args.runs if len(args.runs) == 1 else list(begun(args.runs))
    runs = [read_run(folder, name) for folder, name in zip(folders, names_of(folders), strict=True)]
    print(table([summary(one) for one in runs]))
    if args.html is not None:
        try:
            write_text(args.html, page(runs))
        except OSError as error:
            raise ConfigError(
                f"--html {args.html}: cannot be written ({error}); name another file"
            ) from error
        print(f"curves: {args.html}")
    return 0
