"""Tar walking and writing, against the standard library's tarfile."""

from __future__ import annotations

import io
import random
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.errors import ShardError
from data_pipelines.tar import BLOCK, MAX_MEMBER_BYTES, Damage, Member, TarWriter, checksum, walk

FILES = [
    (f"{i:03}.{ext}", bytes([i, i + 1]) * size) for i in range(8) for ext, size in (("jpg", 700), ("txt", 9))
]


def tar_bytes(files: list[tuple[str, bytes]], format_: int = tarfile.GNU_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format_) as tar:
        for name, payload in files:
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))
    return buffer.getvalue()


def members(data: bytes) -> list[Member]:
    return [item for item in walk(io.BytesIO(data)) if isinstance(item, Member)]


def damage(data: bytes) -> list[Damage]:
    return [item for item in walk(io.BytesIO(data)) if isinstance(item, Damage)]


@pytest.mark.parametrize("format_", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@given(
    names=st.lists(
        st.text("abcdé", min_size=1, max_size=70).flatmap(
            lambda stem: st.sampled_from([stem, f"{stem}/{stem}", f"{stem}.jpg"])
        ),
        unique=True,
        max_size=6,
    ),
    data=st.data(),
)
@settings(max_examples=30, deadline=None)
def test_walk_finds_what_tarfile_finds(format_: int, names: list[str], data: st.DataObject) -> None:
    files = [(name, data.draw(st.binary(max_size=1500))) for name in names]
    archive = tar_bytes(files, format_)
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        expected = [(info.name, info.offset_data, info.size) for info in tar if info.isreg()]
    assert [(m.name, m.offset, m.size) for m in members(archive)] == expected
    assert [m.payload for m in members(archive)] == [payload for _, payload in files]
    assert damage(archive) == []


def test_long_pax_and_gnu_names_are_read() -> None:
    files = [("d" * 150 + "/" + "k" * 120 + ".jpg", b"x" * 10)]
    for format_ in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        assert [(m.name, m.payload) for m in members(tar_bytes(files, format_))] == files


def test_folders_and_links_are_passed_over() -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        info = tarfile.TarInfo("a.jpg")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    assert [m.name for m in members(buffer.getvalue())] == ["a.jpg"]


def test_writer_makes_what_tarfile_reads_and_the_same_bytes_each_time(tmp_path: Path) -> None:
    files = [*FILES, ("deep/" * 40 + "long-name" * 12 + ".png", b"p" * 513)]
    for name in ("a.tar", "b.tar"):
        with TarWriter(tmp_path / name) as writer:
            for member, payload in files:
                writer.add(member, payload)
            writer.commit()
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    with tarfile.open(tmp_path / "a.tar") as tar:
        infos = tar.getmembers()
        assert [(info.name, tar.extractfile(info).read()) for info in infos] == files  # type: ignore[union-attr]
    assert {(info.mtime, info.uid, info.gid, info.mode, info.uname) for info in infos} == {
        (0, 0, 0, 0o644, "")
    }


def test_writer_reports_the_places_that_the_walk_finds(tmp_path: Path) -> None:
    with TarWriter(tmp_path / "a.tar") as writer:
        written = [writer.add(name, payload) for name, payload in [*FILES, ("n" * 300 + ".txt", b"t")]]
        writer.commit()
    assert members((tmp_path / "a.tar").read_bytes()) == written


def test_a_shard_that_is_not_finished_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), TarWriter(tmp_path / "a.tar") as writer:
        writer.add("a.txt", b"a")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_checksum_of_a_run_is_the_sum_of_its_parts() -> None:
    blocks = random.Random(0).randbytes(6 * BLOCK)
    parts = sum(checksum(blocks[i : i + 2 * BLOCK]) for i in range(0, len(blocks), 2 * BLOCK))
    assert checksum(blocks) == parts % 2**64


def test_each_flipped_header_byte_is_reported_and_the_other_members_stay() -> None:
    archive = tar_bytes(FILES)
    victim = members(archive)[5]
    for position in range(0, BLOCK, 7):
        broken = bytearray(archive)
        broken[victim.header_offset + position] ^= 0x11
        items = list(walk(io.BytesIO(bytes(broken))))
        names = [item.name for item in items if isinstance(item, Member)]
        assert [item.offset for item in items if isinstance(item, Damage)] == [victim.header_offset], position
        assert names == [name for name, _ in FILES if name != victim.name], position


def test_a_zeroed_kilobyte_over_headers_is_reported_and_later_members_stay() -> None:
    archive = bytearray(tar_bytes(FILES))
    second = members(bytes(archive))[1]
    archive[second.header_offset : second.header_offset + 1024] = bytes(1024)
    items = list(walk(io.BytesIO(bytes(archive))))
    assert [item.offset for item in items if isinstance(item, Damage)] == [second.header_offset]
    assert [item.name for item in items if isinstance(item, Member)] == [
        n for n, _ in FILES if n != second.name
    ]


@pytest.mark.parametrize(
    "where", ["between members", "inside a payload", "inside a header", "one end block left"]
)
def test_a_cut_archive_is_reported(where: str) -> None:
    archive = tar_bytes(FILES)
    sixth = members(archive)[6]
    end = members(archive)[-1].offset + BLOCK
    cut = {
        "between members": sixth.header_offset,
        "inside a payload": sixth.offset + 100,
        "inside a header": sixth.header_offset + 100,
        "one end block left": end + BLOCK,
    }[where]
    found = damage(archive[:cut])
    assert len(found) == 1 and "cut" in found[0].reason
    assert len(members(archive[:cut])) == (len(FILES) if where == "one end block left" else 6)


@pytest.mark.parametrize("name", ["/etc/passwd.jpg", "../x.jpg", "a/../../x.jpg", "n" * 2000 + ".jpg"])
def test_names_that_leave_the_archive_or_are_absurdly_long_are_refused(name: str, tmp_path: Path) -> None:
    archive = tar_bytes([("good.jpg", b"1"), (name, b"2"), ("later.jpg", b"3")])
    assert [m.name for m in members(archive)] == ["good.jpg", "later.jpg"]
    assert len(damage(archive)) == 1
    with pytest.raises(ShardError), TarWriter(tmp_path / "a.tar") as writer:
        writer.add(name, b"2")


def test_a_member_over_the_size_limit_is_refused_without_being_read() -> None:
    info = tarfile.TarInfo("huge.jpg")
    info.size = MAX_MEMBER_BYTES + 1
    archive = info.tobuf(tarfile.GNU_FORMAT) + bytes(2048)
    found = damage(archive)
    assert "over the limit" in found[0].reason and "cut" in found[1].reason


@given(st.binary(max_size=4000))
@settings(max_examples=60, deadline=None)
def test_bytes_that_are_no_archive_never_break_the_walk(data: bytes) -> None:
    assert members(data) == []


@given(position=st.integers(0, len(tar_bytes(FILES)) - 1), change=st.integers(1, 255))
@settings(max_examples=150, deadline=None)
def test_one_flipped_byte_changes_at_most_one_member(position: int, change: int) -> None:
    archive = bytearray(tar_bytes(FILES))
    sound = members(bytes(archive))
    archive[position] ^= change
    left = members(bytes(archive))
    assert len([m for m in left if m in sound]) >= len(sound) - 1
