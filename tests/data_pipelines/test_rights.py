"""A removal list says exactly what it removes, or is refused."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from data_pipelines.errors import DataError
from data_pipelines.rights import load_removal_list, removed_samples, rights_of, shard_urls
from tests.data_pipelines.making import jpeg, plain_shard

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
