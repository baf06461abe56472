"""Every kind of damage is found, named with its sample, and costs no more samples than it hit."""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
import webdataset

from data_pipelines.cli import main
from data_pipelines.index import Sample, build_index, load_index, write_shard
from data_pipelines.index.shard_index import index_path
from data_pipelines.tar import TarWriter
from data_pipelines.verify import ShardCheck, VerifyOptions, check_shard
from tests.data_pipelines.making import SHARED_DATA, contents, huge_png, image_folder, jpeg, plain_shard

COUNT = 20


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    path = tmp_path / "a.tar"
    plain_shard(path, range(COUNT))
    return path


def check(tar: Path) -> ShardCheck:
    return check_shard(tar, VerifyOptions())


def place(tar: Path, sample: int, extension: str, *, header: bool = False) -> int:
    span = build_index(tar).members(sample)[extension]
    return span.header_offset if header else span.offset


def overwrite(tar: Path, offset: int, data: bytes) -> None:
    with open(tar, "r+b") as file:
        file.seek(offset)
        file.write(data)


def flip(tar: Path, offset: int) -> None:
    with open(tar, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))


def flip_header_of_image_7(tar: Path) -> None:
    flip(tar, place(tar, 7, "jpg", header=True) + 3)


def zero_a_block_over_header_of_image_7(tar: Path) -> None:
    overwrite(tar, place(tar, 7, "jpg", header=True), bytes(512))


def zero_1024_bytes_over_header_of_image_7(tar: Path) -> None:
    overwrite(tar, place(tar, 7, "jpg", header=True), bytes(1024))


def cut_at_a_member_boundary(tar: Path) -> None:
    with open(tar, "r+b") as file:
        file.truncate(place(tar, 12, "jpg", header=True))


def cut_inside_a_payload(tar: Path) -> None:
    with open(tar, "r+b") as file:
        file.truncate(place(tar, 12, "jpg") + 100)


def flip_payload_of_image_7(tar: Path) -> None:
    flip(tar, place(tar, 7, "jpg") + 300)


def flip_caption_of_7(tar: Path) -> None:
    flip(tar, place(tar, 7, "txt") + 2)


Damage = Callable[[Path], None]

DAMAGES: list[Damage] = [
    flip_header_of_image_7,
    zero_a_block_over_header_of_image_7,
    zero_1024_bytes_over_header_of_image_7,
    cut_at_a_member_boundary,
    cut_inside_a_payload,
    flip_payload_of_image_7,
    flip_caption_of_7,
]
ONLY_AN_INDEX_CAN_KNOW = (flip_payload_of_image_7, flip_caption_of_7)
TAIL = set(range(12, COUNT))

# Damage, whether there is an index, and the samples that are lost for good. Without an index nobody can know
# where a member begins whose header is gone.
CASES: list[tuple[Damage, bool, set[int]]] = [
    (flip_header_of_image_7, True, set()),
    (flip_header_of_image_7, False, {7}),
    (zero_a_block_over_header_of_image_7, True, set()),
    (zero_a_block_over_header_of_image_7, False, {7}),
    (zero_1024_bytes_over_header_of_image_7, True, {7}),
    (zero_1024_bytes_over_header_of_image_7, False, {7}),
    (cut_at_a_member_boundary, True, TAIL),
    (cut_at_a_member_boundary, False, TAIL),
    (cut_inside_a_payload, True, TAIL),
    (cut_inside_a_payload, False, TAIL),
    (flip_payload_of_image_7, True, {7}),
    (flip_caption_of_7, True, {7}),
]


def test_a_sound_shard_has_no_findings_with_and_without_index(tar: Path) -> None:
    assert check(tar) == ShardCheck(str(tar), COUNT, COUNT, ())
    index_path(tar).unlink()
    assert check(tar) == ShardCheck(str(tar), COUNT, COUNT, ())


@pytest.mark.parametrize(("damage", "indexed", "lost"), CASES, ids=lambda x: getattr(x, "__name__", str(x)))
def test_damage_is_found_and_repair_saves_all_the_rest(
    tar: Path, tmp_path: Path, damage: Damage, indexed: bool, lost: set[int]
) -> None:
    originals = {
        sample["__key__"]: sample["jpg"] for sample in webdataset.WebDataset(str(tar), shardshuffle=False)
    }
    damage(tar)
    if not indexed:
        index_path(tar).unlink()
    assert check(tar).findings
    assert main(["verify", str(tar), "--repair", str(tmp_path / "saved"), "--processes", "1"]) == 1
    saved = tmp_path / "saved/a.tar"
    read = {
        sample["__key__"]: sample["jpg"] for sample in webdataset.WebDataset(str(saved), shardshuffle=False)
    }
    assert set(originals) - set(read) == {f"{i:06}" for i in lost}
    assert all(originals[key] == data for key, data in read.items())
    assert not check(saved).findings


def test_the_lost_sample_is_named_with_kind_and_place(tar: Path) -> None:
    flip_payload_of_image_7(tar)
    (finding,) = check(tar).findings
    assert (finding.kind, finding.key, finding.offset) == ("payload", "000007", place(tar, 7, "jpg"))


def test_zeros_inside_a_jpeg_are_found_without_an_index(tmp_path: Path) -> None:
    write_shard(
        tmp_path / "a.tar", [Sample(f"{i}", {"jpg": jpeg(i, 400, 300), "txt": b"x"}) for i in range(5)]
    )
    overwrite(tmp_path / "a.tar", place(tmp_path / "a.tar", 3, "jpg") + 4096, bytes(1024))
    index_path(tmp_path / "a.tar").unlink()
    assert [(f.kind, f.key) for f in check(tmp_path / "a.tar").findings] == [("image", "3")]


def test_images_that_are_none_or_too_large_are_found(tmp_path: Path) -> None:
    images = {
        "good": jpeg(1),
        "html": b"<html>no</html>",
        "huge": huge_png(),
        "cut": jpeg(2)[:300],
        "none": b"",
    }
    write_shard(tmp_path / "a.tar", [Sample(key, {"jpg": data, "txt": b"x"}) for key, data in images.items()])
    found = check(tmp_path / "a.tar")
    assert {f.key for f in found.findings} == {"html", "huge", "cut", "none"}
    assert {f.kind for f in found.findings} == {"image"}
    assert "pixels" in next(f.detail for f in found.findings if f.key == "huge")
    assert found.sound == 1


def test_missing_members_are_found(tmp_path: Path) -> None:
    samples = [Sample(f"ok{i}", {"jpg": jpeg(i), "txt": b"x", "cls": b"1"}) for i in range(3)]
    samples += [
        Sample("no-image", {"txt": b"x"}),
        Sample("no-caption", {"jpg": jpeg(7), "cls": b"1"}),
        Sample("empty-caption", {"jpg": jpeg(8), "txt": b" \n", "cls": b"1"}),
        Sample("json-caption", {"jpg": jpeg(9), "json": b'{"caption": "a cat"}'}),
    ]
    write_shard(tmp_path / "a.tar", samples)
    found = check(tmp_path / "a.tar")
    assert {(f.key, f.kind) for f in found.findings} == {
        ("no-image", "missing-member"),
        ("no-caption", "missing-member"),
        ("empty-caption", "missing-member"),
    }


def test_classification_shards_without_captions_are_sound(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", [Sample(f"{i}", {"webp": jpeg(i), "cls": b"3"}) for i in range(4)])
    assert not check(tmp_path / "a.tar").findings


@pytest.mark.parametrize("apart", [True, False])
def test_duplicate_keys_are_found_next_to_each_other_and_apart(tmp_path: Path, apart: bool) -> None:
    order = ["a", "b", "a"] if apart else ["a", "a", "b"]
    with TarWriter(tmp_path / "a.tar") as writer:
        for i, key in enumerate(order):
            writer.add(f"{key}.jpg", jpeg(i))
            writer.add(f"{key}.txt", b"x")
        writer.commit()
    found = check(tmp_path / "a.tar")
    assert [(f.kind, f.key) for f in found.findings] == [("duplicate-key", "a")]
    assert (
        main(["verify", str(tmp_path / "a.tar"), "--repair", str(tmp_path / "saved"), "--processes", "1"])
        == 1
    )
    assert load_index(tmp_path / "saved/a.tar").keys == ("a", "b")


def test_members_that_leave_the_archive_are_found(tmp_path: Path) -> None:
    (tmp_path / "evil.jpg").write_bytes(jpeg(1))
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(tmp_path / "evil.jpg", "../../evil.jpg")
    findings = check(tmp_path / "a.tar").findings
    assert any("leaves the archive" in f.detail for f in findings)


def test_index_of_another_shard_and_damaged_index_are_found(tar: Path, tmp_path: Path) -> None:
    plain_shard(tmp_path / "b.tar", range(50, 50 + COUNT))
    shutil.copy(index_path(tmp_path / "b.tar"), index_path(tar))
    kinds = {f.kind for f in check(tar).findings}
    assert kinds & {"payload", "index"}
    index_path(tar).write_bytes(index_path(tar).read_bytes()[:-1] + b"?")
    assert {f.kind for f in check(tar).findings} == {"index"}


def test_table_that_disagrees_is_found(tmp_path: Path) -> None:
    image_folder(tmp_path / "in", 4)
    assert main(["build", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "--processes", "1"]) == 0
    path = tmp_path / "out/00000.parquet"
    metadata = {"clipstack.table": pl.read_parquet_metadata(path)["clipstack.table"]}
    pl.read_parquet(path)[:-1].write_parquet(path, metadata=metadata)
    (finding,) = check(tmp_path / "out/00000.tar").findings
    assert (finding.kind, finding.key) == ("table", "000000003")


def test_table_hashes_find_payload_damage_where_there_is_no_index(tmp_path: Path) -> None:
    image_folder(tmp_path / "in", 4)
    assert main(["build", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "--processes", "1"]) == 0
    tar = tmp_path / "out/00000.tar"
    index_path(tar).unlink()
    flip(tar, place(tar, 2, "jpg") + 500)
    assert ("payload", "000000002") in {(f.kind, f.key) for f in check(tar).findings}


def test_json_lists_every_finding_and_exit_code_tells(tar: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tar), "--json", "--processes", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["findings"] == []
    flip_payload_of_image_7(tar)
    assert main(["verify", str(tar), "--json", "--processes", "1"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert (result["samples"], result["sound"], result["damaged_shards"]) == (COUNT, COUNT - 1, 1)
    assert result["findings"][0]["key"] == "000007"


def test_decode_share_and_none(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", [Sample(f"{i}", {"jpg": b"no image", "txt": b"x"}) for i in range(10)])
    for every, expected in ((1, 10), (5, 2), (0, 0)):
        assert len(check_shard(tmp_path / "a.tar", VerifyOptions(decode_every=every)).findings) == expected


def test_a_file_that_is_no_tar_is_one_finding_not_a_crash(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.tar").write_bytes(b"not a tar at all" * 100)
    (tmp_path / "b.tar").write_bytes(b"")
    assert main(["verify", str(tmp_path), "--processes", "1"]) == 1
    out = capsys.readouterr().out
    assert "a.tar: structure" in out
    assert "b.tar: structure" in out


def test_a_place_that_cannot_be_written_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shard(tmp_path / "a.tar", [Sample("0", {"jpg": jpeg(1), "txt": b"x"})])
    (tmp_path / "file").write_text("")
    assert main(["verify", str(tmp_path / "a.tar"), "--repair", str(tmp_path / "file" / "saved")]) == 2
    assert "--repair" in capsys.readouterr().err


def test_repair_never_writes_over_shards(
    tar: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(tar), "--repair", str(tmp_path), "--processes", "1"]) == 2
    assert "name a new folder" in capsys.readouterr().err


def test_every_corruption_of_real_data_is_found(tmp_path: Path) -> None:
    source = SHARED_DATA / "cifar10/val-00000.tar"
    if not source.exists():
        pytest.skip("needs ../shared/data/cifar10")
    sound = tmp_path / "sound.tar"
    shutil.copyfile(source, sound)
    before = contents(tmp_path)
    for damage in DAMAGES:
        for indexed in (True, False):
            tar = tmp_path / "work/x.tar"
            tar.parent.mkdir(exist_ok=True)
            shutil.copyfile(sound, tar)
            index_path(tar).unlink(missing_ok=True)
            if indexed:
                assert main(["index", str(tar), "--processes", "1"]) == 0
            damage(tar)
            if indexed or damage not in ONLY_AN_INDEX_CAN_KNOW:
                assert check_shard(tar, VerifyOptions(decode_every=0)).findings, damage.__name__
    assert contents(tmp_path)["sound.tar"] == before["sound.tar"]
