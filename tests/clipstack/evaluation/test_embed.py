"""`clipstack embed`: the same features as the model gives, shard by shard, resumable, on any number of
ranks."""

from __future__ import annotations

import json
import os
import signal
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from clipstack.checkpoint import load_model
from clipstack.cli import main
from clipstack.evaluation import data as eval_data
from clipstack.evaluation import embedding
from data_pipelines.index import Sample, write_shard
from data_pipelines.sources import expand
from tests.clipstack.evaluation.conftest import NUM_SAMPLES, SHARD_SIZES, captions, png
from tests.clipstack.launching import Zygote


def run(model: Path, data: Path | str, out: Path, *options: object) -> int:
    words = ["embed", "--model", model, "--data", data, "--output", out, "--device", "cpu", "--workers", 0]
    return main([str(word) for word in (*words, *options)])


def content(out: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(out)): file.read_bytes() for file in sorted(out.rglob("*")) if file.is_file()
    }


def test_features_keys_and_captions_are_the_models_and_the_shards(
    model_folders: dict[str, Path], benchmark_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert run(model_folders["trained"], benchmark_folder / "test", out, "--dtype", "fp32") == 0
    images = np.concatenate([np.load(out / "img_emb" / f"img_emb_{k:04}.npy") for k in range(3)])
    texts = np.concatenate([np.load(out / "text_emb" / f"text_emb_{k:04}.npy") for k in range(3)])
    rows = [pq.read_table(out / "metadata" / f"metadata_{k:04}.parquet").to_pylist() for k in range(3)]
    assert [len(some) for some in rows] == list(SHARD_SIZES)
    assert [row["caption"] for some in rows for row in some] == [captions(i)[0] for i in range(NUM_SAMPLES)]
    assert rows[1][0]["image_path"] == f"1.tar/s{SHARD_SIZES[0]:07}"
    loaded = load_model(model_folders["trained"])
    with torch.no_grad():
        for number in (0, 39, 40, 99):
            (tmp_path / "x.png").write_bytes(png(number))
            pixels = loaded.preprocess.eval_image(Image.open(tmp_path / "x.png").convert("RGB"))
            expected = loaded.model.encode_image(pixels[None])[0].numpy()
            assert np.abs(images[number] - expected).max() <= 1e-6
            expected = loaded.model.encode_text(loaded.tokenizer([captions(number)[0]]))[0].numpy()
            assert np.abs(texts[number] - expected).max() <= 1e-6
    half = tmp_path / "half"
    assert run(model_folders["trained"], benchmark_folder / "test", half, "--only", "images") == 0
    stored = np.load(half / "img_emb" / "img_emb_0000.npy")
    assert stored.dtype == np.float16 and not list((half / "text_emb").iterdir())
    assert np.abs(stored - images[: SHARD_SIZES[0]]).max() < 1e-3


def test_ranks_share_the_shards_and_give_the_same_files(
    model_folders: dict[str, Path], benchmark_folder: Path, tmp_path: Path, zygote: Zygote
) -> None:
    words = ["embed", "--model", model_folders["random"], "--data", benchmark_folder / "test"]
    for ranks in (1, 2):
        options = ["--output", tmp_path / str(ranks), "--device", "cpu", "--workers", 0]
        assert zygote.run("clipstack.cli:main", [*words, *options], ranks=ranks).codes == [0] * ranks
    assert content(tmp_path / "1") == content(tmp_path / "2")


def test_a_signal_ends_it_between_shards_and_the_same_command_goes_on(
    model_folders: dict[str, Path],
    benchmark_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = (model_folders["random"], benchmark_folder / "test")
    assert run(*arguments, tmp_path / "whole") == 0
    encode, calls = embedding._encode_images, []

    def encode_then_stop(*args: object) -> object:
        calls.append(None)
        if len(calls) == 3:  # in the second shard: batches of 64 make one a shard, and two of the first
            os.kill(os.getpid(), signal.SIGTERM)
        return encode(*args)

    monkeypatch.setattr(embedding, "_encode_images", encode_then_stop)
    assert run(*arguments, tmp_path / "broken", "--batch-size", 20) == 3
    assert "goes on from there" in capsys.readouterr().err
    done = list((tmp_path / "broken" / "metadata").iterdir())
    assert len(done) == 1 and not [file for file in (tmp_path / "broken").rglob("*.tmp")]
    kept = (tmp_path / "broken" / "img_emb" / "img_emb_0000.npy").stat().st_mtime_ns
    assert run(*arguments, tmp_path / "broken") == 0
    assert (tmp_path / "broken" / "img_emb" / "img_emb_0000.npy").stat().st_mtime_ns == kept
    assert content(tmp_path / "broken").keys() == content(tmp_path / "whole").keys()
    again = np.load(tmp_path / "broken" / "img_emb" / "img_emb_0002.npy")
    assert (again == np.load(tmp_path / "whole" / "img_emb" / "img_emb_0002.npy")).all()


def test_a_folder_belongs_to_one_model_and_precision(
    model_folders: dict[str, Path], benchmark_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, data = tmp_path / "out", benchmark_folder / "test"
    assert run(model_folders["random"], data, out) == 0
    assert run(model_folders["trained"], data, out) == 2
    assert "--model: not what" in capsys.readouterr().err
    assert run(model_folders["random"], data, out, "--dtype", "fp32") == 2
    assert "--dtype: not what" in capsys.readouterr().err
    assert run(model_folders["random"], data, tmp_path) == 2
    assert "holds other files" in capsys.readouterr().err


def test_a_folder_belongs_to_the_content_of_its_shards(
    model_folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Builders call all their first shards 00000.tar."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_shard(tmp_path / name / "00000.tar", [Sample("x", {"png": png(ord(name)), "txt": b"sound"})])
    model, out = model_folders["random"], tmp_path / "out"
    assert run(model, tmp_path / "a", out) == 0
    assert run(model, tmp_path / "b", out) == 2
    assert "is not the shard that" in capsys.readouterr().err
    assert run(model, tmp_path / "a", out) == 0


def test_shards_are_taken_in_the_order_of_their_numbers(
    model_folders: dict[str, Path], tmp_path: Path
) -> None:
    for number in (2, 10):
        write_shard(tmp_path / f"{number}.tar", [Sample("x", {"png": png(number), "txt": b"sound"})])
    assert run(model_folders["random"], tmp_path, tmp_path / "out") == 0
    assert json.loads((tmp_path / "out" / "embed.json").read_text())["shards"] == ["2.tar", "10.tar"]


def test_a_remote_shard_that_cannot_be_read_is_told_and_left_out(
    model_folders: dict[str, Path],
    benchmark_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)  # between attempts
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = f"{{http://127.0.0.1:9/gone.tar,{benchmark_folder / 'test' / '2.tar'}}}"
    assert run(model_folders["random"], data, tmp_path / "out") == 1
    assert "the first: gone.tar: http://127.0.0.1:9/gone.tar" in capsys.readouterr().out
    assert len(np.load(tmp_path / "out" / "img_emb" / "img_emb_0000.npy")) == SHARD_SIZES[2]
    full, _, bad = eval_data._sort_shards(expand(data))
    assert len(full) == 1 and bad[0].shard == "gone.tar"


def test_bad_shards_and_samples_are_told_and_left_out(
    model_folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    write_shard(
        data / "a.tar",
        [Sample("x", {"png": png(0), "txt": b"sound"}), Sample("y", {"png": b"no image", "txt": b"bad"})],
    )
    with tarfile.open(data / "b.tar", "w"):
        pass
    (data / "c.tar").write_bytes(b"")
    assert run(model_folders["random"], data, tmp_path / "out") == 1
    said = capsys.readouterr().out
    assert "1 samples of 3 shards" in said and "left out: 2; the first: a.tar/y" in said
    assert np.load(tmp_path / "out" / "img_emb" / "img_emb_0001.npy").shape == (0, 16)
    assert not (tmp_path / "out" / "metadata" / "metadata_0002.parquet").exists()
    assert json.loads((tmp_path / "out" / "embed.json").read_text())["shards"] == ["a.tar", "b.tar", "c.tar"]
