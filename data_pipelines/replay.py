"""A step of a run again: the images and captions that it saw, as they were cropped and mirrored."""

from __future__ import annotations

import hashlib
import io
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from data_pipelines.errors import DataError
from data_pipelines.images import MAX_IMAGE_PIXELS, Geometry, Pixels, draw_geometry
from data_pipelines.order import OrderParams, batch_ranges
from data_pipelines.page import THUMBNAIL_PX, document, picture
from data_pipelines.rights import EMPTY, load_removal_list
from data_pipelines.stream import Reader, ReadOptions, make_manifest
from data_pipelines.stream.drawing import Drawer, Drawn


@dataclass(frozen=True)
class Seen:
    """One pair as the step saw it."""

    position: int
    epoch: int
    drawn: Drawn
    geometry: Geometry


def read_recipe(run: Path) -> dict[str, Any]:
    """The resolved recipe of a run. Raises DataError."""
    try:
        return tomllib.loads((run / "recipe.toml").read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{run}: no run folder: recipe.toml: {error.strerror}") from error
    except tomllib.TOMLDecodeError as error:
        raise DataError(f"{run / 'recipe.toml'}: not valid TOML: {error}") from error


def step_ranges(run: Path, recipe: Mapping[str, Any], step: int) -> tuple[tuple[int, int], ...]:
    """The ranges [low, high) of positions that a step used. Raises DataError for a step outside the run.

    Counted in batches from the last line of metrics.jsonl before it, over the windows that roll-backs left
    out; where the step has a line of its own that says otherwise, the line is right.
    """
    if not 1 <= step <= recipe["train"]["steps"]:
        raise DataError(f"--step {step}: the run has steps 1 to {recipe['train']['steps']}")
    batch_size = int(recipe["train"]["batch_size"])
    lines = _lines(run / "metrics.jsonl")
    ends = {line["step"]: line["samples_seen"] for line in lines if "samples_seen" in line}
    known = max((other for other in ends if other < step), default=0)
    batches = batch_ranges(ends.get(known, 0), batch_size, _skipped_windows(run, lines))
    counted = next(islice(batches, step - known - 1, None))
    end = ends.get(step, counted[-1][1])
    return counted if end == counted[-1][1] else ((end - batch_size, end),)


def _skipped_windows(run: Path, lines: Sequence[Mapping[str, Any]]) -> list[tuple[int, int]]:
    """[low, high) of the positions that the run left out: what the newest checkpoint says, and roll-backs
    that came after it."""
    states = sorted((run / "checkpoints").glob("step-*/state.json"))
    saved = _state(states[-1])["progress"].get("skipped_windows", []) if states else []
    events = [line["skipped_samples"] for line in lines if line.get("event") == "rolled_back"]
    return [(low, high) for low, high in [*saved, *events]]


def _state(path: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}; remove this checkpoint") from error
    return state


def _lines(path: Path) -> list[dict[str, Any]]:
    """Of a file of JSON lines; a killed run may have left a torn last one."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]


def replay(recipe: Mapping[str, Any], start: int, end: int) -> Iterator[Seen]:
    """The pairs at positions [start, end) of a run's order, bad samples replaced as in the run. Raises
    DataError."""
    data = recipe["data"]
    seed = int(recipe.get("seed", 0))
    defaults = OrderParams()
    cache_dir = Path(data["cache_dir"]) if "cache_dir" in data else None
    manifest = make_manifest(_sources(data["train"]), cache_dir)
    order = manifest.order(
        OrderParams(
            seed,
            *(int(data.get(name, getattr(defaults, name))) for name in ("lanes", "window_shards", "quantum")),
        )
    )
    options = ReadOptions(
        caption=data.get("caption", "txt"),
        max_image_pixels=int(data.get("max_image_pixels", MAX_IMAGE_PIXELS)),
        removals=load_removal_list(data["removals"]) if "removals" in data else EMPTY,
        cache_dir=cache_dir,
    )
    drawer = Drawer(Reader(manifest, options), seed=seed)
    augment = data["augment"]
    for position, (source, epoch, sample) in enumerate(
        zip(*order.take(start, end - start), strict=True), start
    ):
        drawn = drawer.draw(int(epoch), int(sample), int(source))
        height, width = drawn.pixels.shape[:2]
        geometry = draw_geometry(
            width,
            height,
            scale=tuple(augment["crop_scale"]),
            ratio=tuple(augment["crop_ratio"]),
            hflip=augment["hflip"],
            rng=drawn.rng,
        )
        yield Seen(position, int(epoch), drawn, geometry)


def _sources(train: str | list[str] | list[dict[str, Any]]) -> list[tuple[tuple[str, ...], float]]:
    if isinstance(train, str):
        return [((train,), 1.0)]
    weighted = [source for source in train if isinstance(source, dict)]
    if weighted:
        return [((source["path"],), float(source.get("weight", 1.0))) for source in weighted]
    return [(tuple(str(path) for path in train), 1.0)]


def describe(one: Seen) -> dict[str, Any]:
    """A pair as a JSON object; `crop` is [top, left, height, width] in pixels of the stored image."""
    return {
        "position": one.position,
        "epoch": one.epoch,
        "key": one.drawn.raw.key,
        "caption": one.drawn.caption,
        "image_sha256": hashlib.sha256(one.drawn.raw.image).hexdigest(),
        "crop": list(one.geometry.box),
        "mirrored": one.geometry.flip,
        "replaces": [f"{bad.shard}/{bad.key}" for bad in one.drawn.bad],
    }


def page(seen: list[Seen], *, title: str) -> str:
    """One HTML file, images inside."""
    body = (
        f"<h1>{escape(title)}</h1><p>{len(seen)} pairs, cropped and mirrored as the model saw them; "
        f'colour changes are not shown.</p><div class="grid">{"".join(map(_figure, seen))}</div>'
    )
    return document(title, body)


def _figure(one: Seen) -> str:
    buffer = io.BytesIO()
    _cropped(one.drawn.pixels, one.geometry).save(buffer, "PNG")
    words = f'{escape(one.drawn.caption)}<br><span class="soft">{escape(one.drawn.raw.key)}</span>'
    return f'<figure class="card">{picture(buffer.getvalue())}<figcaption>{words}</figcaption></figure>'


def _cropped(pixels: Pixels, geometry: Geometry) -> Image.Image:
    box = geometry.box
    image = Image.fromarray(pixels[box.top : box.top + box.height, box.left : box.left + box.width])
    image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if geometry.flip else image
