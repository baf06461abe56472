"""The real launchers: signals to them, the death of a rank, restarts; nothing may stay behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clipstack.launching import REPOSITORY, wait_until
from tests.clipstack.training_runs import metrics, steps_saved, weights_hash

BIN = Path(sys.executable).parent
DEEPSPEED = [str(BIN / "deepspeed"), "--num_gpus", "2", "clipstack/train.py"]
TORCHRUN = [str(BIN / "torchrun"), "--nproc_per_node", "2", "--max-restarts", "2", "clipstack/train.py"]
START_S, END_S = 180, 60


def processes(run: Path) -> list[int]:
    """Everything alive that names this run on its command line."""
    return [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if str(run) in _command(pid)]


def ranks(run: Path) -> list[int]:
    """The processes that train, without launchers and loader workers."""
    training = [pid for pid in processes(run) if "clipstack/train.py" in _command(pid)]
    names = ("deepspeed.launcher.launch", "torchrun")
    launchers = {pid for pid in training if any(name in _command(pid) for name in names)}
    return sorted(pid for pid in training if pid not in launchers and _parent(pid) in launchers)


def _command(pid: int) -> str:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return "" if state == "Z" else Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Path]:
    run = tmp_path / "run"
    yield run
    for pid in processes(run):
        os.kill(pid, signal.SIGKILL)


def launch(command: list[str], recipe: Path, run: Path, *overrides: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*command, "--config", str(recipe), f"run.dir={run}", *overrides],
        cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}"},
    )  # fmt: skip


def lines_logged(run: Path) -> int:
    log = run / "metrics.jsonl"
    return len(log.read_text().splitlines()) if log.exists() else 0


@pytest.mark.timeout(600)
def test_deepspeed_killed_then_told_to_stop_leaves_nothing_behind_and_torchrun_finishes(
    tiny_recipe_file: Path, run: Path, tmp_path: Path
) -> None:
    """One run through three launchers: each ending leaves a checkpoint of the last logged step and no
    process."""
    slow = ("train.steps=300", "checkpoint.every_steps=100")

    runner = launch(DEEPSPEED, tiny_recipe_file, run, *slow)
    wait_until(lambda: lines_logged(run) >= 2, START_S, "first steps")
    runner.terminate()  # the runner alone: launch.py and the ranks are not told
    wait_until(lambda: not processes(run), END_S, "end of all processes")
    runner.communicate()
    first = metrics(run)[-1]["step"]
    assert steps_saved(run) == [first], "saved where it stopped"

    runner = launch(DEEPSPEED, tiny_recipe_file, run, *slow)
    wait_until(lambda: lines_logged(run) >= first + 2, START_S, "further steps")
    os.kill(ranks(run)[1], signal.SIGTERM)
    output, _ = runner.communicate(timeout=END_S)
    assert runner.returncode == 3, output
    wait_until(lambda: not processes(run), END_S, "end of all processes")
    second = metrics(run)[-1]["step"]
    assert steps_saved(run)[-1] == second > first

    agent = launch(TORCHRUN, tiny_recipe_file, run, f"train.steps={second + 60}", "checkpoint.every_steps=20")
    wait_until(lambda: lines_logged(run) >= second + 25, START_S, "further steps")
    os.kill(ranks(run)[0], signal.SIGKILL)
    output, _ = agent.communicate(timeout=START_S)
    assert agent.returncode == 0, output
    assert [line["step"] for line in metrics(run)] == list(range(1, second + 61))
    assert weights_hash(run)


def launcher_of(run: Path) -> int:
    """The process above the ranks, once there are ranks."""
    wait_until(lambda: ranks(run), START_S, "the ranks")
    return _parent(ranks(run)[0])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_signals_to_launchers_lose_no_step_and_leave_no_process(tiny_recipe_file: Path, run: Path) -> None:
    """One run: its launcher killed before it has begun, then three launches stopped on the way."""
    slow = ("train.steps=2000", "checkpoint.every_steps=1000")

    runner = launch(DEEPSPEED, tiny_recipe_file, run, *slow)
    os.kill(launcher_of(run), signal.SIGKILL)  # its ranks are importing torch
    wait_until(lambda: not processes(run), END_S, "end of all processes")
    runner.communicate()
    assert lines_logged(run) == 0

    def told_to_launch_py(runner: subprocess.Popen[str]) -> None:
        os.kill(launcher_of(run), signal.SIGTERM)

    def typed_at_the_terminal(runner: subprocess.Popen[str]) -> None:
        os.killpg(runner.pid, signal.SIGINT)

    def told_to_torchrun(agent: subprocess.Popen[str]) -> None:
        agent.terminate()

    done = 0
    for command, stop in (
        (DEEPSPEED, told_to_launch_py), (DEEPSPEED, typed_at_the_terminal), (TORCHRUN, told_to_torchrun),
    ):  # fmt: skip
        runner = launch(command, tiny_recipe_file, run, *slow)
        wait_until(lambda done=done: lines_logged(run) >= done + 3, START_S, f"steps before {stop.__name__}")
        stop(runner)
        output, _ = runner.communicate(timeout=END_S)
        wait_until(lambda: not processes(run), END_S, "end of all processes")
        assert runner.returncode != 0, output
        done = metrics(run)[-1]["step"]
        assert steps_saved(run)[-1] == done, (stop.__name__, output)
        assert [line["step"] for line in metrics(run)] == list(range(1, done + 1))
