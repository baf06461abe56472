"""stats, filter, dedup and reshard: numbers against plain counting, output against what went in."""

from __future__ import annotations

import io
import itertools
import json
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_pipelines.cli import main
from data_pipelines.dedup import (
    DedupOptions,
    char_grams,
    close_hashes,
    drop_greedily,
    find_duplicates,
    normalized,
    similar_texts,
)
from data_pipelines.errors import DataError
from data_pipelines.filter import PRESETS, select
from data_pipelines.index import Sample, load_index, write_shard
from data_pipelines.inputs.shards import expand_shards
from data_pipelines.progress import Progress
from data_pipelines.shard_rows import FRAME_SCHEMA, read_rows
from data_pipelines.stats import compute_stats, histogram
from tests.data_pipelines.making import contents, encoded, image_folder, jpeg, picture, plain_shard


def run(*args: str | Path) -> int:
    return main([*map(str, args), "--processes", "1"])


def samples_of(folder: Path) -> dict[str, dict[str, bytes]]:
    out = {}
    for tar in sorted(folder.glob("*.tar")):
        for sample in webdataset.WebDataset(str(tar), shardshuffle=False):
            out[f"{tar.name}/{sample['__key__']}"] = {k: v for k, v in sample.items() if k[0] != "_"}
    return out


def table(rows: list[dict[str, object]]) -> pl.DataFrame:
    full = [{**dict.fromkeys(FRAME_SCHEMA), "place": i, **row} for i, row in enumerate(rows)]
    return pl.DataFrame(full, schema=FRAME_SCHEMA)


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Two shards, the second with repeats of the first: the same bytes, a smaller copy, the same caption."""
    folder = tmp_path / "mixed"
    plain_shard(folder / "a.tar", range(5))
    small = encoded(picture(1).resize((24, 18)), quality=70)
    write_shard(
        folder / "b.tar",
        [
            Sample("new", {"jpg": jpeg(20), "txt": b"something new altogether"}),
            Sample("same", {"jpg": jpeg(0), "txt": b"other words for it"}),
            Sample("smaller", {"jpg": small, "txt": b"a smaller copy of one"}),
            Sample("caption", {"png": encoded(picture(30), "PNG"), "txt": b"Picture number 3!"}),
        ],
    )
    return folder


# ---- stats -----------------------------------------------------------------------------------------


def test_stats_agree_with_counting_by_hand(mixed: Path) -> None:
    stats = compute_stats(read_rows(expand_shards([str(mixed)]), phash=False), num_shards=2)
    read = samples_of(mixed)
    sizes = [Image.open(io.BytesIO(s.get("jpg") or s["png"])).size for s in read.values()]
    assert (stats.shards, stats.samples, stats.unusable) == (2, 9, 0)
    assert stats.duplicate_images == 1
    assert stats.duplicate_captions == 0
    assert stats.image_bytes == sum(len(s.get("jpg") or s["png"]) for s in read.values())
    assert dict(stats.formats.top) == {"jpg": 8, "png": 1}
    assert stats.spreads["width"].mean == pytest.approx(np.mean([w for w, _ in sizes]))
    words = [len(s["txt"].split()) for s in read.values()]
    assert stats.spreads["caption words"].quantiles[0] == min(words)
    assert stats.spreads["caption words"].quantiles[-1] == max(words)
    assert stats.rights["licence"].missing == 9


def test_stats_are_the_same_from_tables_and_from_images(mixed: Path, tmp_path: Path) -> None:
    assert run("reshard", mixed, "-o", tmp_path / "out") == 0
    plain = compute_stats(read_rows(expand_shards([str(mixed)]), phash=True), num_shards=1)
    tables = compute_stats(read_rows(expand_shards([str(tmp_path / "out")]), phash=True), num_shards=1)
    assert plain == tables


def test_stats_count_images_that_cannot_be_read(tmp_path: Path) -> None:
    write_shard(
        tmp_path / "a.tar",
        [Sample("a", {"jpg": b"no"}), Sample("b", {"txt": b"alone"}), Sample("c", {"jpg": jpeg(1)})],
    )
    stats = compute_stats(read_rows([tmp_path / "a.tar"], phash=False), num_shards=1)
    assert (stats.samples, stats.unusable, stats.without_caption) == (1, 2, 1)


def test_stats_command_prints_a_table_json_and_a_page(
    mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    assert run("stats", mixed, "--html", page) == 0
    assert re.search(r"samples +9 in 2 shards", capsys.readouterr().out)
    assert run("stats", mixed, "--json") == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 9
    text = page.read_text()
    assert text.count("<figure") == 9
    assert "http" not in text.replace("http-equiv", "")  # nothing from the network
    assert "<script" not in text


def test_stats_page_escapes_captions(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", [Sample("a", {"jpg": jpeg(1), "txt": b"<script>alert(1)</script>"})])
    assert run("stats", tmp_path / "a.tar", "--html", tmp_path / "p.html") == 0
    assert "<script" not in (tmp_path / "p.html").read_text()


@given(st.lists(st.integers(-50, 50), min_size=1), st.booleans())
def test_histogram_counts_every_value_once(values: list[int], whole: bool) -> None:
    column = pl.Series(values) if whole else pl.Series([v / 7 for v in values])
    assert sum(count for _, _, count in histogram(column)) == len(values)


# ---- filter ----------------------------------------------------------------------------------------


def test_filter_rules_mean_what_they_say() -> None:
    rng = random.Random(0)
    rows: list[dict[str, object]] = [
        {"width": rng.randint(50, 800), "height": rng.randint(50, 800), "caption_words": rng.randint(0, 9),
         "caption_chars": rng.randint(0, 30), "language": rng.choice(["en", "de", None])}
        for _ in range(300)
    ]  # fmt: skip
    for row in rows:
        row |= {"original_width": row["width"], "original_height": row["height"]}
    selection = select(table(rows), PRESETS["datacomp-basic"])

    def meets(row: dict[str, object]) -> list[bool]:
        w, h = int(str(row["width"])), int(str(row["height"]))
        words, chars = int(str(row["caption_words"])), int(str(row["caption_chars"]))
        return [row["language"] == "en", words > 2, chars > 5,
                min(w, h) >= 200, max(w, h) / min(w, h) <= 3]  # fmt: skip

    assert selection.places == tuple(i for i, row in enumerate(rows) if all(meets(row)))
    for rule, count in enumerate(selection.counts):
        assert count.passed == sum(meets(row)[rule] for row in rows)
        assert count.only_this_dropped == sum(not meets(row)[rule] and sum(meets(row)) == 4 for row in rows)


@pytest.mark.parametrize(
    ("rule", "message"),
    [("widht > 3", "did you mean width"), ("width + 3", "no condition"), ("width >", "rule")],
)
def test_wrong_rules_are_refused(rule: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        select(table([{"width": 3}]), [rule])


def test_filter_writes_the_samples_that_meet_all_rules_unchanged(mixed: Path, tmp_path: Path) -> None:
    assert (
        run(
            "filter",
            mixed,
            "--rule",
            "width >= 40",
            "--rule",
            "caption like 'picture%'",
            "-o",
            tmp_path / "out",
        )
        == 0
    )
    before = samples_of(mixed)
    after = samples_of(tmp_path / "out")
    assert list(after.values()) == [s for k, s in before.items() if k.startswith("a.tar")]
    report = json.loads((tmp_path / "out/filter.json").read_text())
    assert (report["samples"], report["kept"]) == (9, 5)


def test_filter_knows_languages(tmp_path: Path) -> None:
    captions = ["a photo of a small brown dog in the garden", "ein kleiner brauner Hund sitzt in dem Garten",
                "un petit chien brun assis dans le jardin"]  # fmt: skip
    write_shard(
        tmp_path / "a.tar",
        [Sample(f"{i}", {"jpg": jpeg(i), "txt": caption.encode()}) for i, caption in enumerate(captions)],
    )
    assert (
        run("filter", tmp_path / "a.tar", "--rule", "language in ('en', 'fr')", "-o", tmp_path / "out") == 0
    )
    out = pl.read_parquet(tmp_path / "out/00000.parquet")
    assert dict(zip(out["key"], out["language"], strict=True)) == {"0": "en", "2": "fr"}


def test_filter_dry_run_writes_nothing_and_an_empty_result_is_an_error(mixed: Path, tmp_path: Path) -> None:
    assert run("filter", mixed, "--rule", "width > 5", "--dry-run") == 0
    assert run("filter", mixed, "--rule", "width > 5000", "-o", tmp_path / "out") == 2
    assert run("filter", mixed, "--rule", "width > 5") == 2
    assert not (tmp_path / "out").exists()


# ---- dedup -----------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 2**64 - 1), max_size=12), st.integers(0, 8), st.randoms(use_true_random=False))
def test_close_hashes_are_those_of_brute_force(values: list[int], max_bits: int, rng: random.Random) -> None:
    near = [v ^ sum(1 << rng.randrange(64) for _ in range(rng.randrange(9))) for v in values]
    hashes = [f"{v % 2**64:016x}" for v in values + near + values[:2]]
    found = close_hashes(hashes, max_bits)
    exact = {
        (i, j) for i, j in itertools.combinations(range(len(hashes)), 2)
        if (int(hashes[i], 16) ^ int(hashes[j], 16)).bit_count() <= max_bits
    }  # fmt: skip
    pairs = {(i, j) for i, j, _ in found}
    assert pairs <= exact
    # Of rows with one and the same hash the first stands for all: what is close to it is close to them.
    first = {h: hashes.index(h) for h in hashes}
    assert {(first[hashes[i]], first[hashes[j]]) for i, j in exact} - {
        (i, i) for i in range(len(hashes))
    } <= {p for i, j in pairs for p in ((i, j), (j, i))}
    assert all(
        (i, hashes.index(hashes[i])) in {(j, i) for i, j in pairs}
        for i in range(len(hashes))
        if hashes.index(hashes[i]) != i
    )


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.floats(0, 1)), max_size=30))
def test_greedy_dropping_keeps_someone_close_for_everyone_dropped(
    triples: list[tuple[int, int, float]],
) -> None:
    pairs = [(min(i, j), max(i, j), d) for i, j, d in triples if i != j]
    dropped = drop_greedily(10, pairs)
    gone = {d.dropped for d in dropped}
    near = {(i, j) for i, j, _ in pairs}
    assert all(d.kept not in gone and (d.kept, d.dropped) in near for d in dropped)
    kept = set(range(10)) - gone
    assert not any(i in kept and j in kept for i, j in near)


@pytest.mark.parametrize("similarity", [0.5, 0.8, 1.0])
def test_similar_texts_are_those_of_brute_force(similarity: float) -> None:
    rng = random.Random(3)
    words = ["red", "blue", "dog", "cat", "house", "tree", "small", "large", "running", "near", "under", "on"]
    texts = [" ".join(rng.choices(words, k=8)) for _ in range(150)]
    texts += [t.replace("dog", "dogs").upper() for t in texts[:40]] + [texts[0] + "!", "", "  "]
    grams = [char_grams(normalized(t)) for t in texts]
    jaccard = {
        (i, j): len(grams[i] & grams[j]) / len(grams[i] | grams[j])
        for i, j in itertools.combinations(range(len(texts)), 2)
    }
    exact = {pair for pair, value in jaccard.items() if value >= similarity}
    found = {(i, j) for i, j, _ in similar_texts(texts, similarity)}
    assert found <= exact
    dropped = {j for _, j in found}
    assert len({j for _, j in exact} - dropped) <= 0.02 * len(exact)


def test_dedup_by_each_kind_drops_what_repeats(mixed: Path, tmp_path: Path) -> None:
    expected = {
        ("exact",): {"same"},
        ("perceptual",): {"same", "smaller"},
        ("text",): {"caption"},
        ("exact", "perceptual", "text"): {"same", "smaller", "caption"},
    }
    for number, (kinds, gone) in enumerate(expected.items()):
        out = tmp_path / str(number)
        arguments = [a for kind in kinds for a in ("--by", kind)]
        assert run("dedup", mixed, *arguments, "--max-bits", "8", "--similarity", "0.99", "-o", out) == 0
        keys = {key.split("/")[1] for key in samples_of(out)}
        assert {key.split("/")[1] for key in samples_of(mixed)} - keys == gone, kinds
        log = [json.loads(line) for line in (out / "duplicates.jsonl").read_text().splitlines()]
        assert {entry["dropped"] for entry in log} == {f"b.tar/{key}" for key in gone}
        assert all(entry["kept"].startswith("a.tar/") for entry in log)


@pytest.mark.parametrize(
    "arguments, report",
    [(("dedup", "--by", "exact"), "duplicates.jsonl"), (("filter", "--rule", "width > 5"), "filter.json")],
)
def test_a_report_that_cannot_be_written_is_one_line(
    mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], report: str
) -> None:
    (tmp_path / "out" / report).mkdir(parents=True)
    command, *options = arguments
    assert run(command, mixed, *options, "-o", tmp_path / "out") == 1
    assert f"{report}: cannot be written: Is a directory" in capsys.readouterr().err


def test_keep_largest_prefers_the_larger_picture() -> None:
    rows: list[dict[str, object]] = [
        {"phash": "0" * 16, "sha256": f"{i}", "original_width": size, "original_height": size}
        for i, size in enumerate((100, 300, 200))
    ]
    found = find_duplicates(table(rows), DedupOptions(by=("perceptual",), keep="largest"))
    assert [(d.dropped, d.kept) for d in found] == [(0, 1), (2, 1)]


# ---- reshard ---------------------------------------------------------------------------------------


def test_reshard_keeps_every_sample_every_member_and_key(mixed: Path, tmp_path: Path) -> None:
    assert (
        run("reshard", mixed, "-o", tmp_path / "out", "--samples-per-shard", "4", "--shuffle-seed", "1") == 0
    )
    before, after = samples_of(mixed), samples_of(tmp_path / "out")
    assert [len(load_index(p)) for p in sorted((tmp_path / "out").glob("*.tar"))] == [4, 4, 1]
    assert {k.split("/")[1]: s for k, s in before.items()} == {k.split("/")[1]: s for k, s in after.items()}
    assert [k.split("/")[1] for k in before] != [k.split("/")[1] for k in after]


def test_reshard_by_size_never_exceeds_it(tmp_path: Path) -> None:
    plain_shard(tmp_path / "in/a.tar", range(30), cls=b"1")
    assert run("reshard", tmp_path / "in", "-o", tmp_path / "out", "--shard-size", "20KB") == 0
    tars = sorted((tmp_path / "out").glob("*.tar"))
    assert len(tars) > 1
    assert sum(len(load_index(p)) for p in tars) == 30
    for tar in tars:
        index = load_index(tar)
        assert sum(512 + int(size) + -int(size) % 512 for size in index.size) <= 20_000


def test_reshard_can_shrink_images_and_leaves_the_rest(tmp_path: Path) -> None:
    plain_shard(tmp_path / "in/a.tar", range(4), cls=b"7", npy=b"\x00\x01")
    assert run("reshard", tmp_path / "in", "-o", tmp_path / "out", "--size", "20", "--format", "png") == 0
    for sample in samples_of(tmp_path / "out").values():
        assert list(sample) == ["png", "txt", "cls", "npy"]
        assert Image.open(io.BytesIO(sample["png"])).size == (27, 20)
        assert (sample["cls"], sample["npy"]) == (b"7", b"\x00\x01")


def test_reshard_of_shards_that_share_keys_loses_none(tmp_path: Path) -> None:
    plain_shard(tmp_path / "in/a.tar", range(3))
    plain_shard(tmp_path / "in/b.tar", range(3))
    assert run("reshard", tmp_path / "in", "-o", tmp_path / "out") == 0
    keys = load_index(tmp_path / "out/00000.tar").keys
    assert keys == ("000000", "000001", "000002", "000000-1", "000001-1", "000002-1")


def test_removal_by_key_hash_and_url_holds_through_generations(tmp_path: Path) -> None:
    image_folder(tmp_path / "images", 6)
    rows = [{"path": f"images/{i:03}.jpg", "caption": "x", "url": f"https://e.org/{i}"} for i in range(6)]
    pl.DataFrame(rows).write_csv(tmp_path / "d.csv")
    assert run("build", tmp_path / "d.csv", "-o", tmp_path / "one") == 0
    hashes = pl.read_parquet(tmp_path / "one/00000.parquet")["sha256"].to_list()
    (tmp_path / "r1.txt").write_text(f"key:00000.tar/000000001\nurl:https://e.org/2\nsha256:{hashes[3]}\n")
    assert run("reshard", tmp_path / "one", "-o", tmp_path / "two", "--remove", tmp_path / "r1.txt") == 0
    assert [k.split("/")[1][-1] for k in samples_of(tmp_path / "two")] == ["0", "4", "5"]
    log = [json.loads(line) for line in (tmp_path / "two/removed.jsonl").read_text().splitlines()]
    assert [entry["origin"][-1] for entry in log] == ["1", "2", "3"]
    (tmp_path / "r2.txt").write_text("url:https://e.org/4\n")
    assert (
        run(
            "reshard",
            tmp_path / "two",
            "-o",
            tmp_path / "three",
            "--remove",
            tmp_path / "r2.txt",
            "--size",
            "20",
        )
        == 0
    )
    assert [k.split("/")[1][-1] for k in samples_of(tmp_path / "three")] == ["0", "5"]


def test_rights_columns_survive_reshard_filter_and_dedup(tmp_path: Path) -> None:
    image_folder(tmp_path / "images", 4)
    rows = [
        {"path": f"images/{i:03}.jpg", "caption": "x", "licence": f"L{i % 2}", "author": "me"}
        for i in range(4)
    ]
    pl.DataFrame(rows).write_csv(tmp_path / "d.csv")
    assert run("build", tmp_path / "d.csv", "-o", tmp_path / "one", "--source", "here") == 0
    assert run("reshard", tmp_path / "one", "-o", tmp_path / "two") == 0
    assert run("filter", tmp_path / "two", "-o", tmp_path / "three", "--rule", "licence = 'L1'") == 0
    assert run("dedup", tmp_path / "three", "-o", tmp_path / "four") == 0
    out = pl.read_parquet(tmp_path / "four/00000.parquet")
    assert out["licence"].to_list() == ["L1", "L1"]
    assert set(out["author"]) == {"me"}
    assert set(out["source"]) == {"here"}
    assert out["origin"].to_list() == ["d.csv:1", "d.csv:3"]


def test_damaged_input_is_refused_and_names_the_repair(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain_shard(tmp_path / "in/a.tar", range(5))
    with open(tmp_path / "in/a.tar", "r+b") as file:
        file.truncate(6000)
    assert run("reshard", tmp_path / "in", "-o", tmp_path / "out") == 1
    assert "verify --repair" in capsys.readouterr().err


def test_reshard_is_reproducible(mixed: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        assert (
            run("reshard", mixed, "-o", tmp_path / name, "--shuffle-seed", "4", "--samples-per-shard", "2")
            == 0
        )
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_captions_repeat_counts(tmp_path: Path) -> None:
    captions = ["a", "a", "b", "a"]
    write_shard(
        tmp_path / "a.tar",
        [Sample(f"{i}", {"jpg": jpeg(i), "txt": c.encode()}) for i, c in enumerate(captions)],
    )
    stats = compute_stats(read_rows([tmp_path / "a.tar"], phash=False), num_shards=1)
    assert stats.duplicate_captions == len(captions) - len(Counter(captions))


# ---- index and progress ----------------------------------------------------------------------------


def test_index_command_makes_what_is_missing_and_touches_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain_shard(tmp_path / "a.tar", range(3))
    plain_shard(tmp_path / "b.tar", range(4))
    expected = contents(tmp_path)
    (tmp_path / "b.tar.idx").unlink()
    time = (tmp_path / "a.tar.idx").stat().st_mtime_ns
    assert run("index", tmp_path) == 0
    assert "7 samples in 2 shards; indexed now: 1, before: 1" in capsys.readouterr().out
    assert contents(tmp_path) == expected
    assert (tmp_path / "a.tar.idx").stat().st_mtime_ns == time


def test_index_command_refuses_damage_and_a_size_that_differs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("cut.tar", "longer.tar"):
        plain_shard(tmp_path / name, range(3))
    (tmp_path / "cut.tar.idx").unlink()
    with open(tmp_path / "cut.tar", "r+b") as file:
        file.truncate(3000)
    with open(tmp_path / "longer.tar", "ab") as file:
        file.write(bytes(512))
    assert run("index", tmp_path) == 1
    out = capsys.readouterr().out
    assert "cut.tar: damaged at byte" in out
    assert "longer.tar: " in out
    assert not (tmp_path / "cut.tar.idx").exists()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()], ids=["pipe", "terminal"])
def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(stream: io.StringIO) -> None:
    with Progress("work", 3, unit="shards", stream=stream) as progress:
        for _ in range(3):
            progress.advance()
    text = stream.getvalue()
    if stream.isatty():
        assert "\r" in text
        assert "3/3" in text
    else:
        assert text == "work: 3/3 shards\n"
