"""The `clipstack` command itself, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from clipstack.cli import COMMANDS, READER_GONE
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
