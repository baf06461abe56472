"""The recipes for real models: the right towers, and every option of theirs at work on a copy with two
layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from clipstack.config import load_recipe
from clipstack.model import build_model
from clipstack.training.flops import flops_per_pair
from tests.clipstack.launching import REPOSITORY, Zygote
from tests.clipstack.rank_jobs import RECIPES

CONFIGS = REPOSITORY / "configs"
PARAMETERS = {"ViT-B-32": 151_277_313, "ViT-B-16": 149_620_737, "ViT-L-14": 427_616_513}
"""As OpenAI's models of these names have them."""


@pytest.mark.parametrize("name", RECIPES)
def test_it_builds_the_model_that_its_name_says(name: str) -> None:
    recipe = load_recipe(CONFIGS / f"{name}.toml")
    with torch.device("meta"):
        model = build_model(recipe.model, seed=0, load_weights=False)
    assert recipe.model.name is not None
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[recipe.model.name]
    assert (
        recipe.train.micro_batch_size is None
        or recipe.train.batch_size % (8 * recipe.train.micro_batch_size) == 0
    )
    first_line = (CONFIGS / f"{name}.toml").read_text().splitlines()[0]
    assert first_line.startswith("# deepspeed --num_gpus ") and f"--config configs/{name}.toml" in first_line


def test_flops_are_those_of_the_papers() -> None:
    """OpenCLIP's model profile: 14.78 GFLOPs (multiply and add counted as two) for ViT-B-32, image and
    text."""
    with torch.device("meta"):
        model = build_model(load_recipe(CONFIGS / "ViT-B-32.toml").model, seed=0)
    assert abs(flops_per_pair(model) / (3 * 14.78e9) - 1) < 0.02


def test_a_copy_with_two_layers_takes_a_step(zygote: Zygote) -> None:
    ended = zygote.run("tests.clipstack.rank_jobs:step_small_copies_of_the_recipes", ranks=1, timeout_s=240)
    assert ended.codes == [0], ended.text


def test_every_recipe_in_the_folder_is_valid() -> None:
    found = sorted(Path(CONFIGS).glob("*.toml"))
    assert {path.stem for path in found} >= set(RECIPES)
    for path in found:
        load_recipe(path)


def test_the_demos_second_lesson_goes_on_with_the_model_of_the_first() -> None:
    first, second = (load_recipe(CONFIGS / f"{name}.toml") for name in ("demo-first", "demo"))
    assert second.model.pretrained == str(first.run.dir / "export")
    assert second.model.model_copy(update={"pretrained": None}) == first.model
    assert (second.data.train, second.data.val) == (first.data.train, first.data.val)
