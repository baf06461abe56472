"""Which checkpoints stay, and what a run folder with odd contents means; without any training."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from clipstack.checkpoint import MANIFEST_FILE, Snapshot, checkpoint_name, newest_sound
from clipstack.config import CheckpointConfig, load_recipe
from clipstack.engine import deepspeed_config
from clipstack.errors import ConfigError
from clipstack.model import ModelRecord
from clipstack.reporting import Reporter, Silent
from clipstack.run_folder import prepare
from clipstack.saver import Saver
from clipstack.trainer import Progress, note_best
from clipstack.world import World
from tests.clipstack.training_runs import steps_saved


def snapshot(step: int) -> Snapshot:
    return Snapshot(
        step=step, samples_seen=step, record=ModelRecord({}, {}), max_logit_scale=1.0, weights={},
        optimizer={}, objective={}, order={}, recipe_toml="",
    )  # fmt: skip


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


def test_a_value_that_is_not_finite_is_never_the_best() -> None:
    progress = Progress(step=2)
    note_best(progress, {"clip_loss": math.nan}, "clip_loss")
    assert progress.best_step is None
    note_best(progress, {"clip_loss": 1.0}, "clip_loss")
    assert progress.best_step == 2
