"""The index says what the tar holds, and is refused where it cannot be trusted."""

from __future__ import annotations

import hashlib
import struct
import tarfile
from pathlib import Path

import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.errors import ShardError
from data_pipelines.index import Sample, build_index, load_index, write_shard
from data_pipelines.index.format import MAGIC, decode_index, summarize_index
from data_pipelines.index.shard_index import index_path, split_name
from data_pipelines.index.writer import ShardWriter
from data_pipelines.tar import checksum

SAMPLES = [
    Sample(f"{i:04}", {"jpg": b"J" * (i * 37 % 900), "txt": f"caption {i}".encode(), "cls": b"3"})
    for i in range(25)
] + [Sample("sub/dir/k" * 20, {"png": b"P" * 2000})]


def test_index_points_at_the_bytes_of_every_member(tmp_path: Path) -> None:
    index = write_shard(tmp_path / "a.tar", SAMPLES)
    data = (tmp_path / "a.tar").read_bytes()
    assert index.keys == tuple(sample.key for sample in SAMPLES)
    for i, sample in enumerate(SAMPLES):
        spans = index.members(i)
        assert {ext: data[s.offset : s.offset + s.size] for ext, s in spans.items()} == sample.members
        assert all(s.digest == hashlib.sha256(sample.members[e]).digest()[:16] for e, s in spans.items())
        extent = index.extent(i)
        assert extent is not None and checksum(data[extent.start : extent.end]) == extent.checksum


def test_written_saved_and_rebuilt_indexes_are_equal(tmp_path: Path) -> None:
    written = write_shard(tmp_path / "a.tar", SAMPLES)
    loaded, rebuilt = load_index(tmp_path / "a.tar"), build_index(tmp_path / "a.tar")
    assert written.digest == loaded.digest == rebuilt.digest
    assert [loaded.members(i) for i in range(len(loaded))] == [
        rebuilt.members(i) for i in range(len(rebuilt))
    ]
    assert loaded.position(SAMPLES[7].key) == 7 and loaded.position("nowhere") is None


def test_the_summary_is_in_the_first_bytes(tmp_path: Path) -> None:
    index = write_shard(tmp_path / "a.tar", SAMPLES)
    head = index_path(tmp_path / "a.tar").read_bytes()[:1000]
    assert summarize_index(head, name="a")[:3] == (
        len(SAMPLES),
        (tmp_path / "a.tar").stat().st_size,
        index.digest,
    )


def test_an_index_is_compact(tmp_path: Path) -> None:
    index = write_shard(
        tmp_path / "a.tar", [Sample(f"{i:06}", {"jpg": b"x" * 999, "txt": b"t"}) for i in range(2000)]
    )
    assert (
        index_path(tmp_path / "a.tar").stat().st_size / len(index) < 64
    )  # 48 of them are hashes and checksums


@given(st.text("ab./_é", min_size=1, max_size=12))
def test_names_are_split_as_webdataset_splits_them(name: str) -> None:
    from webdataset.tariterators import base_plus_ext

    key, extension = base_plus_ext(name)
    expected = None if key is None else (key, extension.lower())
    if "__" not in name:
        assert split_name(name) == expected


def test_samples_are_grouped_as_webdataset_groups_them(tmp_path: Path) -> None:
    names = ["a.jpg", "a.txt", "b.seg.png", "b.TXT", "nodot", "c.jpg", "folder/c.jpg", "a.cls"]
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in names:
            tar.addfile(tarfile.TarInfo(name))
    index = build_index(tmp_path / "x.tar")
    ours = [(key, set(index.members(i))) for i, key in enumerate(index.keys)]
    theirs = [
        (sample["__key__"], {name for name in sample if not name.startswith("__")})
        for sample in webdataset.WebDataset(str(tmp_path / "x.tar"), shardshuffle=False)
    ]
    assert ours == theirs


def test_members_with_something_between_them_have_no_extent(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in ("a.jpg", "nodot", "a.txt", "b.jpg"):
            tar.addfile(tarfile.TarInfo(name))
    index = build_index(tmp_path / "x.tar")
    assert index.extent(0) is None and index.extent(1) is not None


def test_damage_is_refused_or_noted_as_asked(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", SAMPLES)
    data = bytearray((tmp_path / "a.tar").read_bytes())
    data[3 * 512] ^= 1
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(ShardError, match="damaged at byte"):
        build_index(tmp_path / "a.tar")
    assert len(build_index(tmp_path / "a.tar", strict=False).damage) == 1


@pytest.mark.parametrize("content", [b"", b"hello, no tar " * 100, MAGIC * 200])
def test_a_file_that_is_no_tar_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(ShardError, match=r"a\.tar: no tar archive"):
        build_index(tmp_path / "a.tar", strict=False)


def test_every_flipped_byte_of_an_index_is_noticed(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", SAMPLES[:3])
    data = index_path(tmp_path / "a.tar").read_bytes()
    for position in range(0, len(data), 5):
        broken = bytearray(data)
        broken[position] ^= 4
        with pytest.raises(ShardError, match="clipstack data index"):
            decode_index(bytes(broken), name="a.tar.idx")


def test_an_unknown_version_is_refused_with_the_fix(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", SAMPLES[:3])
    data = index_path(tmp_path / "a.tar").read_bytes()
    with pytest.raises(ShardError, match="version 99, this clipstack reads 1; delete it"):
        decode_index(data[:8] + struct.pack("<I", 99) + data[12:], name="a.tar.idx")


@pytest.mark.parametrize(
    "sample", [Sample("a.b", {"jpg": b""}), Sample("a", {"JPG": b""}), Sample("", {"jpg": b""})]
)
def test_keys_that_readers_would_split_elsewhere_are_refused(tmp_path: Path, sample: Sample) -> None:
    with (
        pytest.raises(ShardError, match="is no name for a member"),
        ShardWriter(tmp_path / "a.tar") as writer,
    ):
        writer.add(sample)
    assert list(tmp_path.iterdir()) == []
