"""The loaders read others' shards unchanged; tests/data_pipelines/test_interop.py has ours read by others."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from clipstack.config.models import DataConfig
from clipstack.loading.eval_loader import EvalLoader, ShardSamples
from clipstack.loading.train_loader import TrainLoader
from clipstack.preprocess import Preprocess
from clipstack.world import World

PREPROCESS = Preprocess(image_size=(16, 16), mean=(0.5,) * 3, std=(0.25,) * 3, context_length=12)


def jpeg(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def add(tar: tarfile.TarFile, name: str, payload: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.uname, info.gname = len(payload), 1_700_000_000, "bigdata", "bigdata"
    tar.addfile(info, io.BytesIO(payload))


def test_img2dataset_output_is_read_unchanged(tmp_path: Path) -> None:
    """Its layout: 9-digit keys, .jpg .txt .json, a failed download leaves no member, tables beside the
    tars."""
    with tarfile.open(tmp_path / "00000.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for i in (0, 1, 3):
            key = f"00000{i:04}"
            record = {
                "caption": f"c {i}",
                "url": f"https://example.org/{i}.jpg",
                "key": key,
                "status": "success",
                "error_message": None,
                "width": 24,
                "height": 20,
                "exif": "{}",
                "sha256": "0" * 64,
            }
            add(tar, f"{key}.jpg", jpeg(i))
            add(tar, f"{key}.json", json.dumps(record).encode())
            add(tar, f"{key}.txt", f"c {i}".encode())
    (tmp_path / "00000_stats.json").write_text("{}")
    (tmp_path / "00000.parquet").write_bytes(b"PAR1")
    config = DataConfig(train=str(tmp_path), workers=0)
    loader = TrainLoader(
        config, preprocess=PREPROCESS, batch_size=3, world=World(), seed=1, quarantine_path=None
    )
    batch = next(loader.iterate(0))
    assert sorted(batch.keys) == [f"00000.tar/00000{i:04}" for i in (0, 1, 3)]


def test_clip_benchmark_folders_are_read_unchanged(tmp_path: Path) -> None:
    """Its layout: SPLIT/N.tar with sNNNNNNN.webp and .cls (no captions), classnames and templates beside."""
    split = tmp_path / "test"
    split.mkdir()
    (tmp_path / "classnames.txt").write_text("cat\ndog\n")
    (tmp_path / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\n")
    (split / "nshards.txt").write_text("2")
    for shard in range(2):
        with tarfile.open(split / f"{shard}.tar", "w") as tar:
            for i in range(5):
                add(tar, f"s{shard * 5 + i:07}.cls", b"%d" % (i % 2))
                buffer = io.BytesIO()
                Image.open(io.BytesIO(jpeg(i))).save(buffer, "WEBP", lossless=True)
                add(tar, f"s{shard * 5 + i:07}.webp", buffer.getvalue())
    samples = ShardSamples((str(split),), DataConfig(train="."), captions="ignored")
    source = EvalLoader(samples, preprocess=PREPROCESS, batch_size=4, world=World(), workers=0)
    rows = [
        (key, int(c)) for b in source for key, c, ok in zip(b.keys, b.class_index, b.mask, strict=True) if ok
    ]
    assert rows == [(f"{s}.tar/s{s * 5 + i:07}", i % 2) for s in range(2) for i in range(5)]
    assert source.bad == []
