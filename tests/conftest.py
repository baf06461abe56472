"""What every test shares, and the account of skipped tests at the end of each run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import settings

# A test that is slow on a busy machine is not wrong; derandomised, a failure is everybody's failure.
settings.register_profile("clipstack", deadline=None, derandomize=True)
settings.load_profile("clipstack")

SKIPS = pytest.StashKey[list["Skip"]]()


class Skip(NamedTuple):
    """test: its id, or the file of a module that is skipped as a whole."""

    test: str
    reason: str


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--expected-skips", type=Path, metavar="FILE",
        help="fail where a skip is not in this list of lines `TEST | REASON` (the beginnings of both)",
    )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    config.stash[SKIPS] = []
    config.pluginmanager.register(_Collector(config.stash[SKIPS]))


class _Collector:
    """Sees every report, also those that pytest-xdist's workers send."""

    def __init__(self, skips: list[Skip]) -> None:
        self._skips = skips

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._note(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._note(report)

    def _note(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        # An expected failure counts as skipped too, and has no (file, line, reason).
        if report.skipped and isinstance(report.longrepr, tuple):
            self._skips.append(Skip(report.nodeid, report.longrepr[2].removeprefix("Skipped: ")))


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A skip that nobody expects fails a run that would have passed. Workers leave that to the controller."""
    is_worker = hasattr(session.config, "workerinput")
    if exitstatus == pytest.ExitCode.OK and not is_worker and _unexpected(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.stash[SKIPS]:
        terminalreporter.section("skipped, and why")
        terminalreporter.write_line(skip_table(config.stash[SKIPS]))
    if unexpected := _unexpected(config):
        terminalreporter.section(f"skips that are not in {config.getoption('expected_skips')}", red=True)
        for skip in unexpected:
            terminalreporter.write_line(f"{skip.test} | {skip.reason}")


def skip_table(skips: Iterable[Skip]) -> str:
    """A line for each file and reason, with the number of tests."""
    counts = Counter((skip.test.partition("::")[0], skip.reason) for skip in skips)
    width = max(len(file) for file, _ in counts)
    return "\n".join(f"{n:>5}  {file:<{width}}  {reason}" for (file, reason), n in sorted(counts.items()))


def _unexpected(config: pytest.Config) -> list[Skip]:
    path: Path | None = config.getoption("expected_skips")
    return [] if path is None else not_expected(config.stash[SKIPS], path.read_text(encoding="utf-8"))


def not_expected(skips: Iterable[Skip], listed: str) -> list[Skip]:
    """The skips that no line of the list allows."""
    lines = [line.split(" | ") for line in listed.splitlines() if line and not line.startswith("#")]
    return [
        skip
        for skip in skips
        if not any(skip.test.startswith(test) and skip.reason.startswith(reason) for test, reason in lines)
    ]
