"""Whether a run folder is new, half done or finished, and what may differ when it goes on."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipstack.checkpoint.finding import is_finished
from clipstack.checkpoint.folder import checkpoints, finish_replacements, newest_sound
from clipstack.checkpoint.layout import CHECKPOINTS, RECIPE_FILE, step_of
from clipstack.checkpoint.snapshot import Snapshot, load_snapshot
from clipstack.config import Recipe, parse_recipe, to_toml
from clipstack.errors import CheckpointError, ConfigError
from clipstack.files import write_text
from clipstack.model import ClipModel
from clipstack.towers import load_open_clip_weights
from clipstack.training.precision import with_precision
from clipstack.training.run_lock import make_folder, unwritable

FIXED_KEYS = (
    "seed", "model", "objective", "optim", "data.caption", "data.lanes", "data.window_shards",
    "data.quantum", "data.augment", "train.batch_size", "train.precision", "train.ema_decay",
)  # fmt: skip
"""What a run is: changing one of these on resume would make it another run. Of `data.train` it is the
shards that count, not the path: see `TrainLoader.check_state`."""
FREE_KEYS = ("model.grad_checkpointing", "model.compile", "model.pretrained")
"""How it is computed, or what a resumed run does not read."""


@dataclass(frozen=True)
class Plan:
    """What to do with a run folder."""

    recipe: Recipe
    step: int
    is_finished: bool
    resume_from: Path | None
    messages: tuple[str, ...]

    def load(self, model: ClipModel) -> Snapshot | None:
        """The state to go on from, its weights put into `model`; None for a new run. Raises
        CheckpointError."""
        if self.resume_from is None:
            return None
        snapshot = load_snapshot(self.resume_from)
        load_open_clip_weights(model.towers, snapshot.weights, source=str(self.resume_from))
        model.record = snapshot.record
        return snapshot


def write_recipe(recipe: Recipe) -> None:
    """Raises ConfigError."""
    try:
        write_text(recipe.run.dir / RECIPE_FILE, to_toml(recipe))
    except OSError as error:
        raise unwritable(recipe.run.dir, error) from error


def prepare(recipe: Recipe, *, fresh: bool, dry_run: bool = False) -> Plan:
    """Look at the run folder, and make it where there is none. One process calls it. Raises ConfigError."""
    run_dir = recipe.run.dir
    saved = run_dir / RECIPE_FILE
    if dry_run:
        return Plan(recipe, 0, False, None, ())
    make_folder(run_dir / CHECKPOINTS, run_dir)
    finish_replacements(run_dir / CHECKPOINTS)
    if not saved.exists():
        left = checkpoints(run_dir / CHECKPOINTS)
        if left:
            raise ConfigError(
                f"run.dir = {str(run_dir)!r}: has checkpoints but no {RECIPE_FILE}; copy "
                f"{left[-1] / RECIPE_FILE} there, or choose another folder"
            )
        return Plan(recipe, 0, False, None, ())
    begun = bool(checkpoints(run_dir / CHECKPOINTS))  # else there is nothing yet that could be mixed
    if fresh and begun:
        raise ConfigError(
            f"run.dir = {str(run_dir)!r}: --fresh, but a run lies there already; choose another folder or "
            "remove it"
        )
    before = _saved_recipe(saved)
    recipe = _keep_precision(recipe, before)
    changes = list(differences(before, recipe))
    for key, old, new in changes:
        if begun and key.startswith(FIXED_KEYS) and key not in FREE_KEYS:
            raise ConfigError(
                f"{key} = {new!r}: the run in {run_dir} has {old!r}; put it back, or train into another "
                "run.dir"
            )
    newest, damaged = newest_sound(run_dir / CHECKPOINTS)
    messages = [f"damaged checkpoint left aside: {line}" for line in damaged]
    messages += [f"changed since the last start: {key} = {new!r} (was {old!r})" for key, old, new in changes]
    if newest is None:
        if damaged:
            raise CheckpointError(
                f"{run_dir}: every checkpoint is damaged: {'; '.join(damaged)}; train into another run.dir"
            )
        return Plan(recipe, 0, False, None, tuple(messages))
    step = step_of(newest)
    done = is_finished(run_dir, step=step, steps=recipe.train.steps)
    return Plan(recipe, step, done, newest, (*messages, f"resuming {run_dir} at step {step}"))


def _saved_recipe(path: Path) -> Recipe:
    try:
        return parse_recipe(tomllib.loads(path.read_text(encoding="utf-8")))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: damaged ({error}); train into another run.dir") from error


def _keep_precision(recipe: Recipe, before: Recipe) -> Recipe:
    """What "auto" was measured to be stays, so that a resumed run computes as the first one did."""
    if recipe.train.precision != "auto":
        return recipe
    return with_precision(recipe, before.train.precision)


def differences(before: Recipe, now: Recipe) -> Iterator[tuple[str, Any, Any]]:
    """(key, old, new) of each value that differs; the run's own folder, which may have been moved, is no
    difference."""
    old, new = (dict(_flat(recipe.model_dump(mode="json"))) for recipe in (before, now))
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key) and key != "run.dir":
            yield key, old.get(key), new.get(key)


def _flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
