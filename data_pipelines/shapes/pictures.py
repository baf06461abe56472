"""Scenes to pixels."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from data_pipelines.shapes.scenes import BACKGROUNDS, COLOURS, PLACES, SIZES, Scene

IMAGE_SIZE = 60  # pixels, square
CELL_PX = IMAGE_SIZE // 3  # of the grid of places
OUTWARD_PX = 2  # things outside the middle stand this far from their cell's centre, towards the edge
JITTER_PX = 1  # and then up to this far from there, along each axis


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
