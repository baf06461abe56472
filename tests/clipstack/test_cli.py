"""The `clipstack` command itself, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from clipstack.cli import COMMANDS, READER_GONE, main
from data_pipelines.errors import MissingPackageError
from data_pipelines.installing import naming_extra
from data_pipelines.one_line_parser import OneLineParser
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


def test_what_a_package_of_others_misses_is_not_in_our_extra() -> None:
    """As deepspeed imports mpi4py, when it is to find its ranks by it."""
    theirs = {"__name__": "deepspeed.comm"}
    with pytest.raises(MissingPackageError) as error, naming_extra("clipstack train", "train"):
        exec("import no_such_package.inner", theirs)
    advice = "deepspeed needs no_such_package, which is not installed: pip install no_such_package"
    assert str(error.value) == f"clipstack train: {advice}"


def test_the_data_tools_name_their_extra(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_pipelines.cli._run", _import_polars)
    monkeypatch.setitem(sys.modules, "polars", None)
    assert main(["data", "stats", "shards"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: clipstack data stats needs polars: pip install '.[data]' in the checkout")
    assert said.count("\n") == 1


def _import_polars(name: str, argv: list[str]) -> int:
    exec("import polars", {"__name__": "data_pipelines.stats"})
    return 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("serve --prot 3", "clipstack serve: unknown argument --prot; did you mean --port?"),
        ("serve --por 3", "clipstack serve: unknown argument --por; did you mean --port?"),
        ("serve --zzz", "clipstack serve: unknown argument --zzz; see clipstack serve --help"),
        (
            "eval --model m --data d --task zeroshot --modle x",
            "clipstack eval: unknown argument --modle; did you",
        ),
        (
            "eval --modle m --data d --task zeroshot",
            "clipstack eval: unknown argument --modle; did you mean --model?",
        ),
        ("eval --data d --task zeroshot", "clipstack eval: the following arguments are required: --model"),
        ("runs --htlm=page run", "clipstack runs: unknown argument --htlm=page; did you mean --html?"),
        ("data stats shards --jsn", "clipstack data stats: unknown argument --jsn; did you mean --json?"),
        ("demo --rank 2", "clipstack demo: unknown argument --rank; did you mean --ranks?"),
        ("demo --steps 2", "clipstack demo: unknown argument --steps; did you mean train.steps=2?"),
        ("train --lr 3", "clipstack train: unknown argument --lr; did you mean optim.lr=3?"),
        ("train --optim.lr=3", "clipstack train: unknown argument --optim.lr=3; did you mean optim.lr=3?"),
        (
            "train --batch-size",
            "clipstack train: unknown argument --batch-size; did you mean train.batch_size=...?",
        ),
        ("train --run-dir r", "clipstack train: unknown argument --run-dir; did you mean run.dir=r?"),
        ("train --lr --fresh", "clipstack train: unknown argument --lr; did you mean optim.lr=...?"),
        (
            "train --deepspeed ds.json",
            "clipstack train: unknown argument --deepspeed; leave it out, DeepSpeed always",
        ),
        ("train --dry_run", "clipstack train: unknown argument --dry_run; did you mean --dry-run?"),
    ],
)
def test_an_unknown_flag_is_one_line_with_what_was_meant(
    arguments: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(arguments.split())
    except SystemExit as ended:
        code = ended.code
    told = capsys.readouterr()
    assert code == 2 and not told.out
    assert told.err.startswith(f"error: {said}") and told.err.count("\n") == 1


def test_flags_and_other_arguments_come_in_any_order() -> None:
    parser = OneLineParser("prog", "Tests.")
    parser.add_argument("--ranks", type=int)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse(["a=1", "--ranks", "2", "b=2"])
    assert (args.ranks, args.overrides) == (2, ["a=1", "b=2"])


def test_what_stands_behind_two_dashes_is_no_flag() -> None:
    parser = OneLineParser("prog", "Tests.")
    parser.add_argument("--ranks", type=int)
    parser.add_argument("paths", nargs="+")
    args = parser.parse(["--ranks", "2", "--", "--weird.tar", "x.tar"])
    assert (args.ranks, args.paths) == (2, ["--weird.tar", "x.tar"])
