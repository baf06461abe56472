"""How to get a package that is missing or broken: what errors and `clipstack doctor` advise.

The name clipstack on the Python package index is another project's, so no advice may name it.
"""

from __future__ import annotations

import importlib.metadata
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
    _, _, build = version.partition("+")  # such as cpu or cu128: torch's own, which only its index has
    index = f" --index-url https://download.pytorch.org/whl/{build}" if build else ""
    return f"{command}{index} {package}=={version}"


@contextmanager
def naming_extra(command: str, extra: str) -> Iterator[None]:
    """Around a command. Raises MissingPackageError where it imports a package that is not installed.

    extra: brings what the command needs; "" where that is nothing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if not extra or error.name is None or error.name.partition(".")[0] in _OWN:
            raise
        raise MissingPackageError(f"{command} needs {error.name}: {how_to_install(extra)}") from error
