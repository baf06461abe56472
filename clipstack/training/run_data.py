"""The data of a run, opened: what is wrong with them is found before the first step."""

from __future__ import annotations

import difflib

from clipstack.checkpoint.snapshot import Snapshot
from clipstack.config import Recipe
from clipstack.config.models import DataConfig
from clipstack.errors import ConfigError, DataError
from clipstack.loading.train_loader import TrainLoader
from clipstack.preprocess import Preprocess
from clipstack.run_log import QUARANTINE_FILE
from clipstack.templates import load_templates
from clipstack.training.validation import possible_metrics
from clipstack.world import World
from data_pipelines.sources import expand_all


def find_data(config: DataConfig) -> None:
    """Raises DataError where data.train or data.val names no shards. Reads none of them."""
    for paths, _ in config.sources:
        expand_all(paths, key="data.train")
    expand_all(config.val_paths, key="data.val")


def open_data(
    recipe: Recipe, preprocess: Preprocess, world: World, *, resume_from: Snapshot | None
) -> TrainLoader:
    """The training data; missing indexes are made. What is wrong with them, or with the validation data, is
    found here and not after the first thousand steps. Raises ConfigError, DataError, on every rank.
    Collective."""

    def open_own() -> TrainLoader:
        if recipe.data.val is not None:
            check_validation(recipe)
        loader = TrainLoader(
            recipe.data, preprocess=preprocess, batch_size=recipe.train.batch_size, world=world,
            seed=recipe.seed, quarantine_path=recipe.run.dir / QUARANTINE_FILE,
        )  # fmt: skip
        if resume_from is not None:
            loader.check_state(resume_from.order)
        return loader

    loader = world.together(open_own)
    for rank, state in enumerate(world.gather_objects(loader.state())):
        if state != loader.state():
            raise DataError(
                f"data.train: rank {rank} sees other shards than rank {world.rank}; give every machine the "
                "same ones"
            )
    return loader


def check_validation(recipe: Recipe) -> None:
    """Raises DataError where data.val cannot be read, ConfigError for an eval.best_metric that validation
    does not give, and for templates or class names that cannot be read."""
    load_templates(recipe.eval.templates)
    metric, possible = recipe.eval.best_metric, possible_metrics(recipe)
    if metric is not None and metric not in possible:
        near = difflib.get_close_matches(metric, possible, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(
            f"eval.best_metric = {metric!r}: {hint}Validation on data.val can give {', '.join(possible)}"
        )
