"""Scenes to captions: the canonical one, and renderings with synonyms and attributes left out."""

from __future__ import annotations

import random
from itertools import accumulate

from data_pipelines.shapes.scenes import Scene, Thing, inverted, pick

PLACE_PHRASES = {
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
    "middle": "in the middle",
}
SYNONYMS: dict[str, tuple[str, ...]] = {  # the canonical word first; it is drawn half of the time
    "small": ("small", "little", "tiny"),
    "large": ("large", "big", "huge"),
    "circle": ("circle", "disc"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "cross": ("cross", "plus"),
    "ring": ("ring", "hoop"),
    "star": ("star",),
    "shape": ("shape", "object", "thing"),
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
CAPTIONS_PER_IMAGE = 12

# Which attributes a caption names of a thing, with weights. Whatever the rest of a caption settles is not
# learned: only captions without colour teach shape.
_Choices = tuple[tuple[float, tuple[str, ...]], ...]
_MIXED: _Choices = (
    (0.35, ("size", "colour", "shape")),
    (0.10, ("colour", "shape")),
    (0.15, ("size", "colour")),
    (0.20, ("size", "shape")),
    (0.10, ("colour",)),
    (0.10, ("shape",)),
)
_COLOUR_ALONE: _Choices = ((1.0, ("colour",)),)
_SHAPE_ALONE: _Choices = ((1.0, ("shape",)),)
# Of the captions of two things. Colours alone: several scenes of a batch show the same two, and only what
# stands where tells them apart.
COLOURS_ALONE_SHARE = 0.2
SHAPES_ALONE_SHARE = 0.25
BACKGROUND_SHARE = 0.3  # of the captions; of those of the first lesson less, since it gives the scene away
FIRST_BACKGROUND_SHARE = 0.1


def _word(word: str, rng: random.Random) -> str:
    options = SYNONYMS.get(word, (word,))
    return options[0] if rng.random() < 0.5 else pick(rng, options)


def _thing_phrase(thing: Thing, rng: random.Random, choices: _Choices = _MIXED) -> str:
    draw = rng.random()
    sums = accumulate(weight for weight, _ in choices)
    named = next((names for reached, (_, names) in zip(sums, choices, strict=True) if draw < reached), ())
    words = [_word(thing.size, rng)] if "size" in named else []
    words += [thing.colour] if "colour" in named else []
    words += [_word(thing.shape if "shape" in named else "shape", rng)]
    return with_article(" ".join(words))


def with_article(words: str) -> str:
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def full_phrase(thing: Thing) -> str:
    """A thing with all its attributes, in canonical words."""
    return f"a {thing.size} {thing.colour} {thing.shape}"


def full_caption(scene: Scene) -> str:
    """The canonical caption: all there is to say, in one fixed wording. Probes and test captions use it."""
    first = full_phrase(scene.things[0])
    background = f"on a {scene.background} background"
    if scene.relation is None:
        return f"{first} {PLACE_PHRASES[scene.things[0].place]} {background}"
    return f"{first} {scene.relation} {full_phrase(scene.things[1])} {background}"


def caption(scene: Scene, rng: random.Random) -> str:
    """One rendering of what is seen: synonyms, attributes left out, things in either order."""
    draw = rng.random()
    choices = (
        _COLOUR_ALONE
        if draw < COLOURS_ALONE_SHARE
        else _SHAPE_ALONE
        if draw < COLOURS_ALONE_SHARE + SHAPES_ALONE_SHARE
        else _MIXED
    )
    body = _single_body(scene.things[0], rng) if len(scene.things) == 1 else _double_body(scene, choices, rng)
    return _with_background(body, scene, BACKGROUND_SHARE, rng)


def first_caption(scene: Scene, rng: random.Random) -> str:
    """The same for a first lesson: of two things it names nothing but their colours."""
    body = (
        _single_body(scene.things[0], rng)
        if len(scene.things) == 1
        else _double_body(scene, _COLOUR_ALONE, rng)
    )
    return _with_background(body, scene, FIRST_BACKGROUND_SHARE, rng)


def _with_background(body: str, scene: Scene, share: float, rng: random.Random) -> str:
    draw = rng.random()
    if draw < share / 2:
        return f"{body} on a {scene.background} background"
    return f"{body} on {scene.background}" if draw < share else body


def _single_body(thing: Thing, rng: random.Random) -> str:
    draw = rng.random()
    if draw < 0.2:
        return f"{with_article(_word('shape', rng))} {PLACE_PHRASES[thing.place]}"
    phrase = _thing_phrase(thing, rng)
    return f"{phrase} {PLACE_PHRASES[thing.place]}" if draw < 0.7 else phrase


def _double_body(scene: Scene, choices: _Choices, rng: random.Random) -> str:
    told = inverted(scene) if rng.random() < 0.5 else scene
    assert told.relation is not None  # two things always stand in a relation
    first, second = (_thing_phrase(thing, rng, choices) for thing in told.things)
    return f"{first} {_word(told.relation, rng)} {second}"


def captions(scene: Scene, rng: random.Random, count: int = CAPTIONS_PER_IMAGE) -> list[str]:
    """`count` renderings of a scene, the canonical one first."""
    return [full_caption(scene), *(caption(scene, rng) for _ in range(count - 1))]


def first_captions(scene: Scene, rng: random.Random, count: int = CAPTIONS_PER_IMAGE) -> list[str]:
    """`count` renderings for a first lesson."""
    return [first_caption(scene, rng) for _ in range(count)]
