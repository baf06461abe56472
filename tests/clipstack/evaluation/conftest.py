"""Shared by the tests of evaluation: a small data set in CLIP_benchmark's layout, a random and a trained
model."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from clipstack.config.models import ModelConfig
from clipstack.model import ClipModel, build_model
from clipstack.preprocess import Preprocess
from clipstack.towers import open_clip_weights
from clipstack.zero_shot import classifier
from data_pipelines.index import Sample, write_shard

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 70, 220),
    "yellow": (230, 220, 60),
    "white": (240, 240, 240),
    "black": (20, 20, 20),
}
TEMPLATES = ("a photo of a {c} thing.", "a {c} picture.", "the colour {c}.")
SHARD_SIZES = (40, 37, 23)
NUM_SAMPLES = sum(SHARD_SIZES)
MODEL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


def png(number: int, *, noise: int = 90) -> bytes:
    """A noisy patch of colour number % 6, its size and shade its own."""
    rng = np.random.default_rng(number)
    colour = np.array(list(COLOURS.values())[number % len(COLOURS)])
    shade = colour + rng.normal(0, 45, 3)
    size = (int(rng.integers(17, 30)), int(rng.integers(17, 30)), 3)
    pixels = np.clip(shade + rng.normal(0, noise, size), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def captions(number: int) -> list[str]:
    """One to three different captions of sample `number`; no two samples share one."""
    name = list(COLOURS)[number % len(COLOURS)]
    return [f"{name} thing number {number}", f"picture {number * 7 + 1} is {name}", f"{name} {number} here"][
        : 1 + number % 3
    ]


@pytest.fixture(scope="session")
def benchmark_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 samples with .png, .cls and .txt (a caption a line), as CLIP_benchmark lays data sets out."""
    root = tmp_path_factory.mktemp("benchmark")
    (root / "test").mkdir()
    number = 0
    for shard, size in enumerate(SHARD_SIZES):
        samples = [
            Sample(
                f"s{i:07}",
                {
                    "png": png(i),
                    "cls": str(i % len(COLOURS)).encode(),
                    "txt": "\n".join(captions(i)).encode(),
                },
            )
            for i in range(number, number + size)
        ]
        write_shard(root / "test" / f"{shard}.tar", samples)
        number += size
    (root / "test" / "nshards.txt").write_text(f"{len(SHARD_SIZES)}\n")
    (root / "classnames.txt").write_text("\n".join(COLOURS))
    (root / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES))
    return root


def export_folder(model: ClipModel, folder: Path) -> Path:
    """What open_clip loads, without our record."""
    folder.mkdir()
    save_file(open_clip_weights(model.towers), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(model.record.to_json())
    return folder


def learn_colours(model: ClipModel, *, steps: int = 40) -> None:
    """A few steps of plain zero-shot classification: enough to be far from chance and from perfection."""
    preprocess = Preprocess.from_record(model.record)
    numbers = range(1000, 1000 + 12 * len(COLOURS))
    images = torch.stack(
        [preprocess.eval_image(Image.open(io.BytesIO(png(i))).convert("RGB")) for i in numbers]
    )
    labels = torch.tensor([i % len(COLOURS) for i in numbers])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        matrix = classifier(model.encode_text, preprocess.tokenizer, list(COLOURS), TEMPLATES[:1])
        loss = torch.nn.functional.cross_entropy(20 * model.encode_image(images) @ matrix, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`random` and `trained`: exported folders of one small architecture."""
    root = tmp_path_factory.mktemp("models")
    model = build_model(ModelConfig.model_validate(MODEL), seed=3)
    random = export_folder(model, root / "random")
    learn_colours(model)
    return {"random": random, "trained": export_folder(model, root / "trained")}
