"""How to get a package that is missing or broken: what errors and `clipstack doctor` advise.

The name clipstack on the Python package index is another project's, so no advice may name it.
"""

from __future__ import annotations

import importlib.metadata
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from data_pipelines.errors import MissingPackageError

_OWN = frozenset(("clipstack", "data_pipelines", "serve"))


def how_to_install(extra: str) -> str:
    """The command for an extra, or for several with commas between them."""
    return f"pip install '.[{extra}]' in the checkout, or './FILE.whl[{extra}]' where the wheel lies"


def how_to_reinstall(package: str) -> str:
    """The command for a package that is there and does not work, in the version that is there."""
    command = "pip install --force-reinstall --no-deps"
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return f"{command} {package}"
    _, _, build = version.partition("+")  # such as cpu or cu128, which only torch's index has
    is_there = build and package in ("torch", "torchvision")
    index = f" --index-url https://download.pytorch.org/whl/{build}" if is_there else ""
    return f"{command}{index} {package}=={version}"


@contextmanager
def naming_extra(command: str, extra: str) -> Iterator[None]:
    """Around a command. Raises MissingPackageError where it imports a package that is not installed.

    extra: brings what our own code imports; "" where that is nothing. What a package of others misses in turn
    is named as itself.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or _top(error.name) in _OWN:
            raise
        package, importer = _top(error.name), _importer(error)
        if importer not in _OWN and package != "torch":  # which safetensors, say, finds missing before us
            missing = f"{importer} needs {package}, which is not installed: pip install {package}"
            raise MissingPackageError(f"{command}: {missing}") from error
        if not extra:
            raise
        raise MissingPackageError(f"{command} needs {error.name}: {how_to_install(extra)}") from error


def _importer(error: ModuleNotFoundError) -> str:
    """The package whose code asked for the module."""
    asked = [str(frame.f_globals.get("__name__", "")) for frame, _ in traceback.walk_tb(error.__traceback__)]
    return next((_top(name) for name in reversed(asked) if _top(name) != "importlib"), "")


def _top(module: str) -> str:
    return module.partition(".")[0]
