"""Training state on disk, exported models, and reading any model back.

A checkpoint says nothing of ranks or ZeRO stages: whole weights, whole optimizer state by parameter name. Its
folder is also a folder that open_clip loads. No pickle anywhere.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import clipstack.torchvision_compat  # noqa: F401  isort: skip  (has to precede open_clip)
import open_clip

from clipstack.cards import (
    DATA_CARD,
    MODEL_CARD,
    Facts,
    count_quarantined,
    data_card,
    model_card,
    run_evaluations,
)
from clipstack.config import parse_recipe
from clipstack.errors import CheckpointError, ConfigError
from clipstack.files import sha256_of, whole_folder, write_text
from clipstack.model import (
    ClipModel,
    ModelRecord,
    build_towers,
    load_open_clip_weights,
    named_pretrained,
    named_tables,
    open_clip_weights,
    record_of_tables,
)
from clipstack.preprocess import Preprocess
from data_pipelines.sources import did_you_mean

FORMAT = 1
CHECKPOINTS = "checkpoints"
"""The folder of a run that they lie in."""
CONFIG_FILE, WEIGHTS_FILE = "open_clip_config.json", "open_clip_model.safetensors"
RECORD_FILE, STATE_FILE, MANIFEST_FILE, RECIPE_FILE = (
    "clipstack.json",
    "state.json",
    "manifest.json",
    "recipe.toml",
)
OPTIMIZER_FILE, OBJECTIVE_FILE, AVERAGE_FILE = (
    "optimizer.safetensors",
    "objective.safetensors",
    "ema.safetensors",
)
DEFAULT_MAX_LOGIT_SCALE = 4.605170185988092  # ln 100


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
    average: Mapping[str, Tensor] | None = None
    """The moving average of the weights, if the recipe asks for one."""
    progress: Mapping[str, Any] = field(default_factory=dict)
    """Small values of the loop: events of the divergence guard, best metric, smoothing."""


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def save_snapshot(folder: Path, snapshot: Snapshot) -> Path:
    """Write FOLDER/step-XXXXXXXX, complete or not at all, then name it in FOLDER/latest. One process calls
    it.

    Raises CheckpointError where the disk refuses; what was there before is untouched.
    """
    path = folder / checkpoint_name(snapshot.step)
    try:
        with whole_folder(path) as beside:
            _write_snapshot(beside, snapshot)
            _write_manifest(beside, snapshot.step)
        write_text(folder / "latest", path.name + "\n")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: could not be saved ({error}); the checkpoints before it are untouched"
        ) from error
    return path


def _write_snapshot(folder: Path, snapshot: Snapshot) -> None:
    save_file(dict(snapshot.weights), folder / WEIGHTS_FILE)
    save_file(dict(snapshot.optimizer), folder / OPTIMIZER_FILE)
    if snapshot.average is not None:
        save_file(dict(snapshot.average), folder / AVERAGE_FILE)
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


def _write_manifest(folder: Path, step: int) -> None:
    files = [
        {"path": path.name, "size": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(folder.iterdir())
        if path.name != MANIFEST_FILE
    ]
    text = json.dumps({"format": FORMAT, "step": step, "files": files}, indent=2)
    (folder / MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")


def load_snapshot(path: Path) -> Snapshot:
    """Read a checkpoint whose files agree with its manifest. Raises CheckpointError, naming what is wrong."""
    problem = damage(path)
    if problem is not None:
        raise CheckpointError(
            f"{path}: {problem}; remove this folder to resume from the checkpoint before it"
        )
    state = _read_json(path / STATE_FILE)
    config = _read_json(path / CONFIG_FILE)
    average = path / AVERAGE_FILE
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
        average=load_file(average) if average.is_file() else None,
        progress=state["progress"],
    )


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, by its manifest; None for a sound one."""
    try:
        manifest = json.loads((path / MANIFEST_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"{MANIFEST_FILE} is missing"
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        return f"{MANIFEST_FILE} cannot be read ({error})"
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), list):
        return f"{MANIFEST_FILE} is no manifest"
    if manifest.get("format") != FORMAT:
        found = manifest.get("format")
        return f"format {found!r}, and this clipstack reads {FORMAT}; use the version that wrote it"
    for entry in manifest["files"]:
        problem = _file_damage(path / entry["path"], entry)
        if problem is not None:
            return f"{entry['path']} {problem}"
    return None


def _file_damage(file: Path, entry: Mapping[str, Any]) -> str | None:
    if not file.is_file():
        return "is missing"
    try:
        size = file.stat().st_size
        if size != entry["size"]:
            return f"has {size} bytes, not {entry['size']}"
        return None if sha256_of(file) == entry["sha256"] else "does not match its checksum"
    except OSError as error:
        return f"cannot be read ({error})"


def checkpoints(folder: Path) -> list[Path]:
    """All checkpoint folders, oldest first."""
    return sorted(path for path in folder.glob("step-????????") if path.is_dir())


def newest_step(run_dir: Path) -> int:
    """Of a run's newest checkpoint, by its name; 0 where there is none."""
    found = checkpoints(run_dir / CHECKPOINTS)
    return int(found[-1].name.removeprefix("step-")) if found else 0


def sound_checkpoints(folder: Path) -> Iterator[Path]:
    """Those that are whole, newest first."""
    return (path for path in reversed(checkpoints(folder)) if damage(path) is None)


def read_progress(path: Path) -> dict[str, Any]:
    """What the loop kept in a checkpoint; see Snapshot.progress."""
    progress: dict[str, Any] = _read_json(path / STATE_FILE)["progress"]
    return progress


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
        step = int(path.name.removeprefix("step-"))
        if path not in keep and not (keep_every_steps and step % keep_every_steps == 0):
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


def exported_step(export: Path) -> int | None:
    """The step whose weights an export holds; None where there is no whole one."""
    record = export / RECORD_FILE
    try:
        step: int | None = _read_json(record).get("step") if record.is_file() else None
    except CheckpointError:  # damaged: it is written again
        return None
    return step


def is_finished(run_dir: Path, *, step: int, steps: int) -> bool:
    """Whether a run of `steps` steps has nothing left to do; step: of its newest checkpoint. An export of an
    earlier step is from before the run was given more steps."""
    return step >= steps and exported_step(run_dir / "export") == step


def _remove(path: Path) -> None:
    try:
        (path / MANIFEST_FILE).unlink(missing_ok=True)  # first: what is left of it is no checkpoint
        shutil.rmtree(path)
    except OSError as error:
        raise CheckpointError(f"{path}: an old checkpoint could not be removed ({error})") from error


# ---- Exported models ----


@dataclass(frozen=True)
class LoadedModel:
    """A model with all that turns pictures and captions into its inputs.

    name: as it was asked for. model: in eval mode, on the device asked for; takes what the two below make to
    (N, D) unit-norm features. preprocess: images and texts to its inputs. tokenizer: open_clip's, N texts to
    (N, context_length) int64. fingerprint: 32 hex digits that equal models share, whatever folder they lie
    in. is_random: no weights were loaded.
    """

    name: str
    model: ClipModel
    preprocess: Preprocess
    tokenizer: Any
    fingerprint: str
    is_random: bool = False


def fingerprint_of(record: ModelRecord, weights: Mapping[str, Tensor]) -> str:
    """32 hex digits over the tables and every tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(record.to_json().encode())
    for name in sorted(weights):
        tensor = weights[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


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
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--output {out}: is a file; name a new or empty folder")
    if out.exists() and any(out.iterdir()) and not (out / CONFIG_FILE).is_file():
        raise ConfigError(f"--output {out}: holds other files; name a new or empty folder")
    path = _weights_folder(source, prefer_export=False)
    record, max_logit_scale, weights = _read_weights(path)
    if average:
        weights = _read_tensors(path / AVERAGE_FILE)
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
        with whole_folder(out) as beside:
            save_file(weights, beside / WEIGHTS_FILE)
            (beside / CONFIG_FILE).write_text(record.to_json() + "\n", encoding="utf-8")
            # safetensors lets the owner alone read; a server under another account needs what others get.
            (beside / WEIGHTS_FILE).chmod((beside / CONFIG_FILE).stat().st_mode)
            (beside / RECORD_FILE).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
            (beside / MODEL_CARD).write_text(model_card(facts), encoding="utf-8")
            (beside / DATA_CARD).write_text(data_card(facts), encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{out}: could not be written ({error}); make room and export again") from error
    return out


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
        state = _read_json(path / STATE_FILE)
        return {
            "recipe": (path / RECIPE_FILE).read_text(encoding="utf-8"),
            "step": state["step"],
            "samples_seen": state["samples_seen"],
            "data": state["order"],
        }
    about = _read_json(path / RECORD_FILE) if (path / RECORD_FILE).is_file() else {}
    return {key: about[key] for key in ("recipe", "step", "samples_seen", "data") if key in about}


def load_model(
    path_or_name: Path | str,
    *,
    pretrained: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> LoadedModel:
    """A model to evaluate, embed or serve with, in eval mode.

    `path_or_name`: a run folder (its export/ once finished, else its newest sound checkpoint), a checkpoint,
    an exported folder, `hf-hub:ORGANISATION/REPOSITORY` for what open_clip downloads from there, or an
    open_clip name, with `pretrained` a tag or a weights file; an open_clip name without one gives random
    weights. Raises ConfigError for an unknown name, CheckpointError for a folder that cannot be read.
    """
    where = Path(path_or_name)
    name = str(path_or_name)
    if where.is_dir():
        if pretrained is not None:
            raise ConfigError(
                f"pretrained = {pretrained!r}: {where} has weights of its own; drop one of the two"
            )
        record, max_logit_scale, weights = _read_weights(_weights_folder(where, prefer_export=True))
        return _assemble(name, record, max_logit_scale, weights, device=device, dtype=dtype)
    if where.exists() or name.startswith((".", "/", "~")) or name.endswith("/"):
        raise ConfigError(
            f"--model {name}: not a folder; name a run, an exported folder or an open_clip architecture"
        )
    if name.startswith("hf-hub:"):
        towers = _from_hub(name, pretrained)
        record = record_of_tables(
            open_clip.get_model_config(name), open_clip.get_model_preprocess_cfg(towers)
        )
        return _assemble(
            name, record, DEFAULT_MAX_LOGIT_SCALE, open_clip_weights(towers), device=device, dtype=dtype
        )
    if where.parent != Path() and where.parent.is_dir():
        raise ConfigError(f"--model {name}: no such folder{did_you_mean(where)}")
    tables = named_tables(name, key="--model", or_folder=True)
    if pretrained is not None:
        towers = named_pretrained(name, pretrained)
        record = record_of_tables(tables, open_clip.get_model_preprocess_cfg(towers))
        return _assemble(
            name, record, DEFAULT_MAX_LOGIT_SCALE, open_clip_weights(towers), device=device, dtype=dtype
        )
    record = record_of_tables(tables)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        weights = open_clip_weights(build_towers(record))
    return _assemble(
        name, record, DEFAULT_MAX_LOGIT_SCALE, weights, device=device, dtype=dtype, is_random=True
    )


def _from_hub(name: str, pretrained: str | None) -> nn.Module:
    """Raises ConfigError."""
    if pretrained is not None:
        raise ConfigError(f"pretrained = {pretrained!r}: {name} has weights of its own; drop one of the two")
    try:
        return cast(nn.Module, open_clip.create_model(name))
    except (RuntimeError, ValueError) as error:  # what open_clip makes of every failure of a download
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"--model {name}: the Hugging Face hub gives no such model ({reason})") from error


def _assemble(
    name: str,
    record: ModelRecord,
    max_logit_scale: float,
    weights: Mapping[str, Tensor],
    *,
    device: str | torch.device,
    dtype: torch.dtype | None,
    is_random: bool = False,
) -> LoadedModel:
    bias = float(weights["logit_bias"]) if "logit_bias" in weights else None
    with torch.random.fork_rng(devices=[]):
        towers = build_towers(record, init_logit_bias=bias)
    load_open_clip_weights(towers, weights, source=name)
    model = ClipModel(towers, record, max_logit_scale=max_logit_scale).to(device=device, dtype=dtype).eval()
    preprocess = Preprocess.from_record(record)
    fingerprint = fingerprint_of(record, weights)
    return LoadedModel(
        name, model.requires_grad_(False), preprocess, preprocess.tokenizer, fingerprint, is_random
    )


def _weights_folder(path: Path, *, prefer_export: bool) -> Path:
    """The folder below a run, or the folder itself, that holds config and weights. Raises CheckpointError.

    prefer_export: a run's export rather than its newest checkpoint, unless the run has gone on since.
    """
    if not path.is_dir():
        raise ConfigError(f"{path}: no such folder; name a run folder, a checkpoint or an exported model")
    if (path / CONFIG_FILE).is_file():
        return path
    export = path / "export"
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


def _read_weights(path: Path) -> tuple[ModelRecord, float, dict[str, Tensor]]:
    """Tables, bound of the log scale, weights. Raises CheckpointError."""
    if (path / MANIFEST_FILE).is_file():
        problem = damage(path)
        if problem is not None:
            raise CheckpointError(f"{path}: {problem}; take another checkpoint")
    config = _read_json(path / CONFIG_FILE)
    about = next(
        (_read_json(path / name) for name in (RECORD_FILE, STATE_FILE) if (path / name).is_file()), {}
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
    return record, float(max_logit_scale), _read_tensors(path / WEIGHTS_FILE)


def _read_tensors(file: Path) -> dict[str, Tensor]:
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


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); export the model again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object; export the model again")
    return value
