"""Images and captions in, shards out: every kind of input, the same bytes each time, nothing half-done."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import webdataset
from PIL import Image

from data_pipelines.building import run as build_run
from data_pipelines.building.plan import Job
from data_pipelines.building.reports import ShardReport, report_path
from data_pipelines.cli import main
from data_pipelines.errors import ShardError
from data_pipelines.index import load_index
from tests.data_pipelines.making import REPOSITORY, contents, encoded, image_folder, jpeg, picture


def samples_of(folder: Path) -> list[dict[str, bytes]]:
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    return list(webdataset.WebDataset(urls, shardshuffle=False))


def table_of(folder: Path) -> pl.DataFrame:
    return pl.concat([pl.read_parquet(path) for path in sorted(folder.glob("*.parquet"))])


def build(*args: str | Path) -> int:
    return main(["build", *map(str, args), "--processes", "1"])


def test_folder_with_sidecars_becomes_shards_with_index_and_table(tmp_path: Path) -> None:
    source = image_folder(tmp_path / "in", 7, width=80, height=60)
    assert build(source, "-o", tmp_path / "out", "--size", "32", "--samples-per-shard", "3") == 0
    assert [p.name for p in sorted((tmp_path / "out").glob("*.tar"))] == [
        "00000.tar",
        "00001.tar",
        "00002.tar",
    ]
    read = samples_of(tmp_path / "out")
    assert [s["txt"] for s in read] == [f"picture number {i}".encode() for i in range(7)]
    assert [s["__key__"] for s in read] == ["000000000", "000000001", "000000002", "000010000", "000010001",
                                            "000010002", "000020000"]  # fmt: skip
    table = table_of(tmp_path / "out")
    assert table["origin"].to_list() == [f"{i:03}.jpg" for i in range(7)]
    for sample, row in zip(read, table.iter_rows(named=True), strict=True):
        assert row["sha256"] == hashlib.sha256(sample["jpg"]).hexdigest()
        assert Image.open(io.BytesIO(sample["jpg"])).size == (row["width"], row["height"]) == (43, 32)
        assert (row["original_width"], row["original_height"]) == (80, 60)
        assert row["caption_chars"] == len(sample["txt"])
        assert row["caption_words"] == 3
        assert len(row["phash"]) == 16
    assert sum(len(load_index(p)) for p in (tmp_path / "out").glob("*.tar")) == 7
    assert json.loads((tmp_path / "out/sizes.json").read_text()) == {
        "00000.tar": 3,
        "00001.tar": 3,
        "00002.tar": 1,
    }


def test_output_is_the_same_bytes_for_any_number_of_processes_and_any_file_times(tmp_path: Path) -> None:
    first = image_folder(tmp_path / "a/in", 12, width=60)
    second = tmp_path / "b/in"
    shutil.copytree(first, second)
    for path in second.iterdir():
        os.utime(path, (1, 1))
    options = ["--size", "24", "--samples-per-shard", "3", "--shuffle-seed", "5"]
    assert main(["build", str(first), "-o", str(tmp_path / "one"), *options, "--processes", "1"]) == 0
    assert main(["build", str(second), "-o", str(tmp_path / "two"), *options, "--processes", "3"]) == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_shuffle_seed_permutes_and_another_seed_permutes_otherwise(tmp_path: Path) -> None:
    source = image_folder(tmp_path / "in", 20)
    orders = []
    for seed in ("1", "2"):
        assert build(source, "-o", tmp_path / seed, "--shuffle-seed", seed) == 0
        orders.append([s["txt"] for s in samples_of(tmp_path / seed)])
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(f"picture number {i}".encode() for i in range(20))


def test_class_tree_gets_captions_from_templates_and_labels_like_imagefolder(tmp_path: Path) -> None:
    for name, seeds in (("sea_lion", range(4)), ("ant", range(4, 8))):
        (tmp_path / "in" / name).mkdir(parents=True)
        for seed in seeds:
            (tmp_path / "in" / name / f"{seed}.jpg").write_bytes(jpeg(seed))
    (tmp_path / "templates.txt").write_text("a photo of a {}.\nthe {c}!\n")
    assert build(tmp_path / "in", "-o", tmp_path / "out", "--templates", tmp_path / "templates.txt") == 0
    read = samples_of(tmp_path / "out")
    assert [s["cls"] for s in read] == [b"0"] * 4 + [b"1"] * 4
    assert {s["txt"] for s in read[:4]} <= {b"a photo of a ant.", b"the ant!"}
    assert {s["txt"] for s in read[4:]} <= {b"a photo of a sea lion.", b"the sea lion!"}
    assert len({s["txt"] for s in read}) > 2  # more than one template is used
    assert (tmp_path / "out/classnames.txt").read_text() == "ant\nsea lion\n"


def write_table(path: Path, rows: list[dict[str, object]]) -> Path:
    frame = pl.DataFrame(rows)
    match path.suffix:
        case ".csv":
            frame.write_csv(path)
        case ".tsv":
            frame.write_csv(path, separator="\t")
        case ".json":
            frame.write_json(path)
        case ".jsonl":
            frame.write_ndjson(path)
        case ".parquet":
            frame.write_parquet(path, row_group_size=2)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl", ".parquet"])
def test_tables_with_paths_carry_captions_and_rights(tmp_path: Path, suffix: str) -> None:
    image_folder(tmp_path / "images", 5)
    rows: list[dict[str, object]] = [
        {
            "filepath": f"images/{i:03}.jpg",
            "title": f'he said "{i}", twice',
            "license": "CC-BY-4.0",
            "author": "007",
            "url": f"https://example.org/{i}",
        }
        for i in range(5)
    ]
    table = write_table(tmp_path / f"data{suffix}", rows)
    assert build(table, "-o", tmp_path / "out", "--source", "archive") == 0
    read = samples_of(tmp_path / "out")
    assert [s["txt"].decode() for s in read] == [row["title"] for row in rows]
    assert json.loads(read[3]["json"]) == {
        "author": "007", "licence": "CC-BY-4.0", "source": "archive", "url": "https://example.org/3"
    }  # fmt: skip
    out = table_of(tmp_path / "out")
    assert set(out["licence"]) == {"CC-BY-4.0"}
    assert set(out["author"]) == {"007"}
    assert out["origin"].to_list() == [f"data{suffix}:{i}" for i in range(5)]


@pytest.mark.parametrize("layout", ["binary", "hugging face"])
def test_parquet_with_image_bytes(tmp_path: Path, layout: str) -> None:
    images = [jpeg(i) for i in range(5)]
    values = images if layout == "binary" else [{"bytes": data, "path": None} for data in images]
    schema = {
        "image": pl.Binary if layout == "binary" else pl.Struct({"bytes": pl.Binary, "path": pl.String})
    }
    frame = pl.DataFrame(
        {"image": values, "text": [f"t{i}" for i in range(5)], "n": range(5)}, schema_overrides=schema
    )
    frame.write_parquet(tmp_path / "d.parquet", row_group_size=2)
    assert (
        build(tmp_path / "d.parquet", "-o", tmp_path / "out", "--shuffle-seed", "1", "--label-column", "n")
        == 0
    )
    read = samples_of(tmp_path / "out")
    assert {int(s["cls"]): s["jpg"] for s in read} == dict(enumerate(images))


def test_jsonl_with_base64_images(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"img": base64.b64encode(jpeg(i)).decode(), "captions": [f"one {i}", f"two {i}"]} for i in range(3)
    ]
    table = write_table(tmp_path / "d.jsonl", rows)
    assert build(table, "-o", tmp_path / "out", "--image-encoding", "base64") == 0
    read = samples_of(tmp_path / "out")
    assert [s["jpg"] for s in read] == [jpeg(i) for i in range(3)]
    assert [s["txt"] for s in read] == [b"one 0", b"one 1", b"one 2"]
    assert json.loads(read[1]["json"]) == {"captions": ["one 1", "two 1"]}  # no caption is lost


def test_json_sidecars_bring_caption_and_rights(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").write_bytes(encoded(picture(1), "PNG"))
    (tmp_path / "in/a.json").write_text(json.dumps({"caption": "a café", "licence": "CC0", "other": 1}))
    assert build(tmp_path / "in", "-o", tmp_path / "out") == 0
    (sample,) = samples_of(tmp_path / "out")
    assert sample["txt"].decode() == "a café"
    assert table_of(tmp_path / "out")["licence"].to_list() == ["CC0"]


def test_what_cannot_be_used_is_reported_with_its_reason_and_moves_no_key(tmp_path: Path) -> None:
    source = image_folder(tmp_path / "in", 6)
    (source / "001.jpg").write_bytes(b"<html>not found</html>")
    (source / "002.txt").unlink()
    (source / "003.jpg").write_bytes(jpeg(3)[:150])
    (source / "004.txt").write_text("  \n")
    assert build(source, "-o", tmp_path / "out") == 0
    assert [s["__key__"][-4:] for s in samples_of(tmp_path / "out")] == ["0000", "0005"]
    rejects = [json.loads(line) for line in (tmp_path / "out/rejects.jsonl").read_text().splitlines()]
    assert [r["origin"] for r in rejects] == ["001.jpg", "002.jpg", "003.jpg", "004.jpg"]
    assert [("not an image" in r["reason"], "no caption" in r["reason"]) for r in rejects] == [
        (True, False), (False, True), (False, False), (False, True)
    ]  # fmt: skip
    assert json.loads((tmp_path / "out/build.json").read_text())["report"]["rejected"] == 4


def test_an_interrupted_build_goes_on_where_it_was_and_ends_in_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = image_folder(tmp_path / "in", 9)
    options = ["--samples-per-shard", "2"]
    assert build(source, "-o", tmp_path / "whole", *options) == 0

    build_shard = build_run.build_shard
    seen: list[str] = []

    def failing(job: Job, *args: object) -> ShardReport:
        seen.append(job.name)
        if job.name == "00002.tar" and seen.count("00002.tar") == 1:
            raise ShardError("no space left")
        return build_shard(job, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(build_run, "build_shard", failing)
    assert build(source, "-o", tmp_path / "cut", *options) == 1
    assert not (tmp_path / "cut/build.json").exists()
    assert sorted(p.name for p in (tmp_path / "cut").glob("*.tar")) == ["00000.tar", "00001.tar"]
    assert build(source, "-o", tmp_path / "cut", *options) == 0
    assert seen == ["00000.tar", "00001.tar", "00002.tar", "00002.tar", "00003.tar", "00004.tar"]
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_a_finished_build_run_again_changes_nothing(tmp_path: Path) -> None:
    source = image_folder(tmp_path / "in", 3)
    assert build(source, "-o", tmp_path / "out") == 0
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    assert build(source, "-o", tmp_path / "out") == 0
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()} == times


def test_a_finished_build_whose_shards_are_gone_is_not_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = image_folder(tmp_path / "in", 3)
    assert build(source, "-o", tmp_path / "out") == 0
    (tmp_path / "out" / "00000.tar").unlink()
    assert build(source, "-o", tmp_path / "out") == 2
    assert "00000.tar is gone;" in capsys.readouterr().err


def test_a_report_is_written_once_its_shard_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[str] = []
    fsync = os.fsync

    def note(descriptor: int) -> None:
        name = os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))
        flushed.append(re.sub(r"^\.(.*)\.\d+\.partial$", r"\1", name))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    assert build(image_folder(tmp_path / "in", 3), "-o", tmp_path / "out") == 0
    before = flushed[: flushed.index("00000.tar.json")]
    for name in ("00000.tar", "00000.tar.idx", "00000.parquet"):
        assert "out" in before[before.index(name) :], "and so is its name"
    assert "build.json" in flushed


def test_a_shard_that_was_cut_since_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = image_folder(tmp_path / "in", 3)
    assert build(source, "-o", tmp_path / "whole") == 0
    monkeypatch.setattr(
        build_run, "finish_output", lambda *_: (_ for _ in ()).throw(ShardError("no space left"))
    )
    assert build(source, "-o", tmp_path / "cut") == 1
    monkeypatch.undo()
    os.truncate(tmp_path / "cut" / "00000.tar", 0)
    assert build(source, "-o", tmp_path / "cut") == 0
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_other_options_or_changed_inputs_are_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = image_folder(tmp_path / "in", 3)
    assert build(source, "-o", tmp_path / "out", "--size", "24") == 0
    assert build(source, "-o", tmp_path / "out", "--size", "28") == 2
    assert "{'size': 24}, now {'size': 28}" in capsys.readouterr().err
    (source / "000.jpg").write_bytes(jpeg(99, 50, 50))
    assert build(source, "-o", tmp_path / "out", "--size", "24") == 2
    assert f"{tmp_path / 'out'}: was built from other inputs; name a new folder" in capsys.readouterr().err


def test_a_folder_with_somebody_elses_shards_is_left_alone(tmp_path: Path) -> None:
    source = image_folder(tmp_path / "in", 2)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/x.tar").write_bytes(b"precious")
    assert build(source, "-o", tmp_path / "out") == 2
    assert contents(tmp_path / "out") == {"x.tar": b"precious"}


def test_output_inside_the_input_is_refused(tmp_path: Path) -> None:
    source = image_folder(tmp_path / "in", 2)
    assert build(source, "-o", source / "shards") == 2
    assert not (source / "shards").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["{tmp}/inptu"], "did you mean {tmp}/input?"),
        (["{tmp}/t.csv"], "--image-column"),
        (["{tmp}/t.csv", "--image-column", "fil"], "did you mean 'file'?"),
        (["{tmp}/input", "--quality", "300"], "--quality 300"),
        (["{tmp}/input", "--sise", "3"], "did you mean --size?"),
        (["{tmp}/input", "--remove", "{tmp}/bad.txt"], "line 2"),
        (["{tmp}/input", "--layout", "classes", "--templates", "{tmp}/t.csv"], "has no {}"),
        (["{tmp}/coco.json"], "not a list"),
        (["{tmp}/excel.csv"], "seems to have neither"),
        (["{tmp}/empty"], "no images found"),
        (["{tmp}/bare"], "no captions"),
    ],
)
def test_mistakes_cost_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    image_folder(tmp_path / "input", 1)
    (tmp_path / "empty").mkdir()
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/a.jpg").write_bytes(jpeg(1))
    (tmp_path / "t.csv").write_text(
        "thing,words\na,b\n" if message == "--image-column" else "file,words\na,b\n"
    )
    (tmp_path / "bad.txt").write_text("# list\nsha256:zz\n")
    (tmp_path / "excel.csv").write_text("file;caption\na.jpg;b\n")
    (tmp_path / "coco.json").write_text('{"images": [], "annotations": []}')
    filled = [a.replace("{tmp}", str(tmp_path)) for a in args]
    assert build(*filled, "-o", tmp_path / "out") == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message.replace("{tmp}", str(tmp_path)) in lines[0]
    assert not (tmp_path / "out").exists()


def test_where_nothing_can_be_used_the_first_reason_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t.csv").write_text("file,caption\na.jpg,one\nb.jpg,two\n")
    assert build(tmp_path / "t.csv", "-o", tmp_path / "out") == 1
    assert f"t.csv:0: {tmp_path}/a.jpg cannot be read: No such file" in capsys.readouterr().err


def test_removal_list_keeps_samples_out_and_logs_each(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"file": f"images/{i:03}.jpg", "caption": "x", "url": f"https://example.org/{i}"} for i in range(5)
    ]
    image_folder(tmp_path / "images", 5)
    table = write_table(tmp_path / "d.csv", rows)
    digest = hashlib.sha256(jpeg(3)).hexdigest()
    (tmp_path / "remove.txt").write_text(f"url:https://example.org/1\nsha256:{digest}\n")
    assert build(table, "-o", tmp_path / "out", "--remove", tmp_path / "remove.txt") == 0
    assert [s["jpg"] for s in samples_of(tmp_path / "out")] == [jpeg(i) for i in (0, 2, 4)]
    removed = [json.loads(line) for line in (tmp_path / "out/removed.jsonl").read_text().splitlines()]
    assert removed == [
        {"origin": "d.csv:1", "entry": "url:https://example.org/1"},
        {"origin": "d.csv:3", "entry": f"sha256:{digest}"},
    ]


def start_long_build(tmp_path: Path, processes: str) -> subprocess.Popen[str]:
    """A build of many shards, in another process, that has finished its first: the report stands."""
    source = tmp_path / "in"
    image_folder(source, 1)
    noise = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (900, 900, 3), dtype=np.uint8)))
    for i in range(100):
        (source / f"big{i}.jpg").write_bytes(noise)
        (source / f"big{i}.txt").write_text("noise")
    code = "import sys; from data_pipelines.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code,
               "build", str(source), "-o", str(tmp_path / "out"), "--samples-per-shard", "10",
               "--processes", processes]  # fmt: skip
    process = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not finished_shards(tmp_path / "out") and time.monotonic() < deadline:
        time.sleep(0.02)
    return process


def finished_shards(out: Path) -> list[Path]:
    """Those of a build under way that another start of it will not make again."""
    return [shard for shard in sorted(out.glob("*.tar")) if report_path(out, shard.name).exists()]


@pytest.mark.parametrize("processes", ["1", "2"])
def test_sigterm_stops_with_exit_code_3_and_leaves_no_half_shard(tmp_path: Path, processes: str) -> None:
    process = start_long_build(tmp_path, processes)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 3, err
    assert "the same command goes on from here" in err
    assert not list((tmp_path / "out").glob(".*.partial"))
    assert main(["verify", str(tmp_path / "out"), "--decode", "none", "--processes", "1"]) == 0


def test_a_killed_build_leaves_no_worker_behind_and_is_resumed(tmp_path: Path) -> None:
    process = start_long_build(tmp_path, "2")
    process.kill()
    # Every process of the build holds this end of the pipe: it is at its end when the last of them is gone.
    process.communicate(timeout=60)
    assert not (tmp_path / "out/build.json").exists()
    before = {p: p.stat().st_mtime_ns for p in finished_shards(tmp_path / "out")}
    assert before
    assert build(tmp_path / "in", "-o", tmp_path / "out", "--samples-per-shard", "10") == 0
    assert before.items() <= {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.tar")}.items()
    assert not list((tmp_path / "out").glob(".*"))
    assert main(["verify", str(tmp_path / "out"), "--decode", "none", "--processes", "1"]) == 0
