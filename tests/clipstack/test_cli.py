"""The `clipstack` command itself, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from clipstack.cli import READER_GONE
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
