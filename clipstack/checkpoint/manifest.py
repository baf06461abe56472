"""The manifest of a checkpoint, size and SHA-256 of every file: written, and held against what is there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clipstack.checkpoint.layout import FORMAT, MANIFEST_FILE
from clipstack.files import sha256_of


def write_manifest(folder: Path, step: int) -> None:
    """Of all files that the folder holds by now. Raises OSError."""
    files = [
        {"path": path.name, "size": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(folder.iterdir())
        if path.name != MANIFEST_FILE
    ]
    text = json.dumps({"format": FORMAT, "step": step, "files": files}, indent=2)
    (folder / MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")


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
