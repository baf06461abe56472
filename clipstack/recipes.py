"""The recipes that come with clipstack, in a checkout and in an installed wheel."""

from __future__ import annotations

from pathlib import Path

from clipstack.errors import ConfigError

FOLDER = "configs"


def shipped_recipes() -> dict[str, Path]:
    """Their files by name. Raises ConfigError where an installation has none."""
    here = Path(__file__).resolve().parent
    for folder in (here.parent / FOLDER, here / FOLDER):
        if (folder / "demo.toml").is_file():
            return {path.stem: path for path in sorted(folder.glob("*.toml"))}
    raise ConfigError(f"{FOLDER}/: missing from this installation; install clipstack again")


def recipe_file(path: Path) -> Path:
    """`path`, or where there is no such file and it is configs/NAME.toml, the shipped recipe of that name.

    So the commands of the documentation work in any folder. Raises ConfigError that lists the shipped ones.
    """
    if path.exists():
        return path
    shipped = shipped_recipes()
    if path.parent == Path(FOLDER) and path.suffix == ".toml" and path.stem in shipped:
        return shipped[path.stem]
    known = ", ".join(f"{FOLDER}/{name}.toml" for name in shipped)
    raise ConfigError(f"--config {path}: no such file; clipstack comes with {known}")
