"""Prints what some extras of clipstack need, one requirement a line.

An image installs that before the sources are there, and keeps the layer when they change:

    python docker/requirements.py serve openvino > requirements.txt
"""

import re
import sys
import tomllib
from pathlib import Path

_OWN = re.compile(r"clipstack\[(.+)\]")


def requirements(pyproject: Path, extras: list[str]) -> list[str]:
    """The base requirements and those of `extras`, those that extras name in turn included.

    Raises KeyError for an extra that pyproject.toml does not have.
    """
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    return sorted({*project["dependencies"], *_of_extras(project["optional-dependencies"], extras)})


def _of_extras(table: dict[str, list[str]], extras: list[str]) -> set[str]:
    found: set[str] = set()
    for line in (line for extra in extras for line in table[extra]):
        own = _OWN.fullmatch(line)
        found |= _of_extras(table, own[1].split(",")) if own else {line}
    return found


def main() -> None:
    here = Path(__file__).resolve().parent
    pyproject = next(
        folder / "pyproject.toml" for folder in (here, here.parent) if (folder / "pyproject.toml").is_file()
    )
    print("\n".join(requirements(pyproject, sys.argv[1:])))


if __name__ == "__main__":
    main()
