"""A removal list says exactly what it removes, or is refused."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pytest

from data_pipelines.errors import DataError
from data_pipelines.index import Sample, write_shard
from data_pipelines.rights import load_removal_list, removed_samples, rights_of, shard_urls
from data_pipelines.stream.samples import ReadOptions, parse_sample
from data_pipelines.table import describe
from tests.data_pipelines.making import encoded, jpeg, picture, plain_shard

DIGEST = hashlib.sha256(jpeg(2)).hexdigest()


def test_each_kind_of_entry_matches_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "remove.txt"
    file.write_text(
        f"# by request\n\nsha256:{DIGEST.upper()}\nkey:a.tar/000004\n  url:https://example.org/x?y#z  \n"
    )
    removal = load_removal_list(file)
    assert len(removal) == 3
    assert removal.match(sha256=DIGEST) == f"sha256:{DIGEST.upper()}"
    assert removal.match(sha256=hashlib.sha256(b"").hexdigest()) is None
    assert removal.match(key="a.tar/000004", sha256="0" * 64)
    assert removal.match(key="b.tar/000004") is None
    assert removal.match(url="https://example.org/x?y#z")
    assert removal.match(url="https://example.org/x") is None
    index = plain_shard(tmp_path / "a.tar", range(6))
    assert removed_samples(removal, index, shard_name="a.tar") == {
        2: f"sha256:{DIGEST.upper()}",
        4: "key:a.tar/000004",
    }
    urls = {"000001": "https://example.org/x?y#z"}
    assert set(removed_samples(removal, index, shard_name="b.tar", urls=urls)) == {1, 2}


@pytest.mark.parametrize(
    "line", ["sha256:12", "sha256:" + "g" * 64, "key:000001", "key:a/", "url:", "cat.jpg", "SHA:x"]
)
def test_a_line_that_says_nothing_known_is_refused_with_its_number(tmp_path: Path, line: str) -> None:
    (tmp_path / "r.txt").write_text(f"# one\n{line}\n")
    with pytest.raises(DataError, match="line 2"):
        load_removal_list(tmp_path / "r.txt")


def test_digest_depends_on_the_entries_alone(tmp_path: Path) -> None:
    (tmp_path / "a").write_text(f"key:a/b\nsha256:{DIGEST}\n")
    (tmp_path / "b").write_text(f"# other order\nsha256:{DIGEST.upper()}\nkey:a/b\n")
    (tmp_path / "c").write_text("key:a/b\n")
    a, b, c = (load_removal_list(tmp_path / name).digest for name in "abc")
    assert a == b != c


def test_rights_come_under_every_usual_spelling() -> None:
    assert rights_of({"license": "CC0", "URL": "u", "author": 7, "source": "", "other": 1}) == {
        "licence": "CC0", "url": "u", "author": "7"
    }  # fmt: skip


def test_shards_without_a_table_have_no_urls(tmp_path: Path) -> None:
    plain_shard(tmp_path / "a.tar", range(2))
    assert shard_urls(tmp_path / "a.tar") == {}


@pytest.mark.parametrize("order", [("jpg", "png"), ("png", "jpg")])
def test_of_two_images_all_take_the_same_whatever_comes_first(tmp_path: Path, order: tuple[str, str]) -> None:
    """Training, the table, and both ways to remove a sample by its image."""
    payloads = {"jpg": jpeg(1), "png": encoded(picture(2), "PNG")}
    members = {**{extension: payloads[extension] for extension in order}, "txt": b"two"}
    index = write_shard(tmp_path / "a.tar", [Sample("0", members)])
    meant = hashlib.sha256(payloads["jpg"]).hexdigest()
    assert parse_sample("a.tar/0", members, ReadOptions()).image == payloads["jpg"]
    assert describe(Sample("0", members))["sha256"] == meant
    list_file = tmp_path / "removed.txt"
    list_file.write_text(f"sha256:{meant}\n")
    assert list(removed_samples(load_removal_list(list_file), index, shard_name="a.tar")) == [0]


def test_urls_that_nothing_can_read_are_an_error_with_the_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # as if it were not installed
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(DataError, match=r"a\.parquet.*pip install '\.\[data\]'"):
        shard_urls(tmp_path / "a.tar")
