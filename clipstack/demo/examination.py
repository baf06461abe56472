"""The demo's model, asked: both test splits and every probed text encoded, every probe scored."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from clipstack.checkpoint import LoadedModel, load_model
from clipstack.config.models import DataConfig
from clipstack.demo.scores import Score, demo_scores, read_probe_set
from clipstack.loading.eval_loader import EvalLoader, ShardSamples
from clipstack.world import World

NUM_EXAMPLES = 24
"""Test pictures that the page shows."""
TEXTS_PER_CALL = 512


@dataclass(frozen=True)
class Example:
    """A test picture, the caption that the model picked for it, and the true one."""

    image_png: bytes
    chosen: str
    true: str


@dataclass(frozen=True)
class Examined:
    """All that the demo tells of its model."""

    scores: Mapping[str, Score]
    num_captions: int
    examples: list[Example]


def examine(model_folder: Path, data: Path) -> Examined:
    """Encode the two test splits and every probed text, and ask every probe."""
    loaded = load_model(model_folder)
    probe_set = read_probe_set(data)
    with torch.inference_mode():
        texts = _encode_texts(loaded, probe_set.texts())
        singles, _ = _encode_images(loaded, data / "single-*.tar")
        doubles, pixels = _encode_images(loaded, data / "test-*.tar")
    scores = demo_scores({**singles, **doubles}, texts, probe_set)
    truth = {probe.image: probe.caption for probe in probe_set.probes}
    return Examined(scores, len(truth), _examples(doubles, pixels, texts, truth))


def _encode_texts(loaded: LoadedModel, texts: Sequence[str]) -> dict[str, Tensor]:
    """text -> (D,) unit-norm"""
    features: dict[str, Tensor] = {}
    for start in range(0, len(texts), TEXTS_PER_CALL):
        part = texts[start : start + TEXTS_PER_CALL]
        tokens = loaded.model.trim_tokens(loaded.preprocess.tokenize(part))
        features |= dict(zip(part, loaded.model.encode_text(tokens), strict=True))
    return features


def _encode_images(loaded: LoadedModel, shards: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """key -> (D,) unit-norm, and key -> (3, H, W) uint8. Keys as the probe files write them, without the
    shard."""
    config = DataConfig(train=str(shards), workers=0)
    loader = EvalLoader(
        ShardSamples([str(shards)], config),
        config=config,
        preprocess=loaded.preprocess,
        batch_size=250,
        world=World(),
    )
    features: dict[str, Tensor] = {}
    pixels: dict[str, Tensor] = {}
    for batch in loader:
        keys = [
            key.rsplit("/", 1)[1] for key, used in zip(batch.keys, batch.mask.tolist(), strict=True) if used
        ]
        images = batch.images[batch.mask]
        encoded = loaded.model.encode_image(loaded.preprocess.normalize(images))
        features |= dict(zip(keys, encoded, strict=True))
        pixels |= dict(zip(keys, images, strict=True))
    return features, pixels


def _examples(
    images: Mapping[str, Tensor],
    pixels: Mapping[str, Tensor],
    texts: Mapping[str, Tensor],
    truth: Mapping[str, str],
) -> list[Example]:
    """The first test pictures, each with the caption that it is closest to."""
    captions = list(truth.values())
    gallery = torch.stack([texts[caption] for caption in captions])  # (N, D)
    return [
        Example(_png(pixels[key]), captions[int((gallery @ images[key]).argmax())], truth[key])
        for key in list(truth)[:NUM_EXAMPLES]
    ]


def _png(pixels: Tensor) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(buffer, "PNG")
    return buffer.getvalue()
