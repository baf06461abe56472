"""The training benchmarks: both trainers get the same job, and their logs are read alike."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import quality, quality_arms, quality_report, train
from benchmarks.figures import alternating, logged_seconds, steady_rate
from benchmarks.quality import Task
from benchmarks.quality_arms import ARMS
from benchmarks.running import Ran, hidden, run
from benchmarks.trainers import (
    Job,
    StepLine,
    export_peer,
    our_command,
    our_line,
    peer_arguments,
    peer_command,
    peer_line,
)
from clipstack.checkpoint import load_model
from clipstack.config import load_recipe, parse_recipe
from clipstack.model import build_model
from clipstack.towers import open_clip_weights
from clipstack.training.trainer import lr_at

PEER_LOG_LINE = (
    "2026-11-22,05:40:00 | INFO | Train Epoch: 1 [1024/19968 (5%)] Data (t): 0.008 Batch (t): 0.301, "
    "425.249/s, 425.249/s/gpu LR: 0.000053 Logit Scale: 14.285 Contrastive_loss: 4.8520 (4.8535) "
    "Loss: 4.8519 (4.8535)"
)
TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
}
RECIPE: dict[str, Any] = {
    "seed": 3,
    "model": TINY,
    "data": {"train": "shards/{00000..00003}.tar", "workers": 2, "augment": {"crop_scale": [0.6, 1.0]}},
    "train": {"steps": 20, "batch_size": 8, "precision": "bf16"},
    "optim": {"lr": 1e-3, "betas": [0.9, 0.95], "weight_decay": 0.1, "warmup_fraction": 0.25},
    "log": {"every_steps": 1},
}


def a_run(lines: list[StepLine], arrived_s: list[float]) -> Ran:
    return Ran(lines, arrived_s, wall_s=9.0, cpu_s=9.0, command=["x"], log=Path("x"))


def steps_at(rate: float, count: int) -> list[StepLine]:
    return [StepLine(step, rate, loss=1.0, scale=14.0) for step in range(1, count + 1)]


def test_the_peers_own_parser_reads_the_recipes_values() -> None:
    params = pytest.importorskip("open_clip_train.params", reason="open_clip_train is not installed")
    args = params.parse_args(["--model", "x", *peer_arguments(Job(RECIPE, num_epochs=2))])
    assert (args.batch_size, args.train_num_samples, args.epochs, args.workers) == (8, 80, 2, 2)
    assert (args.lr, args.beta1, args.beta2, args.wd, args.eps) == (1e-3, 0.9, 0.95, 0.1, 1e-6)
    assert (args.precision, args.grad_clip_norm, args.seed, args.warmup) == ("amp_bf16", 1.0, 3, 5)
    assert args.aug_cfg == {"scale": (0.6, 1.0)}
    assert (args.log_every_n_steps, args.device, args.lr_scheduler) == (1, "cpu", "cosine")


def test_both_learning_rates_are_the_same_at_every_step() -> None:
    scheduler = pytest.importorskip("open_clip_train.scheduler", reason="open_clip_train is not installed")
    recipe = parse_recipe(RECIPE)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    schedule = scheduler.cosine_lr(optimizer, 1e-3, 5, 20)
    for step in range(20):
        schedule(step)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(lr_at(step, recipe.optim, 20), rel=1e-12)


def test_the_peer_is_not_asked_for_what_it_would_round(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="epochs"):
        peer_arguments(Job(RECIPE, num_epochs=3))
    with pytest.raises(ValueError, match="multiple of its workers"):
        peer_arguments(Job(RECIPE, num_epochs=4))
    with pytest.raises(ValueError, match="CPU"):
        peer_command(Job(RECIPE, ranks=2), tmp_path, python="python")


def test_a_step_of_a_later_epoch_is_counted_on() -> None:
    found = peer_line(PEER_LOG_LINE, batch_size=128)
    assert found == StepLine(step=156 + 8, rate=425.249, loss=4.8519, scale=14.285)
    assert peer_line("2026-11-22,05:40:00 | INFO | Start epoch 1", batch_size=128) is None


def test_our_line_gives_the_scale_itself_and_passes_over_events() -> None:
    values = {"step": 7, "samples_per_s": 80.0, "loss": 2.0, "clip_loss": 1.5, "logit_scale": math.log(20)}
    found = our_line(json.dumps(values))
    assert found is not None
    assert (found.step, found.rate, found.loss) == (7, 80.0, 1.5)
    assert found.scale == pytest.approx(20)
    assert our_line(json.dumps({"event": "step_skipped", "step": 8, "message": "x"})) is None


def test_our_command_writes_a_recipe_with_the_values_asked_for(tmp_path: Path) -> None:
    _, log = our_command(Job(RECIPE), tmp_path)
    recipe = load_recipe(tmp_path / "recipe.toml")
    assert recipe.run.dir == log.parent
    expected = parse_recipe({**RECIPE, "run": {"dir": str(log.parent)}})
    assert recipe == expected


def test_the_steady_rate_leaves_out_both_ends() -> None:
    arrived = [10.0, 20.0, 21.0, 22.0, 23.0, 23.1]
    ran = a_run(steps_at(1.0, 6), arrived)
    assert steady_rate(ran, batch_size=32, skip=1, tail=1) == pytest.approx(32.0)
    with pytest.raises(ValueError, match="too few"):
        steady_rate(ran, batch_size=32, skip=5, tail=1)


def test_logged_seconds_need_a_line_for_each_step() -> None:
    assert logged_seconds(steps_at(16.0, 5), batch_size=32) == pytest.approx(10.0)
    with pytest.raises(ValueError, match="one line for each step"):
        logged_seconds(steps_at(16.0, 5)[::2], batch_size=32)


def test_rounds_alternate_the_order() -> None:
    assert list(alternating(["a", "b"], 3)) == [(0, "a"), (0, "b"), (1, "b"), (1, "a"), (2, "a"), (2, "b")]


def test_lines_are_read_whole_from_a_log_that_grows_in_pieces(tmp_path: Path) -> None:
    log = tmp_path / "run" / "log"
    log.parent.mkdir()
    program = (
        "import sys\n"
        "out = open(sys.argv[1], 'w')\n"
        "for step in range(1, 4):\n"
        "    for piece in (str(step), '0', '\\n'):\n"
        "        out.write(piece); out.flush()\n"
        "sum(range(10**6))\n"
    )
    command = [sys.executable, "-c", program, str(log)]
    ran = run(command, log, lambda line: StepLine(int(line), 1.0, 1.0, 1.0), Job(RECIPE))
    assert [line.step for line in ran.lines] == [10, 20, 30]
    assert ran.arrived_s == sorted(ran.arrived_s)
    assert ran.cpu_s > 0
    assert ran.arrived_s[-1] <= ran.wall_s


def test_a_trainer_that_fails_is_an_error_with_its_last_words(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit('out of luck')"]
    with pytest.raises(RuntimeError, match="out of luck"):
        run(command, tmp_path / "run" / "log", our_line, Job(RECIPE))


def test_kept_logs_do_not_tell_where_they_were_made() -> None:
    folders = {"REPO": Path("/home/me/code"), "RUN": Path("/home/me/code/runs/x"), "DATA": Path("/data")}
    text = "--logs /home/me/code/runs/x/logs --train-data /data/a.tar /home/me/code/train.py"
    assert hidden(text, folders) == "--logs RUN/logs --train-data DATA/a.tar REPO/train.py"


def test_the_peers_checkpoint_becomes_a_model_with_the_same_features(tmp_path: Path) -> None:
    model = build_model(parse_recipe(RECIPE).model, seed=5).eval()
    weights = {f"module.{name}": value for name, value in open_clip_weights(model.towers).items()}
    torch.save({"epoch": 1, "state_dict": weights}, tmp_path / "epoch_1.pt")
    loaded = load_model(export_peer(tmp_path / "epoch_1.pt", TINY, tmp_path / "out"))
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([[49406, 320, 49407, 0, 0, 0, 0, 0]])
    with torch.no_grad():
        torch.testing.assert_close(loaded.model.encode_image(images), model.encode_image(images))
        torch.testing.assert_close(loaded.model.encode_text(tokens), model.encode_text(tokens))


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_is_a_valid_recipe_for_both_data_sets(arm: str) -> None:
    for data in ("cifar10", "shapes"):
        recipe = parse_recipe(quality.recipe_of(Task(arm, 2, "samples", data), Path("data"), steps=30))
        assert (recipe.seed, recipe.train.steps, recipe.log.every_steps, recipe.data.val) == (2, 30, 1, None)


@pytest.mark.parametrize("name", train.CASES)
def test_every_case_is_a_valid_recipe_and_a_job_for_the_peer(name: str, tmp_path: Path) -> None:
    case = train.CASES[name]
    recipe = train.recipe_of(case, "shards/{00000..00015}.tar", seed=1)
    assert parse_recipe(recipe).train.batch_size == case.batch_size
    assert case.skip + case.tail < case.steps - 1
    command, _ = peer_command(Job(recipe, device=case.device), tmp_path, python="python")
    assert "--train-num-samples" in command


def test_the_arm_like_open_clip_differs_in_what_open_clip_cannot_do_alone() -> None:
    base = parse_recipe(quality.recipe_of(Task("clip", 0), Path("data"), steps=30))
    like = parse_recipe(quality.recipe_of(Task("like_open_clip", 0), Path("data"), steps=30))
    assert base.data.augment.hflip and base.objective.mask_duplicates
    assert not like.data.augment.hflip and not like.objective.mask_duplicates
    same = {"data", "objective"}
    assert base.model_dump(exclude=same) == like.model_dump(exclude=same)


def test_changing_a_recipe_leaves_the_given_one_as_it_is() -> None:
    table = {"a": {"b": 1}}
    assert quality.changed(table, {"a.c.d": 2}) == {"a": {"b": 1, "c": {"d": 2}}}
    assert table == {"a": {"b": 1}}


def test_an_arm_twice_as_fast_gets_twice_the_steps() -> None:
    assert quality.steps_in_time({"cpu_s": 50.0, "steps": 1560}, {"cpu_s": 100.0, "steps": 1560}) == 3120


def test_runs_at_equal_time_come_after_those_at_equal_samples(tmp_path: Path) -> None:
    args = quality.parse_arguments(["--out", str(tmp_path), "--open-clip", "python", "--seeds", "2"])
    first, second = quality.plan(args)
    assert {task.budget for task in first} == {"samples"}
    assert len(first) == 2 * len(quality_arms.CORE)
    assert {task.arm for task in second} == set(quality.IN_EQUAL_TIME)


def test_the_interval_of_a_mean_is_students() -> None:
    from scipy.stats import sem, t

    values = [0.50, 0.53, 0.55]
    low, high = t.interval(0.95, 2, loc=np.mean(values), scale=sem(values))
    found = quality_report.mean_interval(values)
    assert found.mean - found.half == pytest.approx(low)
    assert found.mean + found.half == pytest.approx(high)
    assert math.isinf(quality_report.mean_interval([0.5]).half)


def test_the_report_pairs_ours_by_seed() -> None:
    def result(arm: str, seed: int, top1: float) -> dict[str, Any]:
        figures = {"values": {"top1": top1}, "samples": 1, "train_s": 1.0, "cpu_s": 1.0}
        return {**asdict(Task(arm, seed)), **figures}

    # Seeds differ by ten points, the arms within a seed by exactly one.
    ours = [result("clip", seed, 0.4 + 0.1 * seed) for seed in range(3)]
    hard = [result("hard_negative", seed, 0.41 + 0.1 * seed) for seed in range(3)]
    table = quality_report.report(
        [*ours, *hard, *(result("open_clip", seed, 0.39 + 0.01 * seed) for seed in range(3))]
    )
    row = next(line for line in table.splitlines() if line.startswith("| hard_negative"))
    assert "| +1.0 ± 0.0 |" in row
    assert "| +11.0 ± 24.5 |" in row  # Welch, with the spread of the seeds
