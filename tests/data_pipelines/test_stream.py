"""Reading, substitution, quarantine: damage costs exactly the samples it hits and nothing else."""

from __future__ import annotations

import errno
import io
import json
import multiprocessing
import os
import re
import shutil
import struct
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines.errors import DataError, SampleError, ShardError
from data_pipelines.index import Sample, build_index, load_index, write_shard
from data_pipelines.index.format import save_index
from data_pipelines.index.shard_index import ShardIndex, index_path
from data_pipelines.order import OrderParams
from data_pipelines.rights import RemovalList, load_removal_list
from data_pipelines.stream import Reader, ReadOptions, make_manifest
from data_pipelines.stream.drawing import Drawer, Drawn
from data_pipelines.stream.quarantine import BadRate, BadSample, Quarantine

SHARED = Path(__file__).resolve().parents[2] / "../shared/data/cifar10"


def jpeg(seed: int, size: int = 8) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that says it is huge and holds nothing."""
    chunks = [b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT"]
    packed = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def sample(i: int, image: bytes | None = None) -> Sample:
    members = {
        "jpg": jpeg(i) if image is None else image,
        "txt": f"caption {i}".encode(),
        "cls": b"%d" % (i % 3),
    }
    return Sample(f"{i:04}", members)


def make_shards(folder: Path, sizes: tuple[int, ...] = (7, 12, 1, 20)) -> list[str]:
    """Shards of uneven sizes; the keys of all samples in a row, as SHARD/KEY."""
    keys = []
    number = 0
    for shard, size in enumerate(sizes):
        write_shard(folder / f"{shard:05}.tar", [sample(number + i) for i in range(size)])
        keys += [f"{shard:05}.tar/{number + i:04}" for i in range(size)]
        number += size
    return keys


def one_epoch(folder: Path, options: ReadOptions | None = None, *, seed: int = 3) -> list[Drawn]:
    manifest = make_manifest([((str(folder),), 1.0)])
    order = manifest.order(OrderParams(seed))
    drawer = Drawer(Reader(manifest, options or ReadOptions()), seed=seed)
    draws = order.take(0, order.num_samples)
    return [drawer.draw(int(e), int(s)) for e, s in zip(draws.epoch, draws.sample, strict=True)]


def quarantined(drawn: list[Drawn]) -> set[str]:
    return {f"{bad.shard}/{bad.key}" for one in drawn for bad in one.bad}


def test_an_epoch_gives_each_sample_with_its_own_bytes(tmp_path: Path) -> None:
    keys = make_shards(tmp_path)
    drawn = one_epoch(tmp_path)
    assert sorted(one.raw.key for one in drawn) == keys
    for one in drawn:
        number = int(one.raw.key[-4:])
        assert (one.raw.image, one.caption, one.raw.class_index) == (
            jpeg(number),
            f"caption {number}",
            number % 3,
        )
        assert keys[one.sample] == one.raw.key


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x40
    path.write_bytes(data)


def zero(path: Path, start: int) -> None:
    data = bytearray(path.read_bytes())
    data[start : start + 1024] = bytes(1024)
    path.write_bytes(data)


# Each takes the last shard (samples 20 to 39), its sound index, and damages the tar at sample 25, the sixth.
DAMAGE: dict[str, tuple[Callable[[Path, ShardIndex], object], range]] = {
    "flipped header byte": (lambda p, i: flip(p, i.members(5)["jpg"].header_offset + 3), range(25, 26)),
    "flipped payload byte": (lambda p, i: flip(p, i.members(5)["jpg"].offset + 200), range(25, 26)),
    "flipped caption byte": (lambda p, i: flip(p, i.members(5)["txt"].offset), range(25, 26)),
    "zeroed KiB over headers": (lambda p, i: zero(p, i.members(5)["txt"].header_offset), range(25, 26)),
    "zeroed KiB over two samples": (lambda p, i: zero(p, i.members(5)["cls"].offset), range(25, 27)),
    "cut at a member boundary": (
        lambda p, i: os.truncate(p, i.members(5)["jpg"].header_offset),
        range(25, 40),
    ),
    "cut inside a payload": (lambda p, i: os.truncate(p, i.members(5)["jpg"].offset + 100), range(25, 40)),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_under_an_index_costs_exactly_the_samples_it_hits(tmp_path: Path, kind: str) -> None:
    keys = make_shards(tmp_path)
    shard = tmp_path / "00003.tar"
    damage, lost = DAMAGE[kind]
    damage(shard, load_index(shard))
    drawn = one_epoch(tmp_path)
    assert quarantined(drawn) == {keys[i] for i in lost}
    assert len(drawn) == len(keys)
    used = Counter(one.raw.key for one in drawn)
    assert {key for key in keys if not used[key]} == {keys[i] for i in lost}


@pytest.mark.parametrize("kind", ["flipped header byte", "cut at a member boundary", "cut inside a payload"])
def test_structural_damage_without_an_index_is_recorded_and_the_sound_samples_are_used(
    tmp_path: Path, kind: str
) -> None:
    keys = make_shards(tmp_path)
    shard = tmp_path / "00003.tar"
    damage, lost = DAMAGE[kind]
    damage(shard, load_index(shard))
    index_path(shard).unlink()
    manifest = make_manifest([((str(tmp_path),), 1.0)])
    assert [bad.shard for bad in manifest.damage] == ["00003.tar"]
    drawn = one_epoch(tmp_path)
    assert {keys[i] for i in range(40) if i not in lost} <= {one.raw.key for one in drawn}
    # The sample whose image lost its header is still known by its caption; those behind a cut are not
    # known at all.
    assert quarantined(drawn) == ({keys[25]} if kind == "flipped header byte" else set())


@pytest.mark.parametrize(
    "image, reason",
    [
        (b"not an image at all", "no image in a format"),
        (png_header(20_000, 20_000), "400000000 pixels|20000 x 20000 pixels"),
        (png_header(9_000, 9_000), "9000 x 9000 pixels, over the limit of 50000000"),
        (jpeg(1)[:-200], "truncated|cannot be decoded"),
    ],
)
def test_images_that_cannot_be_used_are_replaced_and_named(tmp_path: Path, image: bytes, reason: str) -> None:
    write_shard(tmp_path / "00000.tar", [sample(i, image if i == 4 else None) for i in range(10)])
    drawn = one_epoch(tmp_path)
    (bad,) = [bad for one in drawn for bad in one.bad]
    assert (bad.shard, bad.key) == ("00000.tar", "0004")
    assert re.search(reason, bad.reason), bad.reason


@pytest.mark.parametrize(
    "members, reason",
    [
        ({"txt": b"no image"}, "no image among its members"),
        ({"jpg": jpeg(0)}, "no caption"),
        ({"jpg": jpeg(0), "txt": b" \n"}, "empty caption"),
        ({"jpg": jpeg(0), "txt": b"\xff\xfe"}, "not UTF-8"),
        ({"jpg": jpeg(0), "json": b"{"}, "json cannot be read"),
        ({"jpg": jpeg(0), "txt": b"a", "cls": b"dog"}, "no class index"),
    ],
)
def test_samples_with_missing_or_unreadable_members_are_named(
    tmp_path: Path, members: dict[str, bytes], reason: str
) -> None:
    write_shard(tmp_path / "a.tar", [Sample("bad", members), sample(1)])
    with pytest.raises(SampleError, match=reason):
        Reader(make_manifest([((str(tmp_path),), 1.0)]), ReadOptions()).read(0)


def test_a_substitute_is_always_the_same(tmp_path: Path) -> None:
    make_shards(tmp_path)
    shard = tmp_path / "00003.tar"
    flip(shard, load_index(shard).members(5)["jpg"].offset)
    first, second = one_epoch(tmp_path), one_epoch(tmp_path)
    assert [(one.sample, one.rng.random()) for one in first] == [
        (one.sample, one.rng.random()) for one in second
    ]
    (replaced,) = [one for one in first if one.bad]
    assert replaced.raw.key.startswith("00003.tar/")  # of the same shard, which is open and cached already


def test_a_shard_of_which_nothing_can_be_read_is_replaced_from_the_others(tmp_path: Path) -> None:
    keys = make_shards(tmp_path)
    (tmp_path / "00001.tar").write_bytes(b"")
    drawn = one_epoch(tmp_path)
    assert quarantined(drawn) == set(keys[7:19])
    assert all(not one.raw.key.startswith("00001") for one in drawn)


def test_data_of_which_nothing_can_be_read_stop_with_one_error(tmp_path: Path) -> None:
    make_shards(tmp_path, (5,))
    (tmp_path / "00000.tar").write_bytes(b"")
    with pytest.raises(DataError, match="no usable sample was found"):
        one_epoch(tmp_path)


def test_an_index_replaced_under_a_run_is_noticed(tmp_path: Path) -> None:
    make_shards(tmp_path, (5,))
    manifest = make_manifest([((str(tmp_path),), 1.0)])
    write_shard(tmp_path / "00000.tar", [sample(9)])
    with pytest.raises(ShardError, match="changed while it was in use"):
        Reader(manifest, ReadOptions()).read(0)


def test_an_index_stays_as_it_is_when_its_tar_changes(tmp_path: Path) -> None:
    make_shards(tmp_path, (20,))
    before = index_path(tmp_path / "00000.tar").read_bytes()
    os.truncate(tmp_path / "00000.tar", load_index(tmp_path / "00000.tar").members(10)["jpg"].offset)
    one_epoch(tmp_path)
    assert index_path(tmp_path / "00000.tar").read_bytes() == before


@pytest.mark.parametrize(
    "members, option, expected",
    [
        ({"txt": b"plain"}, "txt", ("plain",)),
        ({"txt": b"plain", "json": b'{"caption": "j"}'}, "txt", ("plain",)),
        ({"json": b'{"caption": "j"}'}, "txt", ("j",)),
        ({"txt": b"plain", "json": b'{"captions": ["a", "b"]}'}, "txt", ("a", "b")),
        ({"txt": b"plain", "json": b'{"alt": "other"}'}, "alt", ("other",)),
        ({"txt": b"plain", "json": b'{"alt": ["x", "y"]}'}, "alt", ("x", "y")),
    ],
)
def test_captions_come_from_where_they_are_configured(
    tmp_path: Path, members: dict[str, bytes], option: str, expected: tuple[str, ...]
) -> None:
    write_shard(tmp_path / "a.tar", [Sample("k", {"jpg": jpeg(0), **members})])
    reader = Reader(make_manifest([((str(tmp_path),), 1.0)]), ReadOptions(caption=option))
    assert reader.read(0).captions == expected


def test_each_epoch_picks_captions_anew_and_every_one_comes_up(tmp_path: Path) -> None:
    captions = [f"c{i}" for i in range(4)]
    record = json.dumps({"captions": captions}).encode()
    write_shard(tmp_path / "a.tar", [Sample("k", {"jpg": jpeg(0), "json": record})])
    drawer = Drawer(Reader(make_manifest([((str(tmp_path),), 1.0)]), ReadOptions()), seed=1)
    assert {drawer.draw(epoch, 0).caption for epoch in range(40)} == set(captions)


def test_removed_samples_are_replaced_logged_and_not_counted_as_bad(tmp_path: Path) -> None:
    keys = make_shards(tmp_path)
    digest = load_index(tmp_path / "00001.tar").members(2)["jpg"].digest.hex()
    (tmp_path / "removals.txt").write_text(f"key:{keys[3]}\nsha256:{digest}\n")
    drawn = one_epoch(tmp_path, ReadOptions(removals=load_removal_list(tmp_path / "removals.txt")))
    assert quarantined(drawn) == {keys[3], keys[9]}
    assert not {keys[3], keys[9]} & {one.raw.key for one in drawn}
    assert all(bad.removed and bad.reason.startswith("removed: ") for one in drawn for bad in one.bad)
    rate = BadRate(limit=0.0)
    rate.count(len(drawn), [bad for one in drawn for bad in one.bad])
    # The order does not change: the others stand where they stood.
    plain = one_epoch(tmp_path)
    assert [a.raw.key for a, b in zip(drawn, plain, strict=True) if not a.bad] == [
        b.raw.key for a, b in zip(drawn, plain, strict=True) if not a.bad
    ]


def test_a_url_in_the_json_of_other_tools_is_removed(tmp_path: Path) -> None:
    record = b'{"caption": "c", "url": "https://example.org/a.jpg"}'
    write_shard(tmp_path / "a.tar", [Sample("k", {"jpg": jpeg(0), "json": record})])
    line = "url:https://example.org/a.jpg"
    reader = Reader(make_manifest([((str(tmp_path),), 1.0)]), ReadOptions(removals=RemovalList({line: line})))
    with pytest.raises(SampleError, match="removed: url:https"):
        reader.read(0)


def test_the_rate_of_bad_samples_stops_a_run_only_above_the_limit() -> None:
    bad = BadSample("a.tar", "k", "broken")
    rate = BadRate(limit=0.01)
    for _ in range(10):
        rate.count(10, [bad])
    with pytest.raises(DataError, match=r"data\.max_bad_fraction = 0\.01: 11 of 110 .* a\.tar/k \(broken\)"):
        rate.count(10, [bad])
    with pytest.raises(DataError):
        BadRate(limit=0.0).count(10, [bad])


def quarantine_often(path: str, worker: int) -> None:
    log = Quarantine(Path(path))
    for i in range(60):
        log.add(
            [BadSample("a.tar", f"{i}", f"found by {worker}"), BadSample("b.tar", None, f"damage {i % 7}")]
        )


def test_the_quarantine_names_each_sample_once_whatever_processes_and_restarts(tmp_path: Path) -> None:
    path = tmp_path / "run" / "quarantine.jsonl"
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=quarantine_often, args=(str(path), i)) for i in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    quarantine_often(str(path), 3)
    with path.open("a") as file:
        file.write('{"shard": "torn')  # a run that was killed in the middle of a line
    Quarantine(path).add([BadSample("a.tar", "5", "again"), BadSample("c.tar", "new", "broken")])
    records = [json.loads(line) for line in path.read_text().splitlines()]
    names = Counter((record["shard"], record["key"] or record["reason"]) for record in records)
    assert len(names) == 60 + 7 + 1 and set(names.values()) == {1}
    assert {tuple(record) for record in records} == {("shard", "key", "reason")}


def test_what_the_disk_refuses_of_the_quarantine_is_shown_and_written_later(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    folder.write_text("a file, in which no file can be made")
    log = Quarantine(folder / "quarantine.jsonl")
    log.add([BadSample("a.tar", "1", "broken")])
    log.add([BadSample("a.tar", "2", "broken"), BadSample("a.tar", "1", "broken")])
    shown = [line for line in capsys.readouterr().err.splitlines() if line.startswith("{")]
    assert [json.loads(line)["key"] for line in shown] == ["1", "2"], "each once"
    folder.unlink()
    log.add([BadSample("a.tar", "3", "broken")])
    log.write_pending()
    records = [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]
    assert [record["key"] for record in records] == ["1", "2", "3"]


def test_half_a_line_of_the_quarantine_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, write = tmp_path / "quarantine.jsonl", os.write

    def full_soon(fd: int, data: bytes) -> int:
        if path.stat().st_size:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, data[:10])

    monkeypatch.setattr("data_pipelines.stream.quarantine.os.write", full_soon)
    log = Quarantine(path)
    log.add([BadSample("a.tar", "1", "broken")])
    assert path.read_bytes() == b""
    monkeypatch.undo()
    assert log.write_pending() is None and path.read_text().count("\n") == 1


def test_the_manifest_depends_on_names_and_content_but_not_on_the_place(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    make_shards(tmp_path / "a")
    make_shards(tmp_path / "b")
    make_shards(tmp_path / "c", (7, 12, 1, 19))
    a, b, c = (make_manifest([((str(tmp_path / name),), 1.0)]).digest for name in ("a", "b", "c"))
    assert a == b != c


@pytest.mark.skipif(not SHARED.exists(), reason="needs the shared CIFAR-10 shards")
def test_real_photos_survive_every_kind_of_damage_with_the_right_count(tmp_path: Path) -> None:
    """One shard a kind of damage; an epoch over them loses what was hit and only that."""
    lost = set()
    for number, (kind, (damage, hit)) in enumerate(DAMAGE.items()):
        shard = tmp_path / f"{number}.tar"
        shutil.copyfile(SHARED / "train-00000.tar", shard)
        save_index(build_index(shard), index_path(shard))
        index = load_index(shard)
        damage(shard, index)
        last = len(index) if "cut" in kind else 5 + len(hit)
        lost |= {f"{number}.tar/{index.keys[i]}" for i in range(5, last)}
    drawn = one_epoch(tmp_path)
    assert quarantined(drawn) == lost
    assert len({one.raw.key for one in drawn}) == 2000 * len(DAMAGE) - len(lost)
