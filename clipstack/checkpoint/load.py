"""`load_model()`: a run, an exported folder or an open_clip name to a model with its preprocessing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import clipstack.torchvision_compat  # noqa: F401  isort: skip  (has to precede open_clip)
import open_clip
import torch
from torch import nn

from clipstack.checkpoint.finding import weights_folder
from clipstack.checkpoint.weights import (
    DEFAULT_MAX_LOGIT_SCALE,
    FoundWeights,
    fingerprint_of,
    read_weights,
)
from clipstack.errors import ConfigError
from clipstack.model import ClipModel
from clipstack.preprocess import Preprocess
from clipstack.towers import (
    ModelRecord,
    build_towers,
    load_open_clip_weights,
    named_pretrained,
    named_tables,
    open_clip_weights,
    record_of_tables,
)
from data_pipelines.sources import did_you_mean


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
    where, name = Path(path_or_name), str(path_or_name)
    is_random = False
    if where.is_dir():
        _refuse_pretrained(pretrained, str(where))
        found = read_weights(weights_folder(where, prefer_export=True))
    elif where.exists() or name.startswith((".", "/", "~")) or name.endswith("/"):
        raise ConfigError(
            f"--model {name}: not a folder; name a run, an exported folder or an open_clip architecture"
        )
    elif name.startswith("hf-hub:"):
        _refuse_pretrained(pretrained, name)
        found = _of_open_clip(_from_hub(name), open_clip.get_model_config(name))
    elif where.parent != Path() and where.parent.is_dir():
        raise ConfigError(f"--model {name}: no such folder{did_you_mean(where)}")
    else:
        tables = named_tables(name, key="--model", or_folder=True)
        if pretrained is not None:
            found = _of_open_clip(named_pretrained(name, pretrained), tables)
        else:
            found, is_random = _random(record_of_tables(tables)), True
    return _assemble(name, found, device=device, dtype=dtype, is_random=is_random)


def _refuse_pretrained(pretrained: str | None, name: str) -> None:
    if pretrained is not None:
        raise ConfigError(f"pretrained = {pretrained!r}: {name} has weights of its own; drop one of the two")


def _from_hub(name: str) -> nn.Module:
    """Raises ConfigError."""
    try:
        return cast(nn.Module, open_clip.create_model(name))
    except (RuntimeError, ValueError) as error:  # what open_clip makes of every failure of a download
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"--model {name}: the Hugging Face hub gives no such model ({reason})") from error


def _of_open_clip(towers: nn.Module, tables: Mapping[str, Any]) -> FoundWeights:
    """What open_clip loaded, with the preprocessing that belongs to it."""
    record = record_of_tables(tables, open_clip.get_model_preprocess_cfg(towers))
    return FoundWeights(record, DEFAULT_MAX_LOGIT_SCALE, open_clip_weights(towers))


def _random(record: ModelRecord) -> FoundWeights:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return FoundWeights(record, DEFAULT_MAX_LOGIT_SCALE, open_clip_weights(build_towers(record)))


def _assemble(
    name: str,
    found: FoundWeights,
    *,
    device: str | torch.device,
    dtype: torch.dtype | None,
    is_random: bool,
) -> LoadedModel:
    record, max_logit_scale, weights = found
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
