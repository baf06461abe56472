"""Every key of a recipe, with unit and meaning: `clipstack train --help-config`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from clipstack.config.models import Recipe
from clipstack.config.writing import toml_value


def walk_fields(root: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, pydantic FieldInfo) of every field below `root`, tables included."""
    for name, info in root.model_fields.items():
        key = f"{prefix}{name}"
        yield key, info
        for model in _models_in(info.annotation):
            yield from walk_fields(model, f"{key}.")


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)


def recipe_advice(flag: str, value: str) -> str | None:
    """What a flag that is none, such as --lr, is to be written as, where it names a key of the recipe."""
    name = flag.lstrip("-").replace("-", "_").replace(".", "_")
    keys = [key for key, info in walk_fields(Recipe) if not any(_models_in(info.annotation))]
    meant = [key for key in keys if f"_{key.replace('.', '_')}".endswith(f"_{name}")]
    if not meant:
        return None
    key = min(meant, key=lambda key: (key.count("."), not key.startswith("train.")))
    return f"did you mean {key}={value or '...'}?"


def help_config() -> str:
    """Every key of a recipe with its default, unit and meaning, as `clipstack train --help-config` prints
    it."""
    lines: dict[str, str] = {}
    for key, info in walk_fields(Recipe):
        if any(True for _ in _models_in(info.annotation)) and key != "data.train":
            continue
        lines.setdefault(f"{key} {_shown_default(info)}", " ".join((info.description or "").split()))
    return "\n".join(f"{head}\n    {meaning}" for head, meaning in lines.items())


def _shown_default(info: FieldInfo) -> str:
    """As it would stand in a recipe; TOML has no word for what is not set."""
    if info.is_required():
        return "(required)"
    value = info.get_default(call_default_factory=True)
    if value is None:
        return "(not set)"
    return f"= {toml_value(str(value) if isinstance(value, Path) else value)}"
