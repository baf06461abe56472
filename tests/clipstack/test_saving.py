"""Which checkpoints stay, and what a run folder with odd contents means; without any training."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from clipstack.checkpoint import MANIFEST_FILE, Snapshot, checkpoint_name, newest_sound
from clipstack.config import CheckpointConfig, GuardConfig, load_recipe, to_toml
from clipstack.engine import deepspeed_config
from clipstack.errors import CheckpointError, ConfigError
from clipstack.files import sha256_of
from clipstack.guard import Guard
from clipstack.model import ModelRecord
from clipstack.reporting import Reporter, Silent
from clipstack.run_folder import prepare
from clipstack.saver import Saver
from clipstack.trainer import Progress, note_best
from clipstack.world import World
from tests.clipstack.training_runs import steps_saved


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

    monkeypatch.setattr("clipstack.checkpoint.sha256_of", failing)
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
