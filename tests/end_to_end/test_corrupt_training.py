"""Two ranks train on damaged copies of real photos: what is damaged is named, the rest is used, no hang."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipelines.cli import main
from data_pipelines.index import Sample, build_index, load_index, write_shard
from data_pipelines.index.shard_index import ShardIndex, index_path
from tests.clipstack.training_runs import metrics, write_recipe
from tests.data_pipelines.making import REPOSITORY, SHARED_DATA, huge_png

SOURCE = SHARED_DATA / "cifar10/train-00000.tar"
SAMPLES, BATCH = 60, 16
"""Of a shard, and of a global batch."""
BAD, TAIL = 5, 55
"""The sample that damage hits, and the one where archives are cut."""

Damage = Callable[[Path, ShardIndex], object]


def flip(path: Path, offset: int) -> None:
    overwrite(path, offset, bytes([path.read_bytes()[offset] ^ 0x40]))


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def image_instead(**members: bytes) -> Damage:
    """A sound shard whose sample BAD has another image, indexed as it is."""

    def damage(path: Path, index: ShardIndex) -> None:
        indexed = index_path(path).exists()
        samples = list(samples_of(path, index))
        samples[BAD] = Sample(samples[BAD].key, {**members, "txt": b"a photo"})
        write_shard(path, samples)
        if not indexed:
            index_path(path).unlink()

    return damage


DAMAGE: dict[str, Damage] = {
    "flipped header byte": lambda p, i: flip(p, i.members(BAD)["jpg"].header_offset + 3),
    "zeroed 1 KiB": lambda p, i: overwrite(p, i.members(BAD)["txt"].header_offset, bytes(1024)),
    "cut at a member boundary": lambda p, i: os.truncate(p, i.members(TAIL)["jpg"].header_offset),
    "cut inside a payload": lambda p, i: os.truncate(p, i.members(TAIL)["jpg"].offset + 100),
    "flipped payload byte": lambda p, i: flip(p, i.members(BAD)["jpg"].offset + 300),
    "no image": image_instead(jpg=b"this is no JPEG" * 40),
    "20,000 x 20,000 pixels": image_instead(png=huge_png()),
    "none": lambda p, i: None,
}
ONLY_AN_INDEX_CAN_KNOW = ("flipped payload byte",)


def samples_of(path: Path, index: ShardIndex) -> list[Sample]:
    data = path.read_bytes()
    return [Sample(key, index.payloads(i, data, 0)) for i, key in enumerate(index.keys)]


def damaged_copies(folder: Path, *, indexed: bool) -> dict[str, tuple[Path, ShardIndex]]:
    """By kind of damage a shard of 60 photos, and its index from before."""
    folder.mkdir()
    photos = samples_of(SOURCE, build_index(SOURCE))
    kinds = [kind for kind in DAMAGE if indexed or kind not in ONLY_AN_INDEX_CAN_KNOW]
    out = {}
    for number, kind in enumerate(kinds):
        path = folder / f"part-{number:05}.tar"
        write_shard(path, photos[number * SAMPLES : (number + 1) * SAMPLES])
        index = load_index(path)
        if not indexed:
            index_path(path).unlink()
        DAMAGE[kind](path, index)
        out[kind] = path, index
    return out


def expected(kind: str, path: Path, index: ShardIndex, *, indexed: bool) -> set[tuple[str, str | None]]:
    """(shard, key) of the lines that quarantine.jsonl must have."""
    if kind == "none":
        return set()
    cut = kind.startswith("cut")
    lost = index.keys[TAIL:] if cut else (index.keys[BAD],)
    lines: set[tuple[str, str | None]] = {(path.name, key) for key in lost}
    if indexed or "image" in kind or "pixels" in kind:
        return lines
    # An index of what is damaged already knows of the damage, but not of the keys behind the cut.
    return {(path.name, None)} | (set() if cut else lines)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not SOURCE.exists(), reason="needs ../shared/data/cifar10")
@pytest.mark.parametrize("indexed", [True, False], ids=["indexed before", "indexed when damaged"])
def test_two_ranks_survive_every_kind_of_damage_and_quarantine_exactly_what_it_hit(
    tmp_path: Path, indexed: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = damaged_copies(tmp_path / "shards", indexed=indexed)
    for kind, (path, _) in shards.items():
        assert main(["verify", str(path), "--processes", "1"]) == (0 if kind == "none" else 1), kind
    capsys.readouterr()
    run = tmp_path / "run"
    # One epoch and a little, so that every sample has its turn.
    steps = len(shards) * SAMPLES // BATCH + 1
    ended = subprocess.run(
        [
            Path(sys.executable).parent / "torchrun", "--standalone", "--nproc_per_node", "2",
            "clipstack/train.py", "--config", write_recipe(tmp_path, tmp_path / "shards"),
            f"run.dir={run}", f"train.steps={steps}", f"train.batch_size={BATCH}", "data.workers=1",
        ],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=500,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert [line["samples_seen"] for line in metrics(run)] == [BATCH * (i + 1) for i in range(steps)]
    records = [json.loads(line) for line in (run / "quarantine.jsonl").read_text().splitlines()]
    hit = [expected(kind, path, index, indexed=indexed) for kind, (path, index) in shards.items()]
    assert {(record["shard"], record["key"]) for record in records} == set().union(*hit)
    # Each once, though two ranks and two epochs meet it.
    assert len(records) == len({(record["shard"], record["key"]) for record in records})
    assert all(record["reason"] for record in records)
