"""What the tasks of `clipstack eval` share: who evaluates, features of the data, and what was left out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from clipstack.checkpoint import LoadedModel
from clipstack.config.models import DataConfig
from clipstack.evaluation.data import EvalData
from clipstack.evaluation.features import Features, encode_all
from clipstack.evaluation.report import EXAMPLES_OF_SKIPPED, Skipped, Source
from clipstack.loading.eval_loader import EvalBatch, EvalLoader
from clipstack.world import World
from data_pipelines.progress import Progress

NUM_EXAMPLES = 8
"""Of the best, and of the worst, samples."""


@dataclass(frozen=True)
class Setup:
    """What evaluates, and how."""

    loaded: LoadedModel
    world: World
    batch_size: int = 64
    """images that a rank encodes at once"""
    workers: int = 2
    """loader processes a rank"""


def caption_lines(stored: tuple[str, ...]) -> tuple[str, ...]:
    """The captions of a sample: its stored texts, each line of them one caption, as CLIP_benchmark reads
    them."""
    return tuple(line for text in stored for line in text.splitlines() if line.strip())


def encode_data(setup: Setup, data: EvalData, *, with_texts: bool) -> tuple[Features, Skipped]:
    """Features of all usable samples, and what was left out, on every rank."""
    loader = EvalLoader(
        data.samples,
        config=DataConfig(train=data.path, max_bad_fraction=1.0),
        preprocess=setup.loaded.preprocess,
        batch_size=setup.batch_size,
        world=setup.world,
        workers=setup.workers,
    )
    try:
        features = encode_all(
            setup.loaded.model,
            _shown(loader, setup.world),
            preprocess=setup.loaded.preprocess,
            world=setup.world,
            captions=caption_lines if with_texts else None,
        )
    finally:
        loader.close()
    return features, _skipped(data, loader, setup.world)


def _shown(loader: EvalLoader, world: World) -> Iterator[EvalBatch]:
    if not world.is_main:
        yield from loader
        return
    with Progress("eval", len(loader), unit="batches") as progress:
        for batch in loader:
            yield batch
            progress.advance()


def _skipped(data: EvalData, loader: EvalLoader, world: World) -> Skipped:
    known = len(data.samples.damage)
    met = [bad for ranks in world.gather_objects(loader.bad[known:]) for bad in ranks]
    examples = (
        *data.bad_shards,
        *data.samples.damage,
        *sorted(met, key=lambda bad: (bad.shard, bad.key or "")),
    )
    return Skipped(
        bad_samples=len(met),
        empty_shards=len(data.empty_shards),
        unreadable_shards=len(data.bad_shards),
        damaged_shards=known,
        examples=examples[:EXAMPLES_OF_SKIPPED],
    )


def with_counts(skipped: Skipped, **counts: int) -> Skipped:
    """The same with some counts of `Skipped` set."""
    return Skipped(**{**skipped.__dict__, **counts})


def first_reason(skipped: Skipped, features: Features, num_classes: int) -> str:
    """Why no sample could be used, for a message. num_classes: 0 where there are no class names."""
    if skipped.examples and not len(features.sample):
        bad = skipped.examples[0]
        return f"the first of {skipped.bad_samples}: {bad.shard}/{bad.key}: {bad.reason}"
    if bool((features.label >= num_classes).any()) and num_classes:
        return f"labels go up to {int(features.label.max())}: is it the right --classnames file?"
    return "samples need a .cls member with the class index"


def source_of(setup: Setup, data: EvalData, templates: str | None) -> Source:
    """What a report says of its model and data. templates: the name of the prompts, where there are such."""
    return Source(setup.loaded.name, setup.loaded.fingerprint, data.path, data.digest, templates)
