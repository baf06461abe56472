"""docs/training.md names nothing that does not exist."""

from __future__ import annotations

import re

from clipstack.config import Recipe
from clipstack.config.help import walk_fields
from tests.clipstack.launching import REPOSITORY

GUIDE = (REPOSITORY / "docs/training.md").read_text()
TABLES = {"model", "data", "train", "optim", "checkpoint", "eval", "log", "guard", "run"}


def test_every_recipe_key_in_the_guide_exists() -> None:
    known = {key for key, _ in walk_fields(Recipe)}
    prose = re.sub(r"```.*?```", "", GUIDE, flags=re.DOTALL)
    named = set(re.findall(r"\b([a-z]+\.[a-z_]+)\b", " ".join(re.findall(r"`([^`]+)`", prose))))
    keys = {
        key for key in named if key.split(".")[0] in TABLES and not key.endswith((".py", ".jsonl", ".md"))
    }
    assert keys >= {"train.micro_batch_size", "guard.spike_factor", "checkpoint.on_save_error"}
    assert keys <= known, keys - known


def test_every_file_in_the_guide_exists() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", GUIDE)
    recipes = re.findall(r"configs/[\w-]+\.toml", GUIDE)
    assert links and recipes
    missing = [p for p in links if not (REPOSITORY / "docs" / p).exists()]
    missing += [p for p in recipes if not (REPOSITORY / p).exists()]
    assert not missing
