"""Everything that training needs to go on, as a folder: written whole or not at all, and read back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from clipstack.checkpoint.layout import (
    CONFIG_FILE,
    EMA_FILE,
    FORMAT,
    OBJECTIVE_FILE,
    OPTIMIZER_FILE,
    RECIPE_FILE,
    STATE_FILE,
    WEIGHTS_FILE,
    checkpoint_name,
    read_json,
)
from clipstack.checkpoint.manifest import damage, write_manifest
from clipstack.errors import CheckpointError
from clipstack.files import whole_folder, write_text
from clipstack.towers import ModelRecord


@dataclass(frozen=True)
class Snapshot:
    """Everything that training needs to go on as if it had never stopped."""

    step: int
    samples_seen: int
    """Position in the order of the data: samples consumed by optimizer steps, and skipped windows."""
    record: ModelRecord
    max_logit_scale: float
    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    objective: Mapping[str, Any]
    """The objective's state, the same on all ranks: a tree of tables, tensors and plain values."""
    order: Mapping[str, Any]
    """What decides the order of the data, manifest hash included."""
    recipe_toml: str
    ema: Mapping[str, Tensor] | None = None
    """The moving average of the weights, if the recipe asks for one."""
    progress: Mapping[str, Any] = field(default_factory=dict)
    """Small values of the loop: events of the divergence guard, best metric, smoothing."""


def save_snapshot(folder: Path, snapshot: Snapshot) -> Path:
    """Write FOLDER/step-XXXXXXXX, complete or not at all, then name it in FOLDER/latest. One process calls
    it.

    Raises CheckpointError where the disk refuses; what was there before is untouched.
    """
    path = folder / checkpoint_name(snapshot.step)
    try:
        with whole_folder(path) as beside:
            _write_snapshot(beside, snapshot)
            write_manifest(beside, snapshot.step)
        write_text(folder / "latest", path.name + "\n")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: could not be saved ({error}); the checkpoints before it are untouched"
        ) from error
    return path


def _write_snapshot(folder: Path, snapshot: Snapshot) -> None:
    save_file(dict(snapshot.weights), folder / WEIGHTS_FILE)
    save_file(dict(snapshot.optimizer), folder / OPTIMIZER_FILE)
    if snapshot.ema is not None:
        save_file(dict(snapshot.ema), folder / EMA_FILE)
    tensors, values = split_tree(snapshot.objective)
    save_file(tensors, folder / OBJECTIVE_FILE)
    (folder / CONFIG_FILE).write_text(snapshot.record.to_json() + "\n", encoding="utf-8")
    (folder / RECIPE_FILE).write_text(snapshot.recipe_toml, encoding="utf-8")
    state = {
        "format": FORMAT,
        "step": snapshot.step,
        "samples_seen": snapshot.samples_seen,
        "max_logit_scale": snapshot.max_logit_scale,
        "objective": values,
        "order": dict(snapshot.order),
        "progress": dict(snapshot.progress),
    }
    (folder / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")


def split_tree(tree: Mapping[str, Any], prefix: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A tree of tables into its tensors by dotted name, and the same tree with null in their places."""
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            inner, values[name] = split_tree(value, f"{prefix}{name}.")
            tensors |= inner
        elif isinstance(value, Tensor):
            tensors[prefix + name], values[name] = value.detach().cpu().contiguous(), None
        else:
            values[name] = value
    return tensors, values


def join_tree(tensors: Mapping[str, Tensor], values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The tree that `split_tree` split."""
    return {
        name: join_tree(tensors, value, f"{prefix}{name}.")
        if isinstance(value, Mapping)
        else tensors.get(prefix + name, value)
        for name, value in values.items()
    }


def load_snapshot(path: Path) -> Snapshot:
    """Read a checkpoint whose files agree with its manifest. Raises CheckpointError, naming what is wrong."""
    problem = damage(path)
    if problem is not None:
        raise CheckpointError(
            f"{path}: {problem}; remove this folder to resume from the checkpoint before it"
        )
    state = read_json(path / STATE_FILE)
    config = read_json(path / CONFIG_FILE)
    ema = path / EMA_FILE
    return Snapshot(
        step=state["step"],
        samples_seen=state["samples_seen"],
        record=ModelRecord(config["model_cfg"], config["preprocess_cfg"]),
        max_logit_scale=state["max_logit_scale"],
        weights=load_file(path / WEIGHTS_FILE),
        optimizer=load_file(path / OPTIMIZER_FILE),
        objective=join_tree(load_file(path / OBJECTIVE_FILE), state["objective"]),
        order=state["order"],
        recipe_toml=(path / RECIPE_FILE).read_text(encoding="utf-8"),
        ema=load_file(ema) if ema.is_file() else None,
        progress=state["progress"],
    )


def read_progress(path: Path) -> dict[str, Any]:
    """What the loop kept in a checkpoint; see Snapshot.progress."""
    progress: dict[str, Any] = read_json(path / STATE_FILE)["progress"]
    return progress
