"""Which checkpoints stay, and what a run folder with odd contents means; without any training."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from clipstack.checkpoint.folder import newest_sound
from clipstack.checkpoint.layout import MANIFEST_FILE, checkpoint_name
from clipstack.checkpoint.snapshot import Snapshot, load_snapshot
from clipstack.config import load_recipe, to_toml
from clipstack.config.models import CheckpointConfig, GuardConfig
from clipstack.errors import CheckpointError, ConfigError, DataError
from clipstack.files import sha256_of
from clipstack.run_log import read_jsonl
from clipstack.towers import ModelRecord
from clipstack.training.deepspeed_config import deepspeed_config
from clipstack.training.guard import Guard
from clipstack.training.reporting import Reporter, Silent
from clipstack.training.run_data import check_validation
from clipstack.training.run_folder import prepare
from clipstack.training.run_lock import RunLock
from clipstack.training.saver import Saver
from clipstack.training.sinks import PatientSink, wandb_id
from clipstack.training.trainer import Progress, note_best
from clipstack.world import World
from tests.clipstack.training_runs import steps_saved

NOBODY = 65534


def snapshot(step: int, *, values: int = 0) -> Snapshot:
    return Snapshot(
        step=step, samples_seen=step, record=ModelRecord({}, {}), max_logit_scale=1.0,
        weights={"w": torch.zeros(values)} if values else {},
        optimizer={}, objective={}, order={}, recipe_toml="",
    )  # fmt: skip


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system takes root")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_leaves_the_checkpoint_before_and_no_part_of_the_next(small_disk: Path) -> None:
    folder = small_disk / "checkpoints"
    saver = Saver(folder, CheckpointConfig(keep_last=2), World(), Silent())
    saver.save_for_sure(snapshot(4, values=300_000), best_step=None)
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"step-00000008: could not be saved .*[Nn]o space left"):
            saver.save_for_sure(snapshot(8, values=300_000), best_step=None)
        assert newest_sound(folder) == (folder / checkpoint_name(4), [])
        assert sorted(path.name for path in folder.iterdir()) == ["latest", checkpoint_name(4)]
    saver.save_for_sure(snapshot(12, values=1000), best_step=None)
    assert steps_saved(small_disk) == [4, 12]


def test_a_save_removes_checkpoints_of_later_steps_that_would_push_it_out(tmp_path: Path) -> None:
    """Two damaged ones, as resume passes over, and keep_last = 1."""
    folder = tmp_path / "checkpoints"
    saver = Saver(folder, CheckpointConfig(keep_last=3), World(), Silent())
    for step in (4, 8, 12):
        saver.save_for_sure(snapshot(step), best_step=None)
    for step in (8, 12):
        (folder / checkpoint_name(step) / MANIFEST_FILE).write_text("{")
    saver = Saver(folder, CheckpointConfig(keep_last=1), World(), Silent())
    saver.save_for_sure(snapshot(6), best_step=None)
    assert steps_saved(tmp_path) == [6]
    assert newest_sound(folder) == (folder / checkpoint_name(6), [])


def test_the_checkpoint_to_roll_back_to_stays_while_steps_are_bad(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    saver = Saver(folder, CheckpointConfig(keep_last=1), World(), Silent())
    guard = Guard(GuardConfig())
    for step, bad in ((4, []), (8, []), (12, [9, 10, 11]), (16, [9, 13])):
        progress = {"guard": {**guard.state(), "bad_steps": bad}}
        saver.save_for_sure(replace(snapshot(step), progress=progress), best_step=None)
        assert steps_saved(tmp_path) == ([step] if not bad else [8, step])


def test_checkpoints_at_multiples_stay_for_good(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    saver = Saver(folder, CheckpointConfig(keep_last=1, keep_every_steps=8), World(), Silent())
    for step in (4, 8, 12, 16, 20):
        saver.save_for_sure(snapshot(step), best_step=None)
    assert steps_saved(tmp_path) == [8, 16, 20]


def test_a_save_that_is_not_permitted_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    """Root may write anywhere, so this is done as nobody."""
    folder = tmp_path / "checkpoints"
    saver = Saver(folder, CheckpointConfig(), World(), Silent())
    saver.save_for_sure(snapshot(4), best_step=None)
    with writable_by_none(folder), pytest.raises(CheckpointError, match=r"could not be saved .*ermission"):
        saver.save_for_sure(snapshot(8), best_step=None)
    assert newest_sound(folder) == (folder / checkpoint_name(4), [])
    saver.save_for_sure(snapshot(12), best_step=None)
    assert steps_saved(tmp_path) == [4, 12]


@contextmanager
def writable_by_none(folder: Path) -> Iterator[None]:
    folder.chmod(0o555)
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)
        folder.chmod(0o755)


@pytest.mark.parametrize("new_is_whole", [True, False])
def test_a_kill_while_a_save_replaces_one_of_its_step_loses_neither(
    tiny_recipe_file: Path, tmp_path: Path, new_is_whole: bool
) -> None:
    """A step is saved twice after a roll-back. The kill falls between the two renames."""
    recipe = load_recipe(tiny_recipe_file, [f"run.dir={tmp_path}"])
    (tmp_path / "recipe.toml").write_text(to_toml(recipe))
    folder, name = tmp_path / "checkpoints", checkpoint_name(8)
    saver = Saver(folder, CheckpointConfig(), World(), Silent())
    for step in (4, 8):
        saver.save_for_sure(snapshot(step), best_step=None)
    os.rename(folder / name, folder / f".{name}.old")
    Saver(tmp_path / "new", CheckpointConfig(), World(), Silent()).save_for_sure(
        snapshot(8, values=5), best_step=None
    )
    os.rename(tmp_path / "new" / name, folder / f".{name}.tmp")
    if not new_is_whole:
        (folder / f".{name}.tmp" / MANIFEST_FILE).unlink()
    assert prepare(recipe, fresh=False).step == 8
    assert bool(load_snapshot(folder / name).weights) == new_is_whole
    saver.save_for_sure(snapshot(12), best_step=None)
    assert not list(folder.glob(".step-*")), "and nothing is left of it"


def test_a_checkpoint_comes_after_the_log_on_the_disk(
    tiny_recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[str] = []

    def flush(path: Path) -> None:
        flushed.append(path.name)
        if broken:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr("clipstack.training.saver.flush_to_disk", flush)
    monkeypatch.setattr(
        "clipstack.training.saver.save_snapshot", lambda folder, snapshot: flushed.append("checkpoint")
    )
    reporter = Reporter(tmp_path, load_recipe(tiny_recipe_file, [f"run.dir={tmp_path}"]))
    reporter.event("test", 1, "a line")
    saver = Saver(tmp_path / "checkpoints", CheckpointConfig(), World(), reporter)
    broken = False
    saver.save_for_sure(snapshot(4), best_step=None)
    assert flushed == ["metrics.jsonl", "checkpoint"]
    broken = True
    with pytest.raises(CheckpointError, match=r"step 8: not saved, since .*metrics\.jsonl cannot be flushed"):
        saver.save_for_sure(snapshot(8), best_step=None)


def test_a_full_disk_silences_tensorboard_and_not_the_run(
    tiny_recipe_file: Path, small_disk: Path, tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard", reason="extra: tensorboard")
    run = tmp_path / "run"
    run.mkdir()
    (run / "tensorboard").symlink_to(small_disk)
    reporter = Reporter(run, load_recipe(tiny_recipe_file, [f"run.dir={run}", "log.tensorboard=true"]))
    reporter.start(0)
    log_step(reporter, 1)
    filler = small_disk / "filler"
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pytest.PytestUnhandledThreadExceptionWarning)  # tensorboard's thread
        for step in range(2, 30):
            log_step(reporter, step)
    told = events_of(run)
    assert len(told) == 1 and "log.tensorboard: cannot be written" in told[0]
    assert [line["step"] for line in read_jsonl(run / "metrics.jsonl") if "loss" in line] == [*range(1, 30)]

    filler.unlink()
    log_step(reporter, 30)
    assert len(events_of(run)) == 1, "not tried again at every line"
    reporter._sinks[0]._retry_at = 0.0
    log_step(reporter, 31)
    assert "log.tensorboard: works again" in events_of(run)[-1]
    reporter.close()


def events_of(run: Path) -> list[str]:
    return [line["message"] for line in read_jsonl(run / "metrics.jsonl") if "event" in line]


def log_step(reporter: Reporter, step: int) -> None:
    reporter.metrics({"step": step, "loss": 1.0, "lr": 0.1, "samples_per_s": 9.0})


class Unreachable:
    """A sink that is never there."""

    name = "log.nowhere"

    def open(self, step: int) -> None:
        raise OSError("no route")

    def write(self, group: str, values: Mapping[str, Any], step: int) -> None:
        raise AssertionError("it is not open")

    def close(self) -> None:
        raise OSError("no route")


def test_a_sink_that_fails_says_so_once_and_raises_nothing() -> None:
    told: list[tuple[int, str]] = []
    sink = PatientSink(Unreachable(), lambda step, message: told.append((step, message)))
    sink.open(3)
    sink.write("train", {}, 4)
    sink.close(4)
    assert told == [(3, "log.nowhere: cannot be written (no route); training goes on without it")]


def test_runs_named_alike_have_ids_of_their_own_and_keep_them_when_moved(tmp_path: Path) -> None:
    first, second = tmp_path / "a/run", tmp_path / "b/run"
    for run in (first, second):
        run.mkdir(parents=True)
    assert wandb_id(first) == wandb_id(first) != wandb_id(second)
    before = wandb_id(first)
    first.rename(tmp_path / "elsewhere")
    assert wandb_id(tmp_path / "elsewhere") == before


def test_a_best_metric_that_validation_does_not_give_is_refused_at_the_start(
    tiny_recipe_file: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    val = tmp_path / "part-00003.tar"
    shutil.copy(tiny_shards / val.name, val)  # without class names beside it

    def check(metric: str, *changes: str) -> None:
        check_validation(
            load_recipe(tiny_recipe_file, [f"data.val={val}", f"eval.best_metric={metric}", *changes])
        )

    check("clip_loss")
    check("text_to_image_r5")
    check("top1", f"eval.classnames={tiny_shards / 'classnames.txt'}")
    with pytest.raises(ConfigError, match=r"eval\.best_metric = 'clip_los': did you mean 'clip_loss'\?"):
        check("clip_los")
    with pytest.raises(ConfigError, match=r"eval\.best_metric = 'top1': .*clip_loss, image_to_text_r1"):
        check("top1")
    with pytest.raises(ConfigError, match="simpel"):
        check("clip_loss", "eval.templates=simpel")


def test_the_best_is_the_lowest_of_what_should_be_low() -> None:
    for metric, best in (("clip_loss", 0.1), ("image_to_text_median_rank", 0.1), ("ece", 0.1), ("top1", 0.3)):
        progress = Progress()
        for step, value in enumerate((0.2, 0.1, 0.3)):
            progress.step = step
            note_best(progress, {metric: value}, metric)
        assert progress.best == best, metric


HOLDER = """
import os, signal, sys
from pathlib import Path
from clipstack.training.run_lock import RunLock
lock = RunLock(Path(sys.argv[1]))
lock.take(at_most_s=1)
if os.fork() == 0:  # as a loader worker is
    print("held", flush=True)
    signal.pause()
signal.pause()
"""


def test_a_run_folder_is_locked_by_a_process_and_free_when_that_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even while a process that it forked lives on."""
    monkeypatch.setattr("clipstack.training.run_lock.LOCK_WAIT_S", 0.1)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with RunLock(tmp_path) as lock, pytest.raises(ConfigError, match="another launch is training in"):
            lock.take(at_most_s=1)
        holder.kill()
        holder.wait()
        with RunLock(tmp_path) as lock:
            lock.take(at_most_s=1)
            with RunLock(tmp_path) as second, pytest.raises(ConfigError):
                second.take(at_most_s=1)
        with RunLock(tmp_path) as lock:
            lock.take(at_most_s=1)
    finally:
        os.killpg(holder.pid, signal.SIGKILL)


def fail_in(folder: Path, *made: str) -> None:
    """A start that makes these (folders end with a slash) and then fails."""
    with pytest.raises(DataError), RunLock(folder) as lock:
        lock.take(at_most_s=1)
        for name in made:
            (folder / name).mkdir() if name.endswith("/") else (folder / name).touch()
        raise DataError("no data")


def test_a_start_that_fails_leaves_the_run_folder_as_it_was(tmp_path: Path) -> None:
    fail_in(tmp_path / "new", "checkpoints/")
    fail_in(tmp_path / "runs" / "newer")
    assert not [*tmp_path.iterdir()]
    (tmp_path / "own").mkdir()
    fail_in(tmp_path / "own", "checkpoints/")
    assert [*tmp_path.rglob("*")] == [tmp_path / "own"]


@pytest.mark.parametrize(
    "made", [("recipe.toml", "checkpoints/"), ("checkpoints/", "checkpoints/step-00000001/")]
)
def test_a_start_that_fails_takes_away_nothing_that_was_written(
    made: tuple[str, ...], tmp_path: Path
) -> None:
    fail_in(tmp_path / "run", *made)
    assert all((tmp_path / "run" / name).exists() for name in made)


def test_who_is_kept_out_of_a_run_folder_takes_nothing_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clipstack.training.run_lock.LOCK_WAIT_S", 0.1)
    with RunLock(tmp_path / "run") as first:
        first.take(at_most_s=1)
        with pytest.raises(ConfigError, match="another launch"), RunLock(tmp_path / "run") as second:
            second.take(at_most_s=1)
        assert (tmp_path / "run" / ".lock").exists()


def test_who_waited_for_a_start_that_fails_holds_the_folder_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock that it waited for is gone: it makes one that others see."""
    monkeypatch.setattr("clipstack.training.run_lock.LOCK_WAIT_S", 0.1)
    first, waiting = RunLock(tmp_path / "run"), RunLock(tmp_path / "run")
    first.take(at_most_s=1)
    assert not waiting._is_taken()
    first.__exit__(DataError)
    with waiting:
        waiting.take(at_most_s=1)
        with pytest.raises(ConfigError, match="another launch"), RunLock(tmp_path / "run") as third:
            third.take(at_most_s=1)


def test_what_killed_saves_have_left_is_removed_by_the_next(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    (folder / ".step-00000003.tmp").mkdir(parents=True)
    (folder / ".step-00000003.tmp" / "model.safetensors").write_bytes(b"half")
    Saver(folder, CheckpointConfig(), World(), Silent()).save_for_sure(snapshot(4), best_step=None)
    assert sorted(path.name for path in folder.iterdir()) == ["latest", checkpoint_name(4)]


@pytest.mark.parametrize("manifest", ["[]", "{}", '{"format": 1, "files": 3}'])
def test_a_manifest_that_is_none_is_damage(tmp_path: Path, manifest: str) -> None:
    saver = Saver(tmp_path, CheckpointConfig(), World(), Silent())
    for step in (4, 8):
        saver.save_for_sure(snapshot(step), best_step=None)
    (tmp_path / checkpoint_name(8) / MANIFEST_FILE).write_text(manifest)
    sound, damaged = newest_sound(tmp_path)
    assert sound == tmp_path / checkpoint_name(4) and len(damaged) == 1


def test_a_file_that_cannot_be_read_is_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = Saver(tmp_path, CheckpointConfig(), World(), Silent())
    for step in (4, 8):
        saver.save_for_sure(snapshot(step), best_step=None)

    def failing(file: Path) -> str:
        if file.parent.name == checkpoint_name(8):
            raise OSError(5, "Input/output error")
        return sha256_of(file)

    monkeypatch.setattr("clipstack.checkpoint.manifest.sha256_of", failing)
    sound, damaged = newest_sound(tmp_path)
    assert sound == tmp_path / checkpoint_name(4) and "Input/output error" in damaged[0]


def test_a_run_is_finished_when_its_last_steps_are_exported(tiny_recipe_file: Path, tmp_path: Path) -> None:
    """Not when an export of fewer steps lies there: a run that was made longer, and killed before it was
    exported."""
    recipe = load_recipe(tiny_recipe_file, [f"run.dir={tmp_path}"])
    (tmp_path / "recipe.toml").write_text(to_toml(recipe))
    saver = Saver(tmp_path / "checkpoints", CheckpointConfig(), World(), Silent())
    saver.save_for_sure(snapshot(recipe.train.steps), best_step=None)
    (tmp_path / "export").mkdir()
    for step, finished in ((recipe.train.steps - 1, False), (recipe.train.steps, True)):
        (tmp_path / "export/clipstack.json").write_text(json.dumps({"step": step}))
        assert prepare(recipe, fresh=False).is_finished is finished


def test_before_the_first_checkpoint_a_recipe_may_change(tiny_recipe_file: Path, tmp_path: Path) -> None:
    before = load_recipe(tiny_recipe_file, [f"run.dir={tmp_path}"])
    (tmp_path / "recipe.toml").write_text(to_toml(before))
    after = load_recipe(tiny_recipe_file, [f"run.dir={tmp_path}", "optim.lr=0.5"])
    assert prepare(after, fresh=True).step == 0
    saver = Saver(tmp_path / "checkpoints", CheckpointConfig(), World(), Silent())
    saver.save_for_sure(snapshot(1), best_step=None)
    with pytest.raises(ConfigError, match=r"optim\.lr = 0\.5"):
        prepare(after, fresh=False)
    with pytest.raises(ConfigError, match="--fresh"):
        prepare(before, fresh=True)


def test_how_a_model_is_computed_may_change_on_resume_and_what_it_is_may_not(
    tiny_recipe_file: Path, tmp_path: Path
) -> None:
    before = load_recipe(tiny_recipe_file, [f"run.dir={tmp_path}"])
    (tmp_path / "recipe.toml").write_text(to_toml(before))
    Saver(tmp_path / "checkpoints", CheckpointConfig(), World(), Silent()).save_for_sure(
        snapshot(1), best_step=None
    )
    free = load_recipe(tiny_recipe_file, [f"run.dir={tmp_path}", "model.grad_checkpointing=true"])
    plan = prepare(free, fresh=False)
    assert plan.step == 1 and "changed since the last start: model.grad_checkpointing" in plan.messages[0]
    fixed = load_recipe(tiny_recipe_file, [f"run.dir={tmp_path}", "model.lock_text=true"])
    with pytest.raises(ConfigError, match=r"model\.lock_text = True"):
        prepare(fixed, fresh=False)


def test_another_metric_starts_anew(tmp_path: Path) -> None:
    progress = Progress(step=2)
    note_best(progress, {"clip_loss": 2.3}, "clip_loss")
    progress.step = 4
    note_best(progress, {"top1": 0.5}, "top1")
    assert (progress.best, progress.best_step) == (0.5, 4)


def test_checkpoints_without_a_recipe_are_no_new_run(tiny_recipe_file: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / checkpoint_name(4)).mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"has checkpoints but no recipe\.toml"):
        prepare(load_recipe(tiny_recipe_file, [f"run.dir={tmp_path}"]), fresh=False)


def test_a_resumed_log_forgets_roll_backs_to_the_checkpoint_that_it_resumes_from(
    tiny_recipe_file: Path, tmp_path: Path
) -> None:
    """The run goes through them again, and would tell of them twice."""
    log = tmp_path / "metrics.jsonl"
    lines = [
        {"event": "rolled_back", "step": 2},
        {"step": 4},
        {"event": "rolled_back", "step": 4},
        {"step": 5},
    ]
    reporter = Reporter(tmp_path, load_recipe(tiny_recipe_file, [f"run.dir={tmp_path}"]))
    for rolled_back, left in ((True, lines[:3]), (False, lines[:2])):
        log.write_text("".join(json.dumps(line) + "\n" for line in lines))
        reporter.start(4, rolled_back=rolled_back)
        assert [json.loads(line) for line in log.read_text().splitlines()] == left


@pytest.mark.parametrize("table", ["auto", {"stage": "auto"}])
def test_auto_in_a_deepspeed_json_takes_the_recipes_stage(tiny_recipe_file: Path, table: object) -> None:
    recipe = load_recipe(tiny_recipe_file, ["train.zero_stage=2"])
    given = {"zero_optimization": table, "torch_autocast": {"enabled": "auto"}}
    config = deepspeed_config(recipe, world_size=1, precision="bf16", user_config=given)
    assert config["zero_optimization"]["stage"] == 2 and config["torch_autocast"]["enabled"] is True


@pytest.mark.parametrize("key", ["optimizer", "scheduler", "torch_autocast", "bf16", "zero_optimization"])
def test_a_table_of_a_deepspeed_json_may_be_auto_and_nothing_else_than_a_table(
    tiny_recipe_file: Path, key: str
) -> None:
    recipe = load_recipe(tiny_recipe_file, [])
    plain = deepspeed_config(recipe, world_size=1, precision="fp32", user_config={})
    assert deepspeed_config(recipe, world_size=1, precision="fp32", user_config={key: "auto"}) == plain
    with pytest.raises(ConfigError, match=f"{key} = True: must be a JSON object"):
        deepspeed_config(recipe, world_size=1, precision="fp32", user_config={key: True})


def test_float16_is_refused_by_name(tiny_recipe_file: Path) -> None:
    given = {"torch_autocast": {"enabled": True, "dtype": "float16"}}
    with pytest.raises(ConfigError, match=r"torch_autocast\.dtype = 'float16'"):
        deepspeed_config(load_recipe(tiny_recipe_file, []), world_size=1, precision="bf16", user_config=given)


def test_a_value_that_is_not_finite_is_never_the_best() -> None:
    progress = Progress(step=2)
    note_best(progress, {"clip_loss": math.nan}, "clip_loss")
    assert progress.best_step is None
    note_best(progress, {"clip_loss": 1.0}, "clip_loss")
    assert progress.best_step == 2
