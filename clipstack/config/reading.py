"""A recipe file plus overrides to a `Recipe`; what is wrong is told in one line.

A recipe is TOML. Overrides are `a.b=value`; the value is read as TOML, and as a plain string where it is not
TOML; `none` unsets a key.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from clipstack.config.help import walk_fields
from clipstack.config.models import Recipe
from clipstack.config.objectives import describe_objective_error
from clipstack.errors import ConfigError
from clipstack.recipes import recipe_file


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, apply `a.b=value` overrides, validate. Raises ConfigError in one line.

    configs/NAME.toml, where the working directory has none, is the recipe that comes with clipstack.
    """
    path = recipe_file(Path(path))
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except IsADirectoryError:
        raise ConfigError(f"--config {path}: this is a folder; name a .toml file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"--config {path}: not UTF-8 text ({error.reason}); save it as UTF-8") from error
    except OSError as error:
        raise ConfigError(f"--config {path}: cannot be read ({error.strerror})") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"--config {path}: not valid TOML: {error}") from error
    for override in overrides:
        table = _with_override(table, override)
    return parse_recipe(table)


def parse_recipe(table: Mapping[str, Any]) -> Recipe:
    """Validate a recipe given as a table. Raises ConfigError in one line."""
    try:
        return Recipe.model_validate(table)
    except ValidationError as error:
        raise ConfigError(describe(error, Recipe)) from error


def _with_override(table: dict[str, Any], override: str) -> dict[str, Any]:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"override {override!r}: write it as key=value, such as optim.lr=1e-3")
    return _set_in(table, parts, _parse_value(text.strip()), key)


def _parse_value(text: str) -> Any:
    if text == "none":  # TOML has no word for it
        return None
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _set_in(table: dict[str, Any], parts: Sequence[str], value: Any, key: str) -> dict[str, Any]:
    head, *rest = parts
    if not rest:
        return {**table, head: value}
    inner = table.get(head, {})
    if not isinstance(inner, dict):
        raise ConfigError(
            f"override {key}: {head} is {inner!r} in the recipe, not a table; set {head} as a whole"
        )
    return {**table, head: _set_in(inner, rest, value, key)}


def describe(error: ValidationError, root: type[BaseModel], *, prefix: str = "") -> str:
    """A validation error as one line: key, value, what is wrong, and the nearest right key where one is
    unknown."""
    return "; ".join(_describe_one(detail, root, prefix) for detail in error.errors(include_url=False))


def _describe_one(detail: ErrorDetails, root: type[BaseModel], prefix: str) -> str:
    if detail["loc"][:1] == ("objective",):
        return describe_objective_error(detail, detail["loc"][1:])
    key = prefix + ".".join(str(part) for part in detail["loc"])
    match detail["type"]:
        case "extra_forbidden":
            known = _known_keys(root)
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
            hint = f"did you mean {near[0]}?" if near else "clipstack train --help-config lists every key"
            return f"{key}: unknown key; {hint}"
        case "missing":
            return f"{key}: missing; add it to the recipe or give {key}=... on the command line"
        case "value_error":
            return f"{key}: {detail['msg'].removeprefix('Value error, ')}".removeprefix(": ")
        case _:
            return f"{key} = {detail['input']!r}: {detail['msg'][0].lower()}{detail['msg'][1:]}"


def _known_keys(root: type[BaseModel]) -> list[str]:
    return [key for key, _ in walk_fields(root)]
