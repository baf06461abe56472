"""Kills at random moments leave no trace in what comes out; `benchmarks/chaos.py` does it longer."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from benchmarks.chaos import survives
from tests.clipstack.launching import Zygote


@pytest.mark.timeout(600)
def test_five_kills_of_random_ranks_at_random_moments_change_nothing(
    zygote: Zygote, tiny_recipe_file: Path, tmp_path: Path
) -> None:
    """Two loader workers a rank, augmentation, patch dropout, bf16 autocast; one kill at least leaves a
    checkpoint half written."""
    assert survives(zygote, tiny_recipe_file, tmp_path, 1, 5, random.Random(0), 5.0, steps=60, saves=1)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("stage", [2, 3])
def test_more_kills_at_higher_stages(
    zygote: Zygote, tiny_recipe_file: Path, tmp_path: Path, stage: int
) -> None:
    assert survives(zygote, tiny_recipe_file, tmp_path, stage, 10, random.Random(stage), 5.0)
