"""The `clipstack` command itself, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from clipstack.cli import COMMANDS, READER_GONE
from data_pipelines.installing import naming_extra
from tests.clipstack.launching import REPOSITORY


@pytest.mark.parametrize("arguments", [["--help"], ["data", "--help"]])
def test_a_reader_that_has_seen_enough_gets_no_traceback(arguments: list[str]) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "clipstack.cli", *arguments],
            stdout=write_end, stderr=subprocess.PIPE, cwd=REPOSITORY, text=True, check=False,
        )  # fmt: skip
    finally:
        os.close(write_end)
    assert (done.returncode, done.stderr) == (READER_GONE, "")


HELP_OF = """
import sys
from clipstack.cli import main
try:
    code = main([sys.argv[1], "--help"])
except SystemExit as done:
    code = done.code or 0
assert code == 0
heavy = {"torch", "open_clip", "deepspeed"} & {*sys.modules}
assert not heavy, heavy
"""


@pytest.mark.parametrize("command", COMMANDS)
def test_help_does_not_wait_for_torch(command: str) -> None:
    """Nor does a flag that is misspelt: the arguments are read before anything heavy is imported."""
    done = subprocess.run(
        [sys.executable, "-c", HELP_OF, command], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "usage: " in done.stdout


def test_runs_are_listed_without_torch() -> None:
    code = "import sys, clipstack.runs; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)


NEEDS = {
    "train": ("--config configs/finetune.toml", "train"),
    "demo": ("--dir demo", "train"),
    "eval": ("--model ViT-B-32 --data shards --task zeroshot", "eval"),
    "export": ("--model run --output export", "model"),
    "embed": ("--model run --data shards --output vectors", "eval,data"),
    "serve": ("--model ViT-B-32 --port 0", "serve"),
}
"""Arguments with which a command gets as far as torch, and the extra that brings it."""
WITHOUT_TORCH = "import sys; sys.modules['torch'] = None; from clipstack.cli import main; sys.exit(main())"


@pytest.mark.parametrize("command", NEEDS)
def test_a_command_whose_extra_is_missing_names_it(command: str, tmp_path: Path) -> None:
    arguments, extra = NEEDS[command]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, command, *arguments.split()],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    advice = f"pip install '.[{extra}]' in the checkout, or './FILE.whl[{extra}]' where the wheel lies"
    assert done.stderr == f"error: clipstack {command} needs torch: {advice}\n"
    assert done.returncode == 2
    assert not [*tmp_path.iterdir()], "nothing was begun"


def test_a_fault_of_our_own_is_not_taken_for_a_missing_package() -> None:
    with pytest.raises(ModuleNotFoundError), naming_extra("clipstack eval", "eval"):
        raise ModuleNotFoundError("No module named 'clipstack.nothing'", name="clipstack.nothing")
