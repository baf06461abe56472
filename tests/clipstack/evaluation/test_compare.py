"""`clipstack compare`: the paired bootstrap finds real differences and refuses what cannot be paired."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clipstack.cli import main
from clipstack.compare import Row, compare
from clipstack.evaluation.report import Report, Skipped, Source, read_json, write_json


def report(hits: np.ndarray, *, model: str, data: str = "d", label: np.ndarray | None = None) -> Report:
    label = np.arange(len(hits)) % 4 if label is None else label
    rank = np.where(hits, 0, 7)
    recall = float(np.mean([hits[label == k].mean() for k in range(4)]))
    return Report(
        task="zeroshot",
        n=len(hits),
        source=Source(model, "f" * 32, data, f"digest of {data}", "simple"),
        metrics={"top1": float(hits.mean()), "mean_per_class_recall": recall, "ece": 0.5},
        intervals={},
        skipped=Skipped(),
        outcomes={"sample": np.arange(len(hits)), "label": label, "rank": rank},
    )


def compared(tmp_path: Path, a: Report, b: Report) -> dict[str, Row]:
    evaluations = []
    for name, one in (("a", a), ("b", b)):
        write_json(tmp_path / f"{name}.json", one)
        evaluations.append(read_json(tmp_path / f"{name}.json"))
    return {row.metric: row for row in compare(*evaluations)}


def test_pairing_sees_what_separate_intervals_cannot(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    a = rng.random(1000) < 0.5
    b = a.copy()
    b[np.flatnonzero(~a)[:15]] = True  # 15 more of the very same samples
    rows = compared(tmp_path, report(a, model="A"), report(b, model="B"))
    assert rows["top1"].difference == pytest.approx(0.015)
    assert rows["top1"].low is not None and 0 < rows["top1"].low < 0.015 < rows["top1"].high < 0.025
    assert rows["top1"].p < 0.01 and rows["mean_per_class_recall"].p < 0.01
    assert rows["ece"].p is None  # no mean over samples


def test_luck_is_called_luck(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    a, b = rng.random(200) < 0.5, rng.random(200) < 0.5
    rows = compared(tmp_path, report(a, model="A"), report(b, model="B"))
    assert rows["top1"].low < 0 < rows["top1"].high and rows["top1"].p > 0.05


def test_under_no_difference_p_is_uniform(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    pairs = [(rng.random(300) < 0.5, rng.random(300) < 0.5) for _ in range(60)]
    values = [compared(tmp_path, report(a, model="A"), report(b, model="B"))["top1"].p for a, b in pairs]
    below = np.mean(np.array(values) < 0.2)
    assert 0.05 <= below <= 0.4


def test_the_command_prints_and_writes(
    model_folders: dict[str, Path], benchmark_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for task, metric in (("zeroshot", "top1"), ("retrieval", "text_to_image_r10")):
        files = []
        for kind, folder in model_folders.items():
            files.append(tmp_path / f"{kind}-{task}.json")
            words: list[Any] = ["eval", "--model", folder, "--data", benchmark_folder, "--task", task]
            assert main([str(word) for word in (*words, "--workers", 0, "--json", files[-1])]) == 0
        capsys.readouterr()
        out = tmp_path / "compared.json"
        assert main(["compare", str(files[0]), str(files[1]), "--json", str(out)]) == 0
        assert metric in capsys.readouterr().out
        rows = {row["metric"]: row for row in json.loads(out.read_text())}
        a, b = (json.loads(file.read_text())[metric] for file in files)
        assert (rows[metric]["a"], rows[metric]["b"]) == (a, b)
        assert rows[metric]["low"] <= b - a <= rows[metric]["high"]


def test_what_cannot_be_paired_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hits = np.ones(20, dtype=bool)
    write_json(tmp_path / "a.json", report(hits, model="A"))
    write_json(tmp_path / "data.json", report(hits, model="B", data="other"))
    write_json(tmp_path / "label.json", report(hits, model="B", label=np.arange(20)[::-1] % 4))
    less = json.loads((tmp_path / "a.json").read_text())
    del less["outcomes"]["rank"]
    (tmp_path / "less.json").write_text(json.dumps(less))
    (tmp_path / "bare.json").write_text('{"format": 1, "task": "zeroshot", "outcomes": {}}')
    (tmp_path / "text.json").write_text("[1")
    (tmp_path / "list.json").write_text("[1]")
    for name, expected in (
        ("data", "evaluate both models on the same data"),
        ("label", "other samples were skipped"),
        ("text", "cannot be read"),
        ("list", "is no evaluation"),
        ("none", "cannot be read"),
        ("bare", "is no evaluation"),
        ("less", "differ in the outcomes ['rank']"),
    ):
        assert main(["compare", str(tmp_path / "a.json"), str(tmp_path / f"{name}.json")]) == 2
        said = capsys.readouterr().err
        assert expected in said and said.count("\n") == 1
    a = str(tmp_path / "a.json")
    assert main(["compare", a, a, "--json", str(tmp_path / "text.json" / "c.json")]) == 2
    assert "--json" in capsys.readouterr().err
