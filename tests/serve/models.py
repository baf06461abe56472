"""Tiny CLIP models in folders as `clipstack export` writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from clipstack.config.models import ModelConfig
from clipstack.model import ClipModel, build_model
from clipstack.towers import open_clip_weights

TABLES: dict[str, Any] = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 2},
}


def tiny_model(seed: int = 0, *, sigmoid: bool = False, **changes: Any) -> ClipModel:
    """Random weights, with a text tower and patches that tell inputs apart as a trained model would."""
    model = build_model(ModelConfig(**{**TABLES, **changes}), seed=seed, needs_logit_bias=sigmoid)
    return model.eval().requires_grad_(False)


def save_model(folder: Path, model: ClipModel) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(model.record.to_json())
    save_file(open_clip_weights(model.towers), folder / "open_clip_model.safetensors")
    return folder
