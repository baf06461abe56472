"""The checkpoints of a run: found, kept and removed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

from clipstack.checkpoint.layout import CHECKPOINTS, MANIFEST_FILE, checkpoint_name, step_of
from clipstack.checkpoint.manifest import damage
from clipstack.errors import CheckpointError


def checkpoints(folder: Path) -> list[Path]:
    """All checkpoint folders, oldest first."""
    return sorted(path for path in folder.glob("step-????????") if path.is_dir())


def newest_step(run_dir: Path) -> int:
    """Of a run's newest checkpoint, by its name; 0 where there is none."""
    found = checkpoints(run_dir / CHECKPOINTS)
    return step_of(found[-1]) if found else 0


def sound_checkpoints(folder: Path) -> Iterator[Path]:
    """Those that are whole, newest first."""
    return (path for path in reversed(checkpoints(folder)) if damage(path) is None)


def newest_sound(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, and a line on each newer one that is not."""
    damaged: list[str] = []
    for path in reversed(checkpoints(folder)):
        problem = damage(path)
        if problem is None:
            return path, damaged
        damaged.append(f"{path}: {problem}")
    return None, damaged


def prune(
    folder: Path, *, keep_last: int, keep_every_steps: int | None = None, keep: Collection[Path] = ()
) -> None:
    """Remove all but the newest `keep_last` checkpoints, those at multiples of `keep_every_steps`,
    and those in `keep`.

    Raises CheckpointError.
    """
    for path in checkpoints(folder)[:-keep_last]:
        if path not in keep and not (keep_every_steps and step_of(path) % keep_every_steps == 0):
            _remove(path)


def drop_later(folder: Path, step: int) -> None:
    """Remove the checkpoints of steps after `step`: damaged ones that resume passed over, and those from
    before a roll-back. Left there, they would push sound ones out of `keep_last`, or be resumed from.

    Raises CheckpointError.
    """
    for path in reversed(checkpoints(folder)):
        if path.name > checkpoint_name(step):
            _remove(path)


def finish_replacements(folder: Path) -> None:
    """Where a save was killed while it took the place of an older one of the same step, between its two
    renames, give the new one its name; or the old one, should the new one be damaged. Raises
    CheckpointError."""
    for old in folder.glob(".step-????????.old"):
        path = old.with_name(old.name[1:].removesuffix(".old"))
        new = old.with_name(f".{path.name}.tmp")
        if not path.exists():
            try:
                os.rename(new if damage(new) is None else old, path)
            except OSError as error:
                raise CheckpointError(f"{path}: cannot be given its name ({error})") from error


def remove_unfinished(folder: Path) -> None:
    """Remove what saves that were killed have left; no other save may be under way."""
    for left in folder.glob(".step-*"):
        shutil.rmtree(left, ignore_errors=True)


def _remove(path: Path) -> None:
    try:
        (path / MANIFEST_FILE).unlink(missing_ok=True)  # first: what is left of it is no checkpoint
        shutil.rmtree(path)
    except OSError as error:
        raise CheckpointError(f"{path}: an old checkpoint could not be removed ({error})") from error
