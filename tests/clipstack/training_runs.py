"""A small data set, a recipe for it, and what a run wrote."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_pipelines.index import Sample, write_shard

RECIPE = """
seed = 1
[model]
embed_dim = 16
vision_cfg = {image_size = 16, patch_size = 4, width = 16, layers = 2, head_width = 8, patch_dropout = 0.25}
text_cfg = {context_length = 12, vocab_size = 49408, width = 8, heads = 2, layers = 1}
[data]
workers = 2
max_bad_fraction = 0.5
augment = {hflip = true, crop_scale = [0.6, 1.0], color_jitter = [0.3, 0.3, 0.3, 0.0]}
[train]
steps = 12
batch_size = 8
precision = "bf16"
zero_stage = 1
[optim]
lr = 1e-2
[log]
every_steps = 1
[checkpoint]
every_steps = 4
"""
VARYING = ("samples_per_s", "data_wait_fraction", "checkpoint_wait_fraction", "memory_gib")
"""What differs between equal runs."""


def write_shards(folder: Path, sizes: tuple[int, ...] = (30, 21, 25, 24), *, start: int = 0) -> Path:
    """Shards of little PNGs with a caption and a class; returns the folder."""
    folder.mkdir(parents=True)
    number = start
    for shard, size in enumerate(sizes):
        samples = []
        for i in range(number, number + size):
            members = {
                "png": png(i),
                "txt": f"a picture of thing {i % 13} in colour {i % 7}".encode(),
                "cls": b"%d" % (i % 4),
            }
            samples.append(Sample(f"{i:06}", members))
        write_shard(folder / f"part-{shard:05}.tar", samples)
        number += size
    (folder / "classnames.txt").write_text("cat\ndog\nhen\npig\n")
    return folder


def png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((20, 24)).save(buffer, "PNG")
    return buffer.getvalue()


def write_recipe(folder: Path, data: Path, text: str = RECIPE) -> Path:
    """The recipe with the shards in `data`; `run.dir` is for the command line."""
    path = folder / "recipe.toml"
    path.write_text(text.replace("[data]\n", f"[data]\ntrain = {json.dumps(str(data / 'part-*.tar'))}\n"))
    return path


def metrics(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what differs between equal runs."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in VARYING} for line in lines]


def steps_logged(run: Path) -> list[int]:
    """[] before the first."""
    return [line["step"] for line in metrics(run)] if (run / "metrics.jsonl").exists() else []


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in metrics(run) if "loss" in line]


def weights_hash(run: Path, export: str = "export") -> str:
    return hashlib.sha256((run / export / "open_clip_model.safetensors").read_bytes()).hexdigest()


def steps_saved(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))
