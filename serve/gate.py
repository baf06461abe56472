"""The test that an engine must pass before it serves: vectors close to the reference where they differ from
each other.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from serve.runtime import Float32, Gate, UInt8

# Least centred cosine. What is lost in bfloat16 is its rounding; in float32 only the faster preprocessing may
# differ.
LEAST = {"float32": 0.9999, "bfloat16": 0.99}

GATE_TEXTS = (
    "a",
    "a photo of a cat",
    "a red circle above a blue square, drawn on white paper",
    "the harbour at night",
    "two dogs running along the beach in the morning light",
    "an X-ray of a hand; 3 fingers are bent",
    "Größe, naïve café, 東京タワー and a few emoji 🚲🌧️",
    "a long sentence that goes on and on about mountains, rivers, valleys, forests, lakes, islands, deserts, "
    "glaciers, fields, gardens, streets, bridges, towers, markets, stations, trains, ships, planes, bicycles "
    "and people walking between all of them from early in the morning until late in the evening",
)  # fmt: skip


def centred_cosine(vectors: Float32, reference: Float32) -> float:
    """Least cosine of (N, D) rows to the reference's after its mean row is subtracted from both.

    All vectors of a CLIP tower share a large common part: a raw cosine hardly sees what tells inputs apart.
    """
    mean = reference.astype(np.float64).mean(axis=0)
    ours, theirs = vectors.astype(np.float64) - mean, reference.astype(np.float64) - mean
    lengths = np.linalg.norm(ours, axis=-1) * np.linalg.norm(theirs, axis=-1)
    cosines = (ours * theirs).sum(axis=-1) / np.maximum(lengths, np.finfo(np.float64).tiny)
    return float(cosines.min())


def passes(gate: Gate, dtype: str) -> bool:
    return gate.image >= LEAST[dtype] and gate.text >= LEAST[dtype]  # NaN fails; min() would let it through


def _picture(seed: int, height: int, width: int) -> UInt8:
    """(height, width, 3): noise of all scales, strong where coarse, as in photographs, and one hard edge."""
    rng = np.random.default_rng(seed)
    picture = np.full((height, width, 3), 128.0)
    for cells in (2, 4, 8, 16, 32, 64):
        rows, columns = np.arange(height) * cells // height, np.arange(width) * cells // width
        picture += (rng.standard_normal((cells, cells, 3)) * 120 / cells)[rows][:, columns]
    picture[: height // 2, : width // 3] += rng.standard_normal(3) * 60
    clipped: npt.NDArray[np.uint8] = np.clip(picture, 0, 255).astype(np.uint8)
    return clipped


_SIZES = ((480, 640), (640, 480), (375, 500), (224, 224), (300, 900), (1024, 768), (96, 96), (533, 400))
GATE_IMAGES: tuple[UInt8, ...] = tuple(_picture(seed, *size) for seed, size in enumerate(_SIZES))
