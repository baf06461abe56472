"""Questions to a model about one factor of a scene: captions to tell apart, and zero-shot prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

from data_pipelines.shapes.captions import PLACE_PHRASES, full_caption, with_article
from data_pipelines.shapes.scenes import (
    BACKGROUNDS,
    COLOURS,
    INVERSE,
    PAIRS,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
)


def _with_colours_swapped(scene: Scene) -> Scene:
    one, other = scene.things
    return replace(scene, things=(replace(one, colour=other.colour), replace(other, colour=one.colour)))


def _with_first(scene: Scene, factor: str, value: str) -> Scene:
    changed: dict[str, str] = {factor: value}
    return replace(scene, things=(replace(scene.things[0], **changed), *scene.things[1:]))


def _alternatives(scene: Scene) -> dict[str, list[Scene]]:
    """For each probe of a two-object scene, the scenes whose captions are told apart; the true one first."""
    relation = scene.relation
    assert relation is not None
    first = scene.things[0]
    choices = {"colour": tuple(COLOURS), "shape": SHAPES, "size": tuple(SIZES)}
    probes = {
        f"{factor} in pair": [scene]
        + [_with_first(scene, factor, value) for value in values if value != getattr(first, factor)]
        for factor, values in choices.items()
    }
    probes["background"] = [scene] + [
        replace(scene, background=b) for b in BACKGROUNDS if b != scene.background
    ]
    probes["relation"] = [scene] + [replace(scene, relation=r) for r in RELATIONS if r != relation]
    probes["order"] = [scene, replace(scene, relation=INVERSE[relation])]
    probes["binding"] = [scene, _with_colours_swapped(scene)]
    return probes


def probe_rows(scenes: Sequence[Scene], keys: Sequence[str]) -> Iterator[dict[str, Any]]:
    """One row for each probe of each scene: the true caption and the false ones that it has to beat."""
    for scene, key in zip(scenes, keys, strict=True):
        for kind, options in _alternatives(scene).items():
            true, *false = [full_caption(option) for option in options]
            yield {"kind": kind, "image": key, "caption": true, "negatives": false}


def prompts() -> dict[str, dict[str, list[str]]]:
    """Zero-shot prompts for single things: factor -> class -> prompts whose mean stands for the class."""
    return {
        "colour": {c: [with_article(f"{c} {s}") for s in (*SHAPES, "shape")] for c in COLOURS},
        "shape": {s: [f"a {s}", *(with_article(f"{c} {s}") for c in COLOURS)] for s in SHAPES},
        "size": {z: [f"a {z} {s}" for s in SHAPES] for z in SIZES},
        "place": {p: [f"a {s} {PLACE_PHRASES[p]}" for s in (*SHAPES, "shape")] for p in PLACES},
        "colour x shape": {
            f"{c} {s}": [with_article(f"{c} {s}"), *(f"a {z} {c} {s}" for z in SIZES)] for c, s in PAIRS
        },
    }


def classes_of(scene: Scene) -> dict[str, str]:
    """The class of a single thing in each of the factors of `prompts`."""
    thing = scene.things[0]
    return {**asdict(thing), "colour x shape": f"{thing.colour} {thing.shape}"}
