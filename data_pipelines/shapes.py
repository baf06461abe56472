"""The procedural data set: drawn scenes of one or two coloured shapes, their captions, and probes of a model.

Every scene is known exactly, so a trained model can be asked about each factor alone: colour, shape, size,
place, relation, and whether it binds a colour to the right shape. Six colour x shape pairs are kept out of
training altogether. Everything in the test splits wears one of them, and each colour-swapped caption then
names pairs that *were* trained: a model that goes by what it has seen together, and not by the picture, fails
the binding probe.
"""

import argparse
import io
import json
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from tqdm import tqdm

from data_pipelines.errors import DataError
from data_pipelines.index import Sample, write_shard

T = TypeVar("T")

IMAGE_SIZE = 60  # pixels, square

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
# Things stand in the middle row or column of a 3 x 3 grid: place -> (column, row), and how captions say it.
CELL_PX = IMAGE_SIZE // 3
PLACES: dict[str, tuple[int, int]] = {
    "left": (0, 1),
    "right": (2, 1),
    "top": (1, 0),
    "bottom": (1, 2),
    "middle": (1, 1),
}
PLACE_PHRASES = {
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
    "middle": "in the middle",
}
# Relation of the first of two things to the second -> their places.
RELATIONS: dict[str, tuple[str, str]] = {
    "left of": ("left", "right"),
    "right of": ("right", "left"),
    "above": ("top", "bottom"),
    "below": ("bottom", "top"),
}
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
OUTWARD_PX = 2  # things outside the middle stand this far from their cell's centre, towards the edge
JITTER_PX = 1  # and then up to this far from there, along each axis

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
SINGLE_SHARE = 0.4  # of the training scenes; single objects teach shape, size and place
SAMPLES_PER_SHARD = 2500


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


# ------------------------------------------------------------------------------------------------ scenes


def _rng(*key: object) -> random.Random:
    """A generator that depends on the key alone. Only .random() is used of it: Python keeps that sequence."""
    return random.Random("/".join(str(part) for part in key))


def _pick(rng: random.Random, options: Sequence[T]) -> T:
    return options[int(rng.random() * len(options))]


def _single(rng: random.Random, pairs: Sequence[tuple[str, str]]) -> Scene:
    colour, shape = _pick(rng, pairs)
    thing = Thing(colour, shape, _pick(rng, tuple(SIZES)), _pick(rng, tuple(PLACES)))
    return Scene((thing,), _pick(rng, tuple(BACKGROUNDS)))


def _double(rng: random.Random, pairs: Sequence[tuple[str, str]]) -> Scene:
    """Two things that differ in colour and in shape, so that swapping their colours changes what is said."""
    first = _pick(rng, pairs)
    second = _pick(rng, [pair for pair in pairs if pair[0] != first[0] and pair[1] != first[1]])
    relation = _pick(rng, tuple(RELATIONS))
    things = tuple(
        Thing(colour, shape, _pick(rng, tuple(SIZES)), place)
        for (colour, shape), place in zip((first, second), RELATIONS[relation], strict=True)
    )
    return Scene(things, _pick(rng, tuple(BACKGROUNDS)), relation)


def train_scene(seed: int, index: int) -> Scene:
    """Training scene `index`: one or two things, none of them a held-out pair."""
    rng = _rng("train", seed, index)
    make = _single if rng.random() < SINGLE_SHARE else _double
    return make(rng, TRAINED)


def val_singles(seed: int, count: int) -> list[Scene]:
    """Single things of trained pairs, every pair equally often: what training itself may be watched on."""
    return [_single(_rng("val", seed, index), [TRAINED[index % len(TRAINED)]]) for index in range(count)]


def test_singles(seed: int, count: int) -> list[Scene]:
    """Single things of held-out pairs, every pair equally often."""
    return [_single(_rng("single", seed, index), [HELD_OUT[index % len(HELD_OUT)]]) for index in range(count)]


def test_doubles(seed: int, count: int) -> list[Scene]:
    """Two things of held-out pairs each; no two scenes are told alike, so that retrieval has one answer."""
    possible = len(HELD_OUT) * (len(HELD_OUT) - 1) * len(SIZES) ** 2 * len(RELATIONS) // 2 * len(BACKGROUNDS)
    if count > possible:
        raise DataError(
            f"--num-test {count}: only {possible} scenes of held-out pairs differ; give at most that many"
        )
    scenes: dict[frozenset[str], Scene] = {}
    rng = _rng("double", seed)
    while len(scenes) < count:
        scene = _double(rng, HELD_OUT)
        scenes.setdefault(frozenset((full_caption(scene), full_caption(inverted(scene)))), scene)
    return list(scenes.values())


# ---------------------------------------------------------------------------------------------- pictures


@lru_cache(maxsize=64)
def _mask(shape: str, diameter: float) -> NDArray[np.float32]:
    """Coverage 0-1 of a shape, antialiased: (IMAGE_SIZE, IMAGE_SIZE) float32, in the image's centre."""
    scale = 8  # supersampling
    # Pillow counts a shape's last pixel in: half a pixel less keeps it where the formula says.
    centre, radius = (IMAGE_SIZE * scale - 1) / 2, (diameter * scale - 1) / 2
    canvas = Image.new("L", (IMAGE_SIZE * scale, IMAGE_SIZE * scale), 0)
    _PAINTERS[shape](ImageDraw.Draw(canvas), centre, radius)
    return np.asarray(canvas.reduce(scale), dtype=np.float32) / 255.0


def _paint_circle(draw: ImageDraw.ImageDraw, c: float, r: float) -> None:
    draw.ellipse((c - r, c - r, c + r, c + r), fill=255)


def _paint_square(draw: ImageDraw.ImageDraw, c: float, r: float) -> None:
    draw.rectangle((c - 0.9 * r, c - 0.9 * r, c + 0.9 * r, c + 0.9 * r), fill=255)


def _paint_triangle(draw: ImageDraw.ImageDraw, c: float, r: float) -> None:
    draw.polygon([(c, c - r), (c + r, c + 0.85 * r), (c - r, c + 0.85 * r)], fill=255)


def _paint_cross(draw: ImageDraw.ImageDraw, c: float, r: float) -> None:
    arm = 0.32 * r
    draw.rectangle((c - r, c - arm, c + r, c + arm), fill=255)
    draw.rectangle((c - arm, c - r, c + arm, c + r), fill=255)


def _paint_ring(draw: ImageDraw.ImageDraw, c: float, r: float) -> None:
    hole = 0.55 * r
    draw.ellipse((c - r, c - r, c + r, c + r), fill=255)
    draw.ellipse((c - hole, c - hole, c + hole, c + hole), fill=0)


def _paint_star(draw: ImageDraw.ImageDraw, c: float, r: float) -> None:
    reach = [r if corner % 2 == 0 else 0.45 * r for corner in range(10)]
    angles = [np.pi * (corner / 5 - 0.5) for corner in range(10)]
    draw.polygon(
        [(c + a * np.cos(t), c + a * np.sin(t)) for a, t in zip(reach, angles, strict=True)], fill=255
    )


_PAINTERS: dict[str, Callable[[ImageDraw.ImageDraw, float, float], None]] = {
    "circle": _paint_circle,
    "square": _paint_square,
    "triangle": _paint_triangle,
    "cross": _paint_cross,
    "ring": _paint_ring,
    "star": _paint_star,
}


def render(scene: Scene, rng: random.Random) -> NDArray[np.uint8]:
    """Draw a scene: (IMAGE_SIZE, IMAGE_SIZE, 3) uint8. `rng` shifts places and tints by a little."""
    image = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), np.float32)
    image[:] = _tint(BACKGROUNDS[scene.background], rng, 6)
    for thing in scene.things:
        shift_x, shift_y = (int((2 * JITTER_PX + 1) * rng.random()) - JITTER_PX for _ in "xy")
        column, row = PLACES[thing.place]
        # Masks are drawn in the middle cell. Nothing wraps around: jitter and all, a thing stays in its cell.
        step = CELL_PX + OUTWARD_PX
        offset = ((row - 1) * step + shift_y, (column - 1) * step + shift_x)
        mask = np.roll(_mask(thing.shape, SIZES[thing.size]), offset, axis=(0, 1))[..., None]
        image += mask * (_tint(COLOURS[thing.colour], rng, 14) - image)
    return (image + 0.5).astype(np.uint8)


def _tint(colour: tuple[int, int, int], rng: random.Random, spread: int) -> NDArray[np.float32]:
    shifted = [channel + spread * (2 * rng.random() - 1) for channel in colour]
    return np.clip(np.array(shifted, np.float32), 0, 255)


# ---------------------------------------------------------------------------------------------- captions

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
    return options[0] if rng.random() < 0.5 else _pick(rng, options)


def _thing_phrase(thing: Thing, rng: random.Random, choices: _Choices = _MIXED) -> str:
    draw = rng.random()
    sums = accumulate(weight for weight, _ in choices)
    named = next((names for reached, (_, names) in zip(sums, choices, strict=True) if draw < reached), ())
    words = [_word(thing.size, rng)] if "size" in named else []
    words += [thing.colour] if "colour" in named else []
    words += [_word(thing.shape if "shape" in named else "shape", rng)]
    return _with_article(" ".join(words))


def _with_article(words: str) -> str:
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
        return f"{_with_article(_word('shape', rng))} {PLACE_PHRASES[thing.place]}"
    phrase = _thing_phrase(thing, rng)
    return f"{phrase} {PLACE_PHRASES[thing.place]}" if draw < 0.7 else phrase


def _double_body(scene: Scene, choices: _Choices, rng: random.Random) -> str:
    told = inverted(scene) if rng.random() < 0.5 else scene
    assert told.relation is not None  # two things always stand in a relation
    first, second = (_thing_phrase(thing, rng, choices) for thing in told.things)
    return f"{first} {_word(told.relation, rng)} {second}"


def inverted(scene: Scene) -> Scene:
    """The same picture told from its other thing."""
    assert scene.relation is not None
    return replace(scene, things=scene.things[::-1], relation=INVERSE[scene.relation])


def captions(scene: Scene, rng: random.Random, count: int = CAPTIONS_PER_IMAGE) -> list[str]:
    """`count` renderings of a scene, the canonical one first."""
    return [full_caption(scene), *(caption(scene, rng) for _ in range(count - 1))]


def first_captions(scene: Scene, rng: random.Random, count: int = CAPTIONS_PER_IMAGE) -> list[str]:
    """`count` renderings for a first lesson."""
    return [first_caption(scene, rng) for _ in range(count)]


# ------------------------------------------------------------------------------------------------ probes


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
        "colour": {c: [_with_article(f"{c} {s}") for s in (*SHAPES, "shape")] for c in COLOURS},
        "shape": {s: [f"a {s}", *(_with_article(f"{c} {s}") for c in COLOURS)] for s in SHAPES},
        "size": {z: [f"a {z} {s}" for s in SHAPES] for z in SIZES},
        "place": {p: [f"a {s} {PLACE_PHRASES[p]}" for s in (*SHAPES, "shape")] for p in PLACES},
        "colour x shape": {
            f"{c} {s}": [_with_article(f"{c} {s}"), *(f"a {z} {c} {s}" for z in SIZES)] for c, s in PAIRS
        },
    }


def _labels(scene: Scene) -> dict[str, str]:
    """The class of a single thing in each of the factors of `prompts`."""
    thing = scene.things[0]
    return {**asdict(thing), "colour x shape": f"{thing.colour} {thing.shape}"}


# ------------------------------------------------------------------------------------------------- files


@dataclass(frozen=True)
class _Split:
    """Scenes under one name; `drawing` keys the generators of pictures and wordings."""

    name: str
    drawing: str
    scenes: Sequence[Scene]

    def key(self, index: int) -> str:
        return f"{self.name}-{index:06d}"


def _sample(split: _Split, index: int) -> Sample:
    scene = split.scenes[index]
    rng = _rng(split.drawing, index)
    image = io.BytesIO()
    Image.fromarray(render(scene, rng)).save(image, format="png", compress_level=6)
    wordings = captions(scene, rng)
    attributes = {
        "captions": wordings,
        "first_captions": first_captions(scene, rng),
        "things": [asdict(thing) for thing in scene.things],
        "background": scene.background,
        "relation": scene.relation,
    }
    members = {
        "png": image.getvalue(),
        "txt": wordings[0].encode(),
        "json": json.dumps(attributes, sort_keys=True).encode(),
    }
    if len(scene.things) == 1:
        members["cls"] = str(PAIRS.index(scene.things[0].pair)).encode()
    return Sample(split.key(index), members)


def _write_split(out_dir: Path, split: _Split) -> None:
    starts = range(0, len(split.scenes), SAMPLES_PER_SHARD)
    for number, start in enumerate(tqdm(starts, desc=split.name, unit="shard", disable=None)):
        stop = min(start + SAMPLES_PER_SHARD, len(split.scenes))
        path = out_dir / f"{split.name}-{number:05d}.tar"
        write_shard(path, (_sample(split, index) for index in range(start, stop)))


def generate(
    out_dir: str | os.PathLike[str],
    *,
    num_train: int = 30_000,
    num_test: int = 1_000,
    seed: int = 0,
    test_seed: int = 7_000_003,
) -> None:
    """Write the data set into `out_dir`; equal arguments give equal bytes. Raises DataError.

    - `train-*.tar`: one or two things, no held-out pair. KEY.json lists the wordings under "captions",
      and those for a first lesson under "first_captions".
    - `val-*.tar`: single things of trained pairs, new pictures; KEY.cls indexes classnames.txt.
    - `single-*.tar`: single things of held-out pairs, with KEY.cls as well.
    - `test-*.tar`: two things of held-out pairs each, every scene different.
    - `classnames.txt`: the 36 pairs; `prompts.json`: see `prompts`; `probes.jsonl`: see `probe_rows`;
      `labels.json`: key of a single thing -> its class in each factor.
    """
    for name, count in (("--num-train", num_train), ("--num-test", num_test)):
        if count < 1:
            raise DataError(f"{name} {count}: give at least 1")
    if seed == test_seed:
        raise DataError(
            f"--test-seed {test_seed}: the same as --seed; test pictures need a seed of their own"
        )
    out_dir = Path(out_dir)
    singles = num_test // 2 + 1
    train = _Split("train", f"train/{seed}", [train_scene(seed, index) for index in range(num_train)])
    val = _Split("val", f"val/{seed}", val_singles(seed, singles))
    single = _Split("single", f"single/{test_seed}", test_singles(test_seed, singles))
    test = _Split("test", f"test/{test_seed}", test_doubles(test_seed, num_test))
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        for split in (train, val, single, test):
            _write_split(out_dir, split)
        rows = probe_rows(test.scenes, [test.key(index) for index in range(num_test)])
        labels = {single.key(index): _labels(scene) for index, scene in enumerate(single.scenes)}
        _write_text(out_dir / "probes.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        _write_text(out_dir / "prompts.json", json.dumps(prompts(), indent=1) + "\n")
        _write_text(out_dir / "labels.json", json.dumps(labels, indent=1) + "\n")
        _write_text(out_dir / "classnames.txt", "".join(f"{c} {s}\n" for c, s in PAIRS))
    except OSError as error:
        raise DataError(
            f"--output {out_dir}: {error.strerror}; choose a folder that can be written"
        ) from error


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `clipstack data shapes`."""
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the data set")
    parser.add_argument(
        "--num-train", type=int, default=30_000, help="training scenes (default: %(default)s)"
    )
    parser.add_argument("--num-test", type=int, default=1_000, help="test scenes (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of train and val (default: %(default)s)")
    parser.add_argument(
        "--test-seed", type=int, default=7_000_003, help="seed of the test splits (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """`clipstack data shapes`: write the data set and say where it lies."""
    generate(
        args.output,
        num_train=args.num_train,
        num_test=args.num_test,
        seed=args.seed,
        test_seed=args.test_seed,
    )
    print(f"{args.num_train} training scenes and {args.num_test} test scenes in {args.output}")
    return 0
