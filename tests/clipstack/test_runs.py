"""`clipstack runs`: the table and the page tell what the run folders hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clipstack.cli import main

RECIPE = """
[model]
name = "ViT-B-32"
[objective]
name = "{objective}"
[train]
steps = 100
batch_size = 64
[optim]
lr = {lr}
"""


def make_run(folder: Path, *, objective: str, lr: float, losses: list[float], event: bool = False) -> Path:
    folder.mkdir(parents=True)
    (folder / "recipe.toml").write_text(RECIPE.format(objective=objective, lr=lr))
    lines: list[dict[str, object]] = [
        {"step": i + 1, "loss": loss, "clip_loss": loss / 2, "logit_scale": 2.6, "grad_norm": 1.0,
         "samples_per_s": 100.0, "data_wait_fraction": 0.1}
        for i, loss in enumerate(losses)
    ]  # fmt: skip
    if event:
        lines.insert(1, {"event": "rolled_back", "step": 1, "message": "the loss is not finite <at> step 2"})
    torn = '{"step": 99, "lo'
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + torn)
    return folder


def finish(run: Path, *, step: int) -> None:
    (run / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    (run / "export").mkdir()
    (run / "export/clipstack.json").write_text(json.dumps({"step": step}))


def test_a_run_that_was_given_more_steps_is_not_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "a", objective="clip", lr=1e-3, losses=[4.0, 3.0])
    finish(run, step=50)
    assert main(["runs", str(run)]) == 0
    assert "step 2/100" in capsys.readouterr().out


def test_a_line_that_is_no_json_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "a", objective="clip", lr=1e-3, losses=[4.0])
    (run / "metrics.jsonl").write_text('{"step": 1}\nmine\n{"step": 2}\n')
    assert main(["runs", str(run)]) == 2
    assert "metrics.jsonl: 'mine' is not JSON" in capsys.readouterr().err


def test_the_table_and_the_page_compare_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = make_run(tmp_path / "a", objective="clip", lr=1e-3, losses=[4.0, 3.0, 2.0], event=True)
    b = make_run(tmp_path / "b", objective="hard_negative", lr=2e-3, losses=[5.0, 4.0])
    (b / "eval.jsonl").write_text(json.dumps({"step": 2, "top1": 0.25}) + "\n")
    finish(b, step=100)
    out = tmp_path / "runs.html"
    assert main(["runs", str(a), str(b), "--html", str(out)]) == 0
    head, first, second = capsys.readouterr().out.splitlines()[:3]
    assert " ".join(head.split()) == "run state objective batch lr loss clip_loss samples/s events val top1"
    assert " ".join(first.split()) == "a step 3/100 clip 64 0.001 3.0000 1.5000 100 1"
    assert " ".join(second.split()) == "b finished hard_negative 64 0.002 4.5000 2.2500 100 0.2500"
    page = out.read_text()
    assert page.count("<polyline") == 7 * 2, "a line a run in each chart"
    assert "<td>optim.lr</td><td>0.001</td><td>0.002</td>" in page and "train.steps</td>" not in page
    assert "not finite &lt;at&gt; step 2" in page


def test_a_folder_that_is_no_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(tmp_path)]) == 2
    assert "not a run folder (recipe.toml is missing)" in capsys.readouterr().err


def test_among_several_a_folder_that_is_no_run_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "a", objective="clip", lr=1e-3, losses=[4.0])
    failed = tmp_path / "failed"
    (failed / "checkpoints").mkdir(parents=True)
    assert main(["runs", str(failed), str(run)]) == 0
    printed = capsys.readouterr()
    assert printed.err == f"{failed}: left out, it has no recipe.toml\n"
    assert "step 1/100" in printed.out and "failed" not in printed.out
    assert main(["runs", str(failed), str(tmp_path)]) == 2
    assert "none of the 2 is a run folder" in capsys.readouterr().err
