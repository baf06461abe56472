"""The account of skipped tests: a table at the end, and a run that fails on a skip that nobody expects."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Skip, not_expected, skip_table

TESTS = Path(__file__).resolve().parent
SUITE = """
import pytest
def test_passes(): pass
@pytest.mark.skip(reason="no moon tonight")
def test_by_mark(): pass
def test_inside(): pytest.skip("the sky is cloudy")
@pytest.mark.xfail
def test_fails(): assert False
"""
MODULE = "import pytest\npytest.importorskip('no_such_package', reason='no_such_package is missing')\n"
EXPECTED = "# by hand\ntests/test_a.py::test_by_mark | no moon\ntests/test_a.py::test_inside | the sky\n"


@pytest.mark.parametrize(
    ("workers", "listed", "code", "said"),
    [
        ("2", EXPECTED + "tests/test_b.py | no_such_package\n", 0, []),
        ("2", EXPECTED, 1, ["tests/test_b.py | no_such_package is missing"]),
        ("0", "", 1, ["tests/test_a.py::test_by_mark | no moon tonight"]),
        ("0", None, 0, []),
    ],
)
def test_a_skip_that_is_not_on_the_list_fails_the_run(
    tmp_path: Path, workers: str, listed: str | None, code: int, said: list[str]
) -> None:
    suite = tmp_path / "tests"
    suite.mkdir()
    shutil.copy(TESTS / "conftest.py", suite)
    (suite / "test_a.py").write_text(SUITE)
    (suite / "test_b.py").write_text(MODULE)
    command = [sys.executable, "-m", "pytest", "tests", "--rootdir", str(tmp_path), "-p", "xdist"]
    command += ["-n", workers]
    if listed is not None:
        (tmp_path / "list.txt").write_text(listed)
        command += ["--expected-skips", "list.txt"]
    environ = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout
    assert re.search(r"^ +1  tests/test_a.py +the sky is cloudy$", done.stdout, re.M), done.stdout
    assert re.search(r"^ +1  tests/test_b.py +no_such_package is missing$", done.stdout, re.M)
    assert all(line in done.stdout.splitlines() for line in said)
    assert ("skips that are not in" in done.stdout) == bool(code)


def test_the_table_counts_tests_of_one_file_and_reason() -> None:
    skips = [Skip("tests/a.py::x", "why"), Skip("tests/a.py::y[1]", "why"), Skip("tests/long.py", "because")]
    assert skip_table(skips) == "    2  tests/a.py     why\n    1  tests/long.py  because"


def test_the_list_of_expected_skips_names_tests_that_exist() -> None:
    lines = [line for line in (TESTS / "expected_skips.txt").read_text().splitlines() if line[:1] not in "#"]
    assert lines
    for line in lines:
        test, reason = line.split(" | ")
        file, _, name = test.partition("::")
        source = (TESTS.parent / file).read_text()
        assert f"def {name}" in source and reason
        assert not_expected([Skip(test, reason)], line) == []
        assert not_expected([Skip(test, "another reason")], line) == [Skip(test, "another reason")]
