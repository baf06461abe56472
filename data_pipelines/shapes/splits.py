"""Which scenes each split has: trained pairs in train and val, held-out pairs in single and test."""

from __future__ import annotations

import random
from collections.abc import Sequence

from data_pipelines.errors import DataError
from data_pipelines.shapes.captions import full_caption
from data_pipelines.shapes.scenes import (
    BACKGROUNDS,
    HELD_OUT,
    PLACES,
    RELATIONS,
    SIZES,
    TRAINED,
    Scene,
    Thing,
    inverted,
    keyed_rng,
    pick,
)

SINGLE_SHARE = 0.4  # of the training scenes; single objects teach shape, size and place


def _single(rng: random.Random, pairs: Sequence[tuple[str, str]]) -> Scene:
    colour, shape = pick(rng, pairs)
    thing = Thing(colour, shape, pick(rng, tuple(SIZES)), pick(rng, tuple(PLACES)))
    return Scene((thing,), pick(rng, tuple(BACKGROUNDS)))


def _double(rng: random.Random, pairs: Sequence[tuple[str, str]]) -> Scene:
    """Two things that differ in colour and in shape, so that swapping their colours changes what is said."""
    first = pick(rng, pairs)
    second = pick(rng, [pair for pair in pairs if pair[0] != first[0] and pair[1] != first[1]])
    relation = pick(rng, tuple(RELATIONS))
    things = tuple(
        Thing(colour, shape, pick(rng, tuple(SIZES)), place)
        for (colour, shape), place in zip((first, second), RELATIONS[relation], strict=True)
    )
    return Scene(things, pick(rng, tuple(BACKGROUNDS)), relation)


def train_scene(seed: int, index: int) -> Scene:
    """Training scene `index`: one or two things, none of them a held-out pair."""
    rng = keyed_rng("train", seed, index)
    make = _single if rng.random() < SINGLE_SHARE else _double
    return make(rng, TRAINED)


def val_singles(seed: int, count: int) -> list[Scene]:
    """Single things of trained pairs, every pair equally often: what training itself may be watched on."""
    return [_single(keyed_rng("val", seed, index), [TRAINED[index % len(TRAINED)]]) for index in range(count)]


def held_out_singles(seed: int, count: int) -> list[Scene]:
    """Single things of held-out pairs, every pair equally often."""
    return [
        _single(keyed_rng("single", seed, index), [HELD_OUT[index % len(HELD_OUT)]]) for index in range(count)
    ]


def held_out_doubles(seed: int, count: int) -> list[Scene]:
    """Two things of held-out pairs each; no two scenes are told alike, so that retrieval has one answer."""
    possible = len(HELD_OUT) * (len(HELD_OUT) - 1) * len(SIZES) ** 2 * len(RELATIONS) // 2 * len(BACKGROUNDS)
    if count > possible:
        raise DataError(
            f"--num-test {count}: only {possible} scenes of held-out pairs differ; give at most that many"
        )
    scenes: dict[frozenset[str], Scene] = {}
    rng = keyed_rng("double", seed)
    while len(scenes) < count:
        scene = _double(rng, HELD_OUT)
        scenes.setdefault(frozenset((full_caption(scene), full_caption(inverted(scene)))), scene)
    return list(scenes.values())
