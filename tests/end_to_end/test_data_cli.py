"""`clipstack data` as a user runs it: a fresh process each time."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data_pipelines.making import REPOSITORY, image_folder


def clipstack(*args: str | Path, cwd: Path = REPOSITORY) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "clipstack.cli", "data", *map(str, args)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


def test_from_a_folder_of_images_to_checked_filtered_and_resharded_shards(tmp_path: Path) -> None:
    image_folder(tmp_path / "images", 12, width=80, height=60)
    steps = [
        ("build", "images", "-o", "shards", "--size", "48", "--samples-per-shard", "5"),
        ("index", "shards"),
        ("verify", "shards"),
        ("stats", "shards", "--html", "stats.html"),
        ("filter", "shards", "--rule", "caption not like '%7'", "-o", "filtered"),
        ("dedup", "filtered", "--by", "exact", "--by", "perceptual", "-o", "unique"),
        ("reshard", "unique", "-o", "final", "--shuffle-seed", "1", "--prefix", "train-"),
        ("verify", "final", "--json"),
    ]
    for step in steps:
        done = clipstack(*step, cwd=tmp_path)
        assert done.returncode == 0, f"{step}: {done.stderr}"
        assert "Traceback" not in done.stderr
    assert json.loads(done.stdout)["samples"] == 11
    assert (tmp_path / "final/train-00000.tar").exists()
    assert not list(tmp_path.rglob("*.partial"))


def test_progress_on_a_pipe_is_plain_lines(tmp_path: Path) -> None:
    image_folder(tmp_path / "images", 4)
    done = clipstack("build", "images", "-o", "out", "--samples-per-shard", "2", cwd=tmp_path)
    assert "build: 2/2 shards\n" in done.stderr
    assert "\r" not in done.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["verfy", "x"], "did you mean verify?"),
        (["verify", "missing.tar"], "missing.tar"),
        (["build", "."], "--output"),
        (["stats", "--htlm", "x", "."], "did you mean --html?"),
    ],
)
def test_mistakes_cost_one_line_on_stderr_and_exit_code_2(
    tmp_path: Path, args: list[str], message: str
) -> None:
    done = clipstack(*args, cwd=tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert message in done.stderr


@pytest.mark.parametrize("command", ["", "build", "verify", "stats", "order"])
def test_help_comes_fast_and_without_torch(command: str) -> None:
    code = (
        "import sys; from clipstack.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", code, "data", *([command] if command else []), "--help"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout.lower()
    # Processor time: what the start costs, however busy the machine is.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0
