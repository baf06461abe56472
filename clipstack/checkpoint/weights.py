"""Which folder holds a model's weights (a run's, a checkpoint's, an export's), and the weights in it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from clipstack.checkpoint.folder import newest_sound, newest_step
from clipstack.checkpoint.layout import (
    CHECKPOINTS,
    CONFIG_FILE,
    EXPORT,
    FORMAT,
    MANIFEST_FILE,
    RECORD_FILE,
    STATE_FILE,
    WEIGHTS_FILE,
    read_json,
    read_tensors,
)
from clipstack.checkpoint.manifest import damage
from clipstack.errors import CheckpointError, ConfigError
from clipstack.towers import ModelRecord, record_of_tables

DEFAULT_MAX_LOGIT_SCALE = 4.605170185988092  # ln 100


class FoundWeights(NamedTuple):
    """A model that is not built yet. max_logit_scale: the bound of the log scale; tensors: by open_clip's
    names."""

    record: ModelRecord
    max_logit_scale: float
    tensors: Mapping[str, Tensor]


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


def fingerprint_of(record: ModelRecord, weights: Mapping[str, Tensor]) -> str:
    """32 hex digits over the tables and every tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(record.to_json().encode())
    for name in sorted(weights):
        tensor = weights[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


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


def read_weights(path: Path) -> FoundWeights:
    """The model of a checkpoint or an export. Raises CheckpointError."""
    if (path / MANIFEST_FILE).is_file():
        problem = damage(path)
        if problem is not None:
            raise CheckpointError(f"{path}: {problem}; take another checkpoint")
    config = read_json(path / CONFIG_FILE)
    about = next(
        (read_json(path / name) for name in (RECORD_FILE, STATE_FILE) if (path / name).is_file()), {}
    )
    if about.get("format", FORMAT) != FORMAT:
        raise CheckpointError(
            f"{path}: format {about['format']!r}, and this clipstack reads {FORMAT}; "
            "use the version that wrote it"
        )
    tables = config.get("model_cfg")
    if not isinstance(tables, dict) or not {"embed_dim", "vision_cfg", "text_cfg"} <= tables.keys():
        raise CheckpointError(
            f"{path / CONFIG_FILE}: model_cfg must hold embed_dim, vision_cfg and text_cfg; "
            "export the model again"
        )
    record = record_of_tables(tables, config.get("preprocess_cfg", {}))
    max_logit_scale = about.get("max_logit_scale", DEFAULT_MAX_LOGIT_SCALE)
    if not isinstance(max_logit_scale, int | float):
        raise CheckpointError(
            f"{path}: max_logit_scale is {max_logit_scale!r}, not a number; export the model again"
        )
    return FoundWeights(record, float(max_logit_scale), read_tensors(path / WEIGHTS_FILE))
