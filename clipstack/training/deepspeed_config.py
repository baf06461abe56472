"""DeepSpeed's JSON: the recipe's values and the user's file as one table, a disagreement refused by name."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from clipstack.config import Recipe
from clipstack.errors import ConfigError
from clipstack.training.precision import Precision


def read_user_config(path: Path | None) -> dict[str, Any]:
    """A DeepSpeed JSON given by the user. Raises ConfigError."""
    if path is None:
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"--deepspeed_config {path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--deepspeed_config {path}: not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(
            f"--deepspeed_config {path}: must hold a JSON object, not a {type(config).__name__}"
        )
    return config


def deepspeed_config(
    recipe: Recipe, *, world_size: int, precision: Precision, user_config: Mapping[str, Any]
) -> dict[str, Any]:
    """DeepSpeed's whole configuration. The recipe owns batch, optimizer and schedule; the user's JSON, where
    given, owns sharding and precision; its "auto" values are filled from the recipe. Raises ConfigError for a
    disagreement, by name.
    """
    owned = _owned_by_recipe(recipe, world_size)
    _refuse_disagreements(user_config, owned, recipe)
    theirs = {
        k: v
        for k, v in user_config.items()
        if k not in owned and k not in ("optimizer", "scheduler", "bf16", "fp16")
    }
    config = {**_defaults(recipe, precision), **theirs, **owned}
    if _enabled(user_config, "bf16"):
        # bf16.enabled would keep the temperature itself in bf16; autocast computes the same products and
        # keeps it in fp32.
        config["torch_autocast"] = _autocast_table("bf16")
    for name in ("zero_optimization", "torch_autocast"):
        config[name] = _filled(config[name], _defaults(recipe, precision)[name], name)
    for key in _autos(config):
        raise ConfigError(
            f'--deepspeed_config: {key} = "auto": the recipe has no value for it; give one or remove the key'
        )
    return config


def _filled(given: Any, ours: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A table of the user's, with our values where it has none or "auto"."""
    if given == "auto":
        return dict(ours)
    if not isinstance(given, Mapping):
        raise ConfigError(
            f"--deepspeed_config: {name} = {given!r}: must be a JSON object; remove it or fix it"
        )
    return {**ours, **{key: value for key, value in given.items() if value != "auto" or key not in ours}}


def user_precision(user_config: Mapping[str, Any]) -> Precision | None:
    """The precision that the user's JSON decides, or None where it leaves it open."""
    tables = [_user_table(user_config, key) for key in ("torch_autocast", "bf16")]
    decided = [table["enabled"] for table in tables if table.get("enabled", "auto") != "auto"]
    return None if not decided else "bf16" if any(decided) else "fp32"


def _owned_by_recipe(recipe: Recipe, world_size: int) -> dict[str, Any]:
    share = recipe.train.batch_size // world_size
    micro = recipe.train.micro_batch_size or share
    return {
        "train_batch_size": recipe.train.batch_size,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": share // micro,
        "gradient_clipping": recipe.optim.grad_clip_norm,
    }


def _refuse_disagreements(user_config: Mapping[str, Any], owned: Mapping[str, Any], recipe: Recipe) -> None:
    _check_batch(user_config, owned)
    _check_optimizer(_user_table(user_config, "optimizer"), recipe)
    _check_scheduler(_user_table(user_config, "scheduler"))
    _check_precision(user_config)


def _check_batch(user_config: Mapping[str, Any], owned: Mapping[str, Any]) -> None:
    names = {
        "train_batch_size": "train.batch_size",
        "train_micro_batch_size_per_gpu": "train.micro_batch_size",
        "gradient_accumulation_steps": "train.micro_batch_size",
        "gradient_clipping": "optim.grad_clip_norm",
    }
    for key, value in owned.items():
        given = user_config.get(key, "auto")
        if given not in ("auto", value):
            raise ConfigError(
                f"--deepspeed_config: {key} = {given!r} disagrees with the recipe's {value!r}; "
                f'set it to "auto" and use {names[key]}'
            )


def _check_optimizer(optimizer: Mapping[str, Any], recipe: Recipe) -> None:
    if optimizer.get("type", "AdamW").lower() not in ("adam", "adamw", "auto"):
        raise ConfigError(
            f"--deepspeed_config: optimizer.type = {optimizer['type']!r}: the recipe's optimizer is AdamW; "
            "remove it"
        )
    expected = {"lr": recipe.optim.lr, "betas": list(recipe.optim.betas), "eps": recipe.optim.eps,
                "weight_decay": recipe.optim.weight_decay}  # fmt: skip
    params = _user_table(optimizer, "params", inside="optimizer.")
    for key, value in expected.items():
        given = params.get(key, "auto")
        if given not in ("auto", value):
            raise ConfigError(
                f"--deepspeed_config: optimizer.params.{key} = {given!r} disagrees with the recipe's "
                f'optim.{key} = {value!r}; set it to "auto"'
            )


def _check_scheduler(scheduler: Mapping[str, Any]) -> None:
    for key, given in _user_table(scheduler, "params", inside="scheduler.").items():
        if given != "auto":
            raise ConfigError(
                f"--deepspeed_config: scheduler.params.{key} = {given!r}: the schedule belongs to the "
                "recipe; remove it and use optim.schedule and optim.warmup_fraction"
            )


def _check_precision(user_config: Mapping[str, Any]) -> None:
    dtype = _user_table(user_config, "torch_autocast").get("dtype", "auto")
    if dtype not in ("auto", "bfloat16", "torch.bfloat16"):
        raise ConfigError(
            f"--deepspeed_config: torch_autocast.dtype = {dtype!r}: training computes in bfloat16 or "
            'float32; set it to "bfloat16"'
        )
    if _enabled(user_config, "fp16"):
        raise ConfigError(
            "--deepspeed_config: fp16.enabled = true: fp16 would hold the temperature in fp16; use "
            '"torch_autocast": {"enabled": true, "dtype": "bfloat16"}'
        )


def _user_table(config: Mapping[str, Any], key: str, *, inside: str = "") -> Mapping[str, Any]:
    """A table of the user's; "auto" leaves all of it to the recipe. Raises ConfigError for anything else."""
    table = config.get(key, "auto")
    if table == "auto":
        return {}
    if not isinstance(table, Mapping):
        raise ConfigError(
            f"--deepspeed_config: {inside}{key} = {table!r}: must be a JSON object; remove it or fix it"
        )
    return table


def _enabled(user_config: Mapping[str, Any], key: str) -> bool:
    return _user_table(user_config, key).get("enabled") is True


def _defaults(recipe: Recipe, precision: Precision) -> dict[str, Any]:
    return {
        "torch_autocast": _autocast_table(precision),
        "zero_optimization": {
            "stage": recipe.train.zero_stage,
            "overlap_comm": torch.cuda.is_available() and recipe.train.zero_stage > 0,
            # The default of 5e8 elements is a 2 GB buffer.
            "reduce_bucket_size": 50_000_000,
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }


def _autocast_table(precision: Precision) -> dict[str, Any]:
    # No "safe modules": DeepSpeed sums the gradients of those in bf16.
    return {"enabled": precision == "bf16", "dtype": "bfloat16", "lower_precision_safe_modules": []}


def _autos(config: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _autos(value, f"{prefix}{key}.")
        elif value == "auto":
            yield f"{prefix}{key}"
