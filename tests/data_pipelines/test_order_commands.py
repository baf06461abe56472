"""`clipstack data order` and `clipstack data replay` as users call them."""

from __future__ import annotations

import io
import json
import os
import resource
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipstack.config.models import AugmentConfig, DataConfig
from clipstack.loading.train_loader import TrainLoader
from clipstack.preprocess import Preprocess
from clipstack.world import World
from data_pipelines.cli import main
from data_pipelines.index import Sample, write_shard
from data_pipelines.order import OrderParams
from data_pipelines.replay import read_recipe, replay, step_ranges

SIZES = (9, 2, 14, 5)
N = sum(SIZES)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard, size in enumerate(SIZES):
        rows = []
        for i in range(size):
            pixels = np.random.default_rng(shard * 100 + i).integers(0, 256, (20, 30, 3), dtype=np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "PNG")
            record = json.dumps({"captions": [f"{shard} {i} a", f"{shard} {i} b"]}).encode()
            rows.append(Sample(f"{i:03}", {"png": buffer.getvalue(), "json": record}))
        write_shard(folder / f"{shard}.tar", rows)
    return folder


def order(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[dict[str, object]]:
    assert main(["order", *map(str, arguments), "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_order_prints_an_object_for_each_batch_and_rank(
    shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = order(capsys, "--data", shards, "--batch-size", 6, "--seed", 1, "--batches", 15, "--world-size", 3)
    assert [(row["batch"], row["rank"]) for row in rows] == [(b, r) for b in range(15) for r in range(3)]
    keys = [key for row in rows for key in row["keys"]]  # type: ignore[attr-defined]
    assert set(Counter(keys).values()) == {3} and len(set(keys)) == N
    assert keys[0].split("/")[0] in {f"{shard}.tar" for shard in range(4)}
    assert [row["epoch"] for row in rows] == [2 * i // N for i in range(45)]
    assert {tuple(row) for row in rows} == {("batch", "rank", "epoch", "keys")}


def test_order_from_the_middle_continues(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ("--data", shards, "--seed", 1, "--world-size", 2)
    whole = order(capsys, *common, "--batch-size", 6, "--batches", 8)
    later = order(capsys, *common, "--batch-size", 6, "--batches", 5, "--start-sample", 18)
    assert later == whole[6:]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--batch-size", "5", "--world-size", "2"], "--batch-size 5: not divisible"),
        (["--batch-size", "0"], "must be at least 1"),
        (["--batch-size", "x"], "no whole number"),
        (["--batch-size", "2", "--start-sample", "1" + 20 * "0"], "must lie in 0 .. 2^62"),
        (["--batch-size", "2", "--seed", "-1"], "must lie in 0 .. 2^62"),
    ],
)
def test_wrong_numbers_are_refused_in_one_line(
    shards: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["order", "--data", str(shards), "--seed", "1", "--batches", "1", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_missing_shards_are_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (tmp_path / "none", tmp_path):
        code = main(["order", "--data", str(path), "--seed", "1", "--batches", "1", "--batch-size", "2"])
        assert code == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_recipes_and_the_command_line_share_their_defaults() -> None:
    config = DataConfig(train="x")
    assert OrderParams() == OrderParams(0, config.lanes, config.window_shards, config.quantum)


def make_run(folder: Path, shards: Path) -> Path:
    run = folder / "run"
    run.mkdir()
    (run / "recipe.toml").write_text(
        f"""
        seed = 4
        [data]
        train = "{shards}"
        lanes = 2
        [data.augment]
        crop_scale = [0.3, 0.6]
        crop_ratio = [0.8, 1.2]
        hflip = true
        [train]
        steps = 9
        batch_size = 8
        """
    )
    return run


def test_replay_shows_what_the_loader_gave_the_step(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path, shards)
    augment = AugmentConfig(crop_scale=(0.3, 0.6), crop_ratio=(0.8, 1.2), hflip=True)
    preprocess = Preprocess(
        image_size=(16, 16), mean=(0.5,) * 3, std=(0.5,) * 3, context_length=12, augment=augment
    )
    loader = TrainLoader(
        DataConfig(train=str(shards), lanes=2, workers=0),
        preprocess=preprocess,
        batch_size=8,
        world=World(),
        seed=4,
        quarantine_path=None,
    )
    batch = next(loader.iterate(4 * 8))
    assert main(["replay", str(run), "--step", "5", "--json", "--html", str(tmp_path / "page.html")]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["key"] for row in rows] == batch.keys
    assert batch.tokens.equal(preprocess.tokenize([row["caption"] for row in rows]))
    # The crops are the loader's own: cut and mirror the stored pixels by hand and resize as it does.
    plain = Preprocess(
        image_size=(16, 16), mean=(0.5,) * 3, std=(0.5,) * 3, augment=AugmentConfig(crop_scale=(1, 1))
    )
    for i, seen in enumerate(replay(read_recipe(run), 32, 40)):
        top, left, height, width = seen.geometry.box
        cropped = seen.drawn.pixels[top : top + height, left : left + width]
        image = resized(plain, cropped)
        assert np.array_equal(image[:, :, ::-1] if seen.geometry.flip else image, batch.images[i].numpy())
    page = (tmp_path / "page.html").read_text()
    assert page.count("<figure ") == 8 and rows[0]["key"] in page


def resized(preprocess: Preprocess, pixels: np.ndarray) -> np.ndarray:
    import torch
    from torchvision.transforms.v2 import functional

    image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    return functional.resize_image(
        image, list(preprocess.image_size), interpolation=preprocess._mode, antialias=True
    ).numpy()


def test_replay_goes_by_the_position_that_the_run_logged(shards: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path, shards)
    assert step_ranges(run, read_recipe(run), 5) == ((32, 40),)
    (run / "metrics.jsonl").write_text(
        '{"step": 4, "samples_seen": 32}\n{"step": 5, "samples_seen": 56}\n{"st'
    )
    assert step_ranges(run, read_recipe(run), 5) == ((48, 56),)


def test_replay_jumps_over_what_roll_backs_left_out(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path, shards)
    (run / "checkpoints" / "step-00000002").mkdir(parents=True)
    state = {"progress": {"skipped_windows": [[4, 12]]}}
    (run / "checkpoints" / "step-00000002" / "state.json").write_text(json.dumps(state))
    assert step_ranges(run, read_recipe(run), 1) == ((0, 4), (12, 16))
    event = '{"event": "rolled_back", "step": 2, "message": "x", "from_step": 3, "skipped_samples": [24, 40]}'
    (run / "metrics.jsonl").write_text(event + "\n")  # of steps in between there is no line
    assert step_ranges(run, read_recipe(run), 3) == ((40, 48),)
    (run / "checkpoints" / "step-00000002" / "state.json").write_text("{")
    assert main(["replay", str(run), "--step", "3"]) == 2
    assert "state.json: cannot be read" in capsys.readouterr().err


def test_a_page_that_cannot_be_written_is_one_line(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path, shards)
    assert main(["replay", str(run), "--step", "1", "--html", str(tmp_path / "none" / "page.html")]) == 2
    assert "--html" in capsys.readouterr().err


@pytest.mark.parametrize(
    "step, message", [("0", "the run has steps 1 to 9"), ("10", "the run has steps 1 to 9")]
)
def test_a_step_outside_the_run_is_refused(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], step: str, message: str
) -> None:
    assert main(["replay", str(make_run(tmp_path, shards)), "--step", step]) == 2
    assert message in capsys.readouterr().err
    assert main(["replay", str(tmp_path), "--step", "1"]) == 2
    assert "no run folder" in capsys.readouterr().err


def test_the_data_core_imports_no_torch_and_nothing_of_clipstack() -> None:
    code = (
        "import sys, data_pipelines.commands.order, data_pipelines.commands.replay, data_pipelines.cache\n"
        "print([name for name in sys.modules if name.split('.')[0] in ('torch', 'clipstack', 'webdataset')])"
    )
    root = Path(__file__).resolve().parents[2]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.strip() == "[]"
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0
