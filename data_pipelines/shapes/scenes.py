"""What drawn scenes can show: colours, shapes, sizes, places, relations; and the pairs kept from training."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

T = TypeVar("T")

# Things are bright and backgrounds dark, so that a thing's outline looks alike in every colour.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (240, 65, 65),
    "yellow": (250, 228, 80),
    "green": (75, 205, 90),
    "blue": (80, 125, 255),
    "purple": (190, 95, 248),
    "white": (246, 246, 246),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring", "star")
SIZES: dict[str, float] = {"small": 7.5, "large": 14.0}  # diameter in pixels
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "black": (14, 14, 16),
    "navy": (18, 24, 84),
    "brown": (76, 46, 22),
    "grey": (78, 80, 83),
    "maroon": (84, 16, 36),
}
# Things stand in the middle row or column of a 3 x 3 grid: place -> (column, row).
PLACES: dict[str, tuple[int, int]] = {
    "left": (0, 1),
    "right": (2, 1),
    "top": (1, 0),
    "bottom": (1, 2),
    "middle": (1, 1),
}
# Relation of the first of two things to the second -> their places.
RELATIONS: dict[str, tuple[str, str]] = {
    "left of": ("left", "right"),
    "right of": ("right", "left"),
    "above": ("top", "bottom"),
    "below": ("bottom", "top"),
}
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

# No colour and no shape twice: each of them is trained in five other pairs.
HELD_OUT: tuple[tuple[str, str], ...] = (
    ("red", "star"),
    ("yellow", "ring"),
    ("green", "square"),
    ("blue", "triangle"),
    ("purple", "circle"),
    ("white", "cross"),
)
PAIRS: tuple[tuple[str, str], ...] = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
TRAINED: tuple[tuple[str, str], ...] = tuple(pair for pair in PAIRS if pair not in HELD_OUT)


@dataclass(frozen=True)
class Thing:
    """One drawn object, in canonical words."""

    colour: str
    shape: str
    size: str
    place: str

    @property
    def pair(self) -> tuple[str, str]:
        return self.colour, self.shape


@dataclass(frozen=True)
class Scene:
    """What a picture shows: one thing, or two of which the first is `relation` the second."""

    things: tuple[Thing, ...]
    background: str
    relation: str | None = None


def keyed_rng(*key: object) -> random.Random:
    """A generator that depends on the key alone. Only .random() is used of it: Python keeps that sequence."""
    return random.Random("/".join(str(part) for part in key))


def pick(rng: random.Random, options: Sequence[T]) -> T:
    return options[int(rng.random() * len(options))]


def inverted(scene: Scene) -> Scene:
    """The same picture told from its other thing."""
    assert scene.relation is not None
    return replace(scene, things=scene.things[::-1], relation=INVERSE[scene.relation])
