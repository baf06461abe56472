"""Whether a run folder is new, half done or finished, and what may differ when it goes on."""

from __future__ import annotations

import errno
import fcntl
import os
import sys
import time
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipstack.checkpoint import (
    CHECKPOINTS,
    RECIPE_FILE,
    Snapshot,
    checkpoints,
    finish_replacements,
    is_finished,
    load_snapshot,
    newest_sound,
)
from clipstack.config import Recipe, parse_recipe, to_toml
from clipstack.errors import CheckpointError, ConfigError
from clipstack.files import write_text
from clipstack.model import ClipModel, load_open_clip_weights
from clipstack.training.precision import with_precision

FIXED_KEYS = (
    "seed", "model", "objective", "optim", "data.caption", "data.lanes", "data.window_shards",
    "data.quantum", "data.augment", "train.batch_size", "train.precision", "train.ema_decay",
)  # fmt: skip
"""What a run is: changing one of these on resume would make it another run. Of `data.train` it is the
shards that count, not the path: see `TrainLoader.check_state`."""
FREE_KEYS = ("model.grad_checkpointing", "model.compile", "model.pretrained")
"""How it is computed, or what a resumed run does not read."""
LOCK_FILE = ".lock"
LOCK_WAIT_S = 30.0
"""The ranks of a launch whose launcher was killed still save; the same command may be given meanwhile."""
LOCK_POLL_S = 0.1


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


class RunLock:
    """Keeps a second launch out of a run folder: an flock on RUN/.lock, which the kernel drops when the
    process that holds it ends, however it ends. One process of a launch takes it."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._file: int | None = None

    def take(self, *, at_most_s: float) -> None:
        """Wait a little for the ranks of a launch that is ending. Raises ConfigError for one that is not."""
        make_folder(self._run_dir, self._run_dir)
        try:
            self._file = os.open(self._run_dir / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise _unwritable(self._run_dir, error) from error
        os.register_at_fork(after_in_child=self.release)  # loader workers must not hold it for us
        give_up = time.monotonic() + min(LOCK_WAIT_S, at_most_s)
        said = False
        while not self._is_taken():
            if time.monotonic() >= give_up:
                raise ConfigError(
                    f"run.dir = {str(self._run_dir)!r}: another launch is training in this folder (it holds "
                    f"{LOCK_FILE}); wait for it, stop it, or choose another folder"
                )
            if not said:
                print(f"{self._run_dir}: waiting for another launch to leave it", file=sys.stderr, flush=True)
                said = True
            time.sleep(LOCK_POLL_S)

    def _is_taken(self) -> bool:
        assert self._file is not None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise _unwritable(self._run_dir, error) from error
            print(
                f"{self._run_dir}: its file system knows no locks ({error.strerror}); nothing keeps a second "
                "launch out",
                file=sys.stderr,
                flush=True,
            )
        return True

    def release(self) -> None:
        """In a forked child this lets go of the child's copy only."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()


def make_folder(folder: Path, run_dir: Path) -> None:
    """Raises ConfigError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"run.dir = {str(run_dir)!r}: cannot be made ({error}); choose another folder"
        ) from error


def write_recipe(recipe: Recipe) -> None:
    """Raises ConfigError."""
    try:
        write_text(recipe.run.dir / RECIPE_FILE, to_toml(recipe))
    except OSError as error:
        raise _unwritable(recipe.run.dir, error) from error


def _unwritable(run_dir: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"run.dir = {str(run_dir)!r}: cannot be written ({error}); make room or choose another folder"
    )


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
    step = int(newest.name.removeprefix("step-"))
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
