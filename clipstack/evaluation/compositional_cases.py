"""The files of compositional probes: an image, its caption, and the same caption with words swapped.

Reads JSON lines, SugarCrepe's files (https://arxiv.org/abs/2306.14610) and ARO's
(https://arxiv.org/abs/2210.01936) as they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipstack.errors import ConfigError, DataError

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Case:
    """One image with its caption and what the caption must beat."""

    image: str
    """path below the folder of images"""
    caption: str
    negatives: tuple[str, ...]
    kind: str
    """such as "swap_att": accuracy is told for each"""
    box: Box | None = None
    """left, top, right, bottom in pixels: the part of the image that the caption is about"""


def read_cases(path: Path) -> tuple[Case, ...]:
    """A .jsonl file, a .json file of SugarCrepe or ARO, or a folder of such files. Raises ConfigError,
    DataError."""
    if not path.exists():
        raise ConfigError(f"--data {path}: no such file or folder")
    files = sorted(path.glob("*.json*")) if path.is_dir() else [path]
    cases = tuple(case for file in files for case in _read_file(file))
    if not cases:
        raise DataError(
            f"--data {path}: holds no cases; give .jsonl lines, or SugarCrepe's or ARO's .json files"
        )
    return cases


def _read_file(file: Path) -> Iterator[Case]:
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from error
    if file.suffix == ".jsonl":
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                yield _case(_parse(line, f"{file}, line {number}"), f"{file}, line {number}", kind=file.stem)
        return
    content = _parse(text, str(file))
    if not isinstance(content, dict | list):
        raise DataError(f"{file}: holds {content!r:.40}; it must hold a list or an object of cases")
    entries = content.items() if isinstance(content, dict) else enumerate(content)
    for key, entry in entries:
        yield _case(entry, f"{file}, entry {key}", kind=file.stem)


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not valid JSON: {error}") from error


def _case(entry: Any, where: str, *, kind: str) -> Case:
    if not isinstance(entry, dict):
        raise DataError(f"{where}: must be an object with image, caption and negatives")
    image = _text(entry, ("image", "filename", "image_path"), where)
    caption = _text(entry, ("caption", "true_caption"), where)
    negatives = entry.get("negatives")
    if negatives is None:
        negatives = [_text(entry, ("negative_caption", "false_caption"), where)]
    if not isinstance(negatives, list) or not negatives or not all(isinstance(one, str) for one in negatives):
        raise DataError(f"{where}: negatives must be a list of texts, at least one")
    return Case(image, caption, tuple(negatives), str(entry.get("kind", kind)), _box(entry, where))


def _text(entry: Mapping[str, Any], names: tuple[str, ...], where: str) -> str:
    value = next((entry[name] for name in names if name in entry), None)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: {names[0]} is {value!r}; it must be a text")
    return value


def _box(entry: Mapping[str, Any], where: str) -> Box | None:
    """ARO crops each image to the box around what its caption tells."""
    names = ("bbox_x", "bbox_y", "bbox_w", "bbox_h")
    if not all(name in entry for name in names):
        return None
    try:
        x, y, width, height = (int(entry[name]) for name in names)
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: bbox_x, bbox_y, bbox_w, bbox_h must be numbers of pixels") from error
    if width < 1 or height < 1:
        raise DataError(f"{where}: bbox_w = {width}, bbox_h = {height}: both must be 1 or more")
    return x, y, x + width, y + height
