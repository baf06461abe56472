"""`export_model()`: a run's weights as a folder that open_clip loads alone."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from clipstack.checkpoint.cards import (
    DATA_CARD,
    MODEL_CARD,
    Facts,
    count_quarantined,
    data_card,
    model_card,
    run_evaluations,
)
from clipstack.checkpoint.finding import weights_folder
from clipstack.checkpoint.layout import (
    CHECKPOINTS,
    CONFIG_FILE,
    EMA_FILE,
    FORMAT,
    RECIPE_FILE,
    RECORD_FILE,
    STATE_FILE,
    WEIGHTS_FILE,
    read_json,
)
from clipstack.checkpoint.weights import fingerprint_of, read_tensors, read_weights
from clipstack.config import parse_recipe
from clipstack.errors import CheckpointError, ConfigError
from clipstack.files import whole_folder
from clipstack.towers import ModelRecord


def export_model(
    run_or_checkpoint: Path | str,
    out_dir: Path | str,
    *,
    evaluations: Sequence[Mapping[str, Any]] = (),
    average: bool = False,
) -> Path:
    """Write the folder that open_clip loads alone: its config, safetensors, our record, model and data card.

    Reads a run folder (its newest sound checkpoint), a checkpoint, or an exported folder. `evaluations`: what
    `clipstack eval --json` wrote, for the cards. `average`: the moving average of the weights, which a
    checkpoint has where the recipe asks for one. Returns `out_dir`. Raises ConfigError for an `out_dir` or
    evaluations that do not fit, CheckpointError.
    """
    source, out = Path(run_or_checkpoint), Path(out_dir)
    _check_output(out)
    path = weights_folder(source, prefer_export=False)
    record, max_logit_scale, weights = read_weights(path)
    if average:
        weights = read_tensors(path / EMA_FILE)
    about = {
        "format": FORMAT,
        "fingerprint": fingerprint_of(record, weights),
        "max_logit_scale": max_logit_scale,
        "preprocess": record.preprocess_cfg,
        **_provenance(path),
    }
    for one in evaluations:
        if one["fingerprint"] != about["fingerprint"]:
            raise ConfigError(
                f"--evaluation: of model {one['model']} ({one['fingerprint']}), not of this one "
                f"({about['fingerprint']}); evaluate {source} itself"
            )
    # What the run measured of the weights that it trains, not of their average.
    measured = () if average else run_evaluations(_run_of(path, source), step=about.get("step"))
    facts = _facts(source, record, weights, about, (*measured, *evaluations))
    try:
        texts = {
            CONFIG_FILE: record.to_json() + "\n",
            RECORD_FILE: json.dumps(about, indent=2) + "\n",
            MODEL_CARD: model_card(facts),
            DATA_CARD: data_card(facts),
        }
        _write(out, weights, texts)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{out}: could not be written ({error}); make room and export again") from error
    return out


def _check_output(out: Path) -> None:
    """Raises ConfigError for a place that is no earlier export and not free."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--output {out}: is a file; name a new or empty folder")
    if out.exists() and any(out.iterdir()) and not (out / CONFIG_FILE).is_file():
        raise ConfigError(f"--output {out}: holds other files; name a new or empty folder")


def _write(out: Path, weights: Mapping[str, Tensor], texts: Mapping[str, str]) -> None:
    with whole_folder(out) as beside:
        save_file(dict(weights), beside / WEIGHTS_FILE)
        for name, text in texts.items():
            (beside / name).write_text(text, encoding="utf-8")
        # safetensors lets the owner alone read; a server under another account needs what others get.
        (beside / WEIGHTS_FILE).chmod((beside / CONFIG_FILE).stat().st_mode)


def _facts(
    source: Path,
    record: ModelRecord,
    weights: Mapping[str, Tensor],
    about: Mapping[str, Any],
    evaluations: Sequence[Mapping[str, Any]],
) -> Facts:
    recipe = about.get("recipe")
    return Facts(
        fingerprint=about["fingerprint"],
        model_cfg=record.model_cfg,
        preprocess_cfg=record.preprocess_cfg,
        num_parameters=sum(tensor.numel() for tensor in weights.values()),
        recipe=parse_recipe(tomllib.loads(recipe)) if recipe else None,
        step=about.get("step"),
        samples_seen=about.get("samples_seen"),
        order=about.get("data"),
        evaluations=tuple(evaluations),
        num_quarantined=count_quarantined(source) if (source / CHECKPOINTS).is_dir() else None,
    )


def _run_of(weights: Path, source: Path) -> Path:
    """The run folder that a checkpoint lies in; `source` where the weights are no checkpoint."""
    return weights.parent.parent if weights.parent.name == CHECKPOINTS else source


def _provenance(path: Path) -> dict[str, Any]:
    """Where weights come from; nothing for a folder that other tools wrote."""
    if (path / STATE_FILE).is_file():
        state = read_json(path / STATE_FILE)
        return {
            "recipe": (path / RECIPE_FILE).read_text(encoding="utf-8"),
            "step": state["step"],
            "samples_seen": state["samples_seen"],
            "data": state["order"],
        }
    about = read_json(path / RECORD_FILE) if (path / RECORD_FILE).is_file() else {}
    return {key: about[key] for key in ("recipe", "step", "samples_seen", "data") if key in about}
