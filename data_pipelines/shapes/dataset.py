"""The data set as files: shards of each split, prompts, probes and labels."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from data_pipelines.errors import DataError
from data_pipelines.index import Sample, write_shard
from data_pipelines.shapes.captions import captions, first_captions
from data_pipelines.shapes.pictures import render
from data_pipelines.shapes.probes import classes_of, probe_rows, prompts
from data_pipelines.shapes.scenes import PAIRS, Scene, keyed_rng
from data_pipelines.shapes.splits import held_out_doubles, held_out_singles, train_scene, val_singles

SAMPLES_PER_SHARD = 2500


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
    rng = keyed_rng(split.drawing, index)
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
    single = _Split("single", f"single/{test_seed}", held_out_singles(test_seed, singles))
    test = _Split("test", f"test/{test_seed}", held_out_doubles(test_seed, num_test))
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        for split in (train, val, single, test):
            _write_split(out_dir, split)
        rows = probe_rows(test.scenes, [test.key(index) for index in range(num_test)])
        labels = {single.key(index): classes_of(scene) for index, scene in enumerate(single.scenes)}
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
