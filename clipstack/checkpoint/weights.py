"""The weights in a checkpoint's or an export's folder."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from clipstack.checkpoint.layout import (
    CONFIG_FILE,
    FORMAT,
    MANIFEST_FILE,
    RECORD_FILE,
    STATE_FILE,
    WEIGHTS_FILE,
    read_json,
)
from clipstack.checkpoint.manifest import damage
from clipstack.errors import CheckpointError
from clipstack.towers import ModelRecord, record_of_tables

DEFAULT_MAX_LOGIT_SCALE = 4.605170185988092  # ln 100


class FoundWeights(NamedTuple):
    """A model that is not built yet. max_logit_scale: the bound of the log scale; tensors: by open_clip's
    names."""

    record: ModelRecord
    max_logit_scale: float
    tensors: Mapping[str, Tensor]


def fingerprint_of(record: ModelRecord, weights: Mapping[str, Tensor]) -> str:
    """32 hex digits over the tables and every tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(record.to_json().encode())
    for name in sorted(weights):
        tensor = weights[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


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


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises CheckpointError."""
    try:
        return load_file(file)
    except FileNotFoundError:
        # safetensors says so, too, of a file that it may not read.
        problem = (
            "may not be read by this user" if file.exists() else "missing; only safetensors weights are read"
        )
        raise CheckpointError(f"{file}: {problem}") from None
    except SafetensorError as error:
        raise CheckpointError(f"{file}: damaged ({error}); export the model again") from error
