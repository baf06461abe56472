"""The files of checkpoints and exports: their names, and reading one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from clipstack.errors import CheckpointError

FORMAT = 1
CHECKPOINTS = "checkpoints"
"""The folder of a run that they lie in."""
EXPORT = "export"
"""The folder of a run that its finished model is exported to."""

# Of checkpoints and exports: open_clip reads these two.
CONFIG_FILE, WEIGHTS_FILE = "open_clip_config.json", "open_clip_model.safetensors"
# Of exports.
RECORD_FILE = "clipstack.json"
# Of checkpoints.
STATE_FILE, MANIFEST_FILE, RECIPE_FILE = "state.json", "manifest.json", "recipe.toml"
OPTIMIZER_FILE, OBJECTIVE_FILE, EMA_FILE = (
    "optimizer.safetensors", "objective.safetensors", "ema.safetensors",
)  # fmt: skip


def checkpoint_name(step: int) -> str:
    """The folder of a step's checkpoint; names sort as steps do."""
    return f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint's folder is named for."""
    return int(checkpoint.name.removeprefix("step-"))


def read_json(path: Path) -> dict[str, Any]:
    """The object of a JSON file. Raises CheckpointError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); export the model again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object; export the model again")
    return value
