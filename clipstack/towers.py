"""open_clip's towers: the record that rebuilds them, and their weights, from a name, a file or a folder."""

from __future__ import annotations

import difflib
import json
import logging
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, cast

import clipstack.torchvision_compat  # noqa: F401  isort: skip  (has to precede open_clip)
import open_clip
from open_clip.factory import load_state_dict
from open_clip.transform import PreprocessCfg, merge_preprocess_dict
from safetensors import SafetensorError
from torch import Tensor, nn

from clipstack.config.models import ModelConfig
from clipstack.errors import CheckpointError, ConfigError


@dataclass(frozen=True)
class ModelRecord:
    """What open_clip needs to rebuild a model: the two tables of an open_clip_config.json."""

    model_cfg: dict[str, Any]
    preprocess_cfg: dict[str, Any]

    def to_json(self) -> str:
        return json.dumps(
            {"model_cfg": self.model_cfg, "preprocess_cfg": self.preprocess_cfg}, indent=2, sort_keys=True
        )

    @property
    def context_length(self) -> int:
        return int(self.model_cfg["text_cfg"].get("context_length", 77))

    @property
    def embed_dim(self) -> int:
        return int(self.model_cfg["embed_dim"])


def make_record(config: ModelConfig) -> ModelRecord:
    """The open_clip tables of a model config. Raises ConfigError, with the nearest name, for an unknown
    one."""
    if config.name is None:
        tables = {"embed_dim": config.embed_dim, "vision_cfg": config.vision_cfg, "text_cfg": config.text_cfg}
        return record_of_tables({**tables, "quick_gelu": True} if config.quick_gelu else tables)
    tables = named_tables(config.name, key="model.name")
    return record_of_tables({**tables, "quick_gelu": True} if config.quick_gelu else tables)


def named_tables(name: str, *, key: str, or_folder: bool = False) -> dict[str, Any]:
    """open_clip's config of an architecture name. or_folder: it might have been meant as one. Raises
    ConfigError, with the nearest name, for an unknown one."""
    tables = open_clip.get_model_config(name.replace("/", "-"))
    if tables is None:
        known = {known.lower(): known for known in open_clip.list_models()}
        near = difflib.get_close_matches(name.lower(), known, n=1)
        hint = f"did you mean {known[near[0]]!r}?" if near else "open_clip.list_models() names them"
        folder = "there is no such folder, and " if or_folder else ""
        raise ConfigError(f"{key} = {name!r}: {folder}open_clip has no such architecture; {hint}")
    if "multimodal_cfg" in tables:
        raise ConfigError(
            f"{key} = {name!r}: CoCa's captioning decoder is not supported; take a CLIP architecture"
        )
    return cast(dict[str, Any], tables)


def record_of_tables(
    model_cfg: Mapping[str, Any], preprocess_cfg: Mapping[str, Any] | None = None
) -> ModelRecord:
    """Fill what open_clip would fill: by default pictures are sized for the vision tower."""
    default = PreprocessCfg(size=model_cfg["vision_cfg"].get("image_size", 224))
    merged = merge_preprocess_dict(default, preprocess_cfg or {})
    size = merged["size"]
    if not isinstance(size, int) and size[0] == size[1]:
        merged["size"] = size[0]  # open_clip writes one number or two: equal models have equal records
    return ModelRecord(model_cfg=dict(model_cfg), preprocess_cfg=json.loads(json.dumps(merged)))


def build_towers(
    record: ModelRecord, *, init_logit_scale: float | None = None, init_logit_bias: float | None = None
) -> nn.Module:
    """open_clip's module with random weights from the global torch generator. Raises ConfigError for bad
    tables."""
    tables = {key: value for key, value in record.model_cfg.items() if key != "custom_text"}
    text = dict(tables["text_cfg"])
    if "hf_model_name" in text:
        text["hf_model_pretrained"] = False
    tables |= {"text_cfg": text, "nonscalar_logit_scale": True}
    if init_logit_scale is not None:
        tables["init_logit_scale"] = init_logit_scale
    if init_logit_bias is not None:
        tables["init_logit_bias"] = init_logit_bias
    custom = record.model_cfg.get("custom_text", False) or "hf_model_name" in text
    try:
        return cast(nn.Module, (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**tables))
    except (TypeError, ValueError, RuntimeError, AssertionError, ZeroDivisionError) as error:
        raise ConfigError(
            f"model: open_clip cannot build these towers ({error}); check vision_cfg and text_cfg"
        ) from error


def open_clip_weights(towers: nn.Module) -> dict[str, Tensor]:
    """The towers' state as plain open_clip stores it: contiguous CPU tensors, logit_scale and logit_bias
    scalars."""
    return {name: plain_weight(name, tensor) for name, tensor in towers.state_dict().items()}


def plain_weight(name: str, tensor: Tensor) -> Tensor:
    """One tensor as plain open_clip stores it; see open_clip_weights."""
    tensor = tensor.detach().to("cpu", copy=True)  # a snapshot: training goes on in the original
    return tensor.reshape(()) if name in ("logit_scale", "logit_bias") else tensor.contiguous()


def load_open_clip_weights(towers: nn.Module, weights: Mapping[str, Tensor], *, source: str) -> None:
    """Load weights that plain open_clip stored. Raises CheckpointError naming what does not fit."""
    own = towers.state_dict()
    missing, unknown = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    if missing or unknown:
        raise CheckpointError(
            f"{source}: weights do not fit the model; missing {missing[:3]}, unknown {unknown[:3]}: "
            "is it another architecture?"
        )
    shaped = {
        name: weights[name].reshape(own[name].shape) if weights[name].numel() == 1 else weights[name]
        for name in own
    }
    for name, tensor in shaped.items():
        if tensor.shape != own[name].shape:
            raise CheckpointError(
                f"{source}: {name} has shape {tuple(tensor.shape)}, "
                f"the model wants {tuple(own[name].shape)}: is it another architecture or image size?"
            )
    towers.load_state_dict(shaped)


def pretrained_weights(config: ModelConfig, record: ModelRecord) -> tuple[ModelRecord, dict[str, Tensor]]:
    """Weights named by `model.pretrained`, with the preprocessing that belongs to them."""
    assert config.pretrained is not None
    where = Path(config.pretrained)
    if where.is_dir():
        loaded = open_clip.create_model(f"local-dir:{where}")
    elif config.name is not None:
        loaded = named_pretrained(config.name, config.pretrained, key="model.pretrained")
    elif where.is_file():
        state = load_state_dict(str(where), device="cpu", weights_only=True)
        return record, cast(dict[str, Tensor], state)
    else:
        raise ConfigError(
            f"model.pretrained = {config.pretrained!r}: neither a weights file nor an exported folder"
        )
    preprocess_cfg = open_clip.get_model_preprocess_cfg(loaded)
    return record_of_tables(record.model_cfg, preprocess_cfg), loaded.state_dict()


def named_pretrained(name: str, pretrained: str, *, key: str = "pretrained") -> nn.Module:
    """open_clip's model of an architecture with a tag or a weights file. key: what messages call it. Raises
    ConfigError for an unknown one, and where a tag's weights cannot be downloaded."""
    tags = open_clip.list_pretrained_tags_by_model(name)
    is_file = Path(pretrained).is_file()
    if not is_file and pretrained not in tags:
        raise ConfigError(
            f"{key} = {pretrained!r}: no such file and no tag of {name}; "
            f"its tags: {', '.join(tags) or 'none'}"
        )
    if pretrained in tags:  # as open_clip decides: a tag goes before a file of its name
        _download(name, pretrained, key=key)
    try:
        return cast(nn.Module, open_clip.create_model(name, pretrained=pretrained))
    except _UNUSABLE_WEIGHTS as error:
        if not is_file:
            raise  # a tag: what failed is not the user's file
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"{key} = {pretrained!r}: not the weights of a {name}, or damaged ({reason:.120}); "
            "name a whole .safetensors or .pt file of this architecture"
        ) from error


def _download(name: str, tag: str, *, key: str) -> None:
    """Have a tag's weights in open_clip's cache. Raises ConfigError."""
    muted = logging.root.manager.disable
    logging.disable(logging.ERROR)  # the hub logs each of its tries at length: one error tells of them all
    try:
        open_clip.download_pretrained(open_clip.get_pretrained_cfg(name.replace("/", "-"), tag))
    except (OSError, RuntimeError, HTTPException) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ConfigError(
            f"{key} = {tag!r}: its weights cannot be downloaded ({reason:.200}); where there is no network, "
            f"name a downloaded weights file: {key}=FILE"
        ) from error
    finally:
        logging.disable(muted)


_UNUSABLE_WEIGHTS = (
    SafetensorError,
    pickle.UnpicklingError,
    EOFError,
    RuntimeError,
    AssertionError,
    KeyError,
)
"""What open_clip's reading of a weights file ends with when the file is cut, no weights or another
architecture's."""


def block_stacks(model: nn.Module) -> dict[str, nn.ModuleList | nn.Sequential]:
    """The towers' stacks of transformer blocks, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential) and name.endswith(("resblocks", "blocks"))
    }
