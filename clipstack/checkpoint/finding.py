"""Which folder of a run holds its model, and how far the run has come."""

from __future__ import annotations

from pathlib import Path

from clipstack.checkpoint.folder import checkpoints, newest_sound, newest_step
from clipstack.checkpoint.layout import CHECKPOINTS, CONFIG_FILE, EXPORT, RECORD_FILE, read_json
from clipstack.errors import CheckpointError, ConfigError


def exported_step(export: Path) -> int | None:
    """The step whose weights an export holds; None where there is no whole one."""
    record = export / RECORD_FILE
    try:
        step: int | None = read_json(record).get("step") if record.is_file() else None
    except CheckpointError:  # damaged: it is written again
        return None
    return step


def is_finished(run_dir: Path, *, step: int, steps: int) -> bool:
    """Whether a run of `steps` steps has nothing left to do; step: of its newest checkpoint. An export of an
    earlier step is from before the run was given more steps."""
    return step >= steps and exported_step(run_dir / EXPORT) == step


def has_model(path: Path) -> bool:
    """Whether a run has come as far as a model, or a folder is one; sound or damaged."""
    exported = (path / CONFIG_FILE, path / EXPORT / CONFIG_FILE)
    return any(file.is_file() for file in exported) or bool(checkpoints(path / CHECKPOINTS))


def weights_folder(path: Path, *, prefer_export: bool) -> Path:
    """The folder below a run, or the folder itself, that holds config and weights. Raises CheckpointError.

    prefer_export: a run's export rather than its newest checkpoint, unless the run has gone on since.
    """
    if not path.is_dir():
        raise ConfigError(f"{path}: no such folder; name a run folder, a checkpoint or an exported model")
    if (path / CONFIG_FILE).is_file():
        return path
    export = path / EXPORT
    if prefer_export and (export / CONFIG_FILE).is_file() and not _has_gone_on(path, exported_step(export)):
        return export
    sound, damaged = newest_sound(path / CHECKPOINTS)
    if sound is None:
        found = (
            f"only damaged ones: {'; '.join(damaged)}" if damaged else f"no {CONFIG_FILE} and no checkpoints/"
        )
        problem = CheckpointError if damaged else ConfigError  # damage is no mistake of the user's
        raise problem(
            f"{path}: no model here ({found}); name a run folder, a checkpoint or an exported model"
        )
    return sound


def _has_gone_on(run_dir: Path, exported: int | None) -> bool:
    """Whether a run has a checkpoint of a later step than its export; None: an export of others' making."""
    return exported is not None and newest_step(run_dir) > exported
