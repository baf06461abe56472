"""Shared by the tests of clipstack: ranks that start quickly, and a small data set."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clipstack.launching import Zygote
from tests.clipstack.training_runs import write_recipe, write_shards


@pytest.fixture(scope="session")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    """Starts ranks."""
    zygote = Zygote(tmp_path_factory.mktemp("ranks"))
    yield zygote
    zygote.close()


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 100 samples in four shards."""
    return write_shards(tmp_path_factory.mktemp("data") / "shards")


@pytest.fixture(scope="session")
def tiny_recipe_file(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path) -> Path:
    """A recipe with augmentation, patch dropout, two loader workers and bf16; give run.dir."""
    return write_recipe(tmp_path_factory.mktemp("recipe"), tiny_shards)
