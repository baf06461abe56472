"""Training as users run it, on two ranks: equal launches, kills and resumes, signals, bad input."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from clipstack.checkpoint import load_model
from clipstack.config import parse_recipe
from clipstack.training.validation import possible_metrics
from tests.clipstack.launching import Zygote, wait_until
from tests.clipstack.training_runs import (
    losses,
    metrics,
    steps_logged,
    steps_saved,
    weights_hash,
    write_shards,
)

JOBS = "tests.clipstack.rank_jobs"
FAULTY = f"{JOBS}:train_with_faults"


@dataclass(frozen=True)
class Trainer:
    """Runs the tiny recipe on two ranks."""

    zygote: Zygote
    recipe: Path

    def arguments(self, run: Path, *overrides: str) -> list[object]:
        return ["--config", self.recipe, f"run.dir={run}", *overrides]

    def train(
        self,
        run: Path,
        *overrides: str,
        ranks: int = 2,
        codes: list[int] | None = None,
        timeout_s: float = 90,
    ) -> str:
        """Train to the end; returns what was printed."""
        ended = self.zygote.train(*self.arguments(run, *overrides), ranks=ranks, timeout_s=timeout_s)
        assert ended.codes == (codes or [0] * ranks), ended.text
        return ended.text


@pytest.fixture(scope="module")
def trainer(zygote: Zygote, tiny_recipe_file: Path) -> Trainer:
    return Trainer(zygote, tiny_recipe_file)


@pytest.fixture(scope="module")
def straight(trainer: Trainer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to."""
    run = tmp_path_factory.mktemp("straight") / "run"
    trainer.train(run)
    return run


def test_a_run_writes_its_folder(straight: Path) -> None:
    lines = metrics(straight)
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert [line["samples_seen"] for line in lines] == [8 * (i + 1) for i in range(12)]
    assert {"loss", "clip_loss", "lr", "logit_scale", "grad_norm"} <= lines[0].keys()
    assert abs(lines[0]["logit_scale"] - 2.659) < 0.01, "the LOG of the scale"
    assert steps_saved(straight) == [8, 12]
    assert (straight / "checkpoints/latest").read_text().strip() == "step-00000012"
    files = {"open_clip_config.json", "open_clip_model.safetensors", "clipstack.json"}
    assert files <= {path.name for path in (straight / "export").iterdir()}


def test_a_finished_run_is_left_as_it_is(trainer: Trainer, straight: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in straight.rglob("*") if p.is_file()}
    assert "finished at step 12" in trainer.train(straight)
    assert {p: p.stat().st_mtime_ns for p in straight.rglob("*") if p.is_file()} == before


def test_equal_launches_give_equal_metrics_and_another_seed_does_not(
    trainer: Trainer, straight: Path, tmp_path: Path
) -> None:
    trainer.train(tmp_path / "again", "data.workers=0")
    assert metrics(tmp_path / "again") == metrics(straight)
    assert weights_hash(tmp_path / "again") == weights_hash(straight)
    trainer.train(tmp_path / "other", "seed=2", "train.steps=2")
    assert losses(tmp_path / "other")[0] != losses(straight)[0]


def test_killed_and_resumed_it_ends_as_if_nothing_had_happened(
    trainer: Trainer, straight: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    for rank, step in ((0, 5), (1, 9)):
        job = trainer.zygote.start_training(*trainer.arguments(run))
        log = run / "metrics.jsonl"
        wait_until(
            lambda step=step, log=log: log.exists() and len(log.read_text().splitlines()) >= step,
            60,
            f"step {step}",
        )
        job.send(rank, signal.SIGKILL)
        ended = job.wait(30)
        assert ended.codes[rank] == -signal.SIGKILL and ended.codes[1 - rank] != 0
    assert "resuming" in trainer.train(run)
    assert metrics(run) == metrics(straight)
    assert weights_hash(run) == weights_hash(straight)


def test_open_clip_alone_loads_the_export_with_the_same_features(straight: Path) -> None:
    import open_clip  # after clipstack, which makes it importable beside a CPU-only torch

    ours = load_model(straight)
    theirs, _, transform = open_clip.create_model_and_transforms(f"local-dir:{straight / 'export'}")
    theirs.eval()
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    tokens = ours.tokenizer(["a thing", "a picture of thing 3", ""])
    with torch.no_grad():
        torch.testing.assert_close(
            ours.model.encode_image(images), theirs.encode_image(images, normalize=True), rtol=0, atol=1e-6
        )
        torch.testing.assert_close(
            ours.model.encode_text(tokens), theirs.encode_text(tokens, normalize=True), rtol=0, atol=1e-6
        )
    assert transform is not None


BAD_INPUT = {
    "train.stesp=3": "train.stesp: unknown key; did you mean train.steps?",
    "train.steps=many": "train.steps = 'many'",
    "data.train=nowhere/part-{0..3}.tar": "data.train = 'nowhere/part-0.tar': no such file or folder; ",
    "data.train=nowhere/part-*.tar": "data.train = 'nowhere/part-*.tar': no shards there; name a .tar file",
    "data.train=README.md": "README.md",
    "data.train=nowhere.tar model.pretrained=later.pt": "data.train = 'nowhere.tar': no such file or folder",
    "data.val=nowhere.tar model.pretrained=later.pt": "data.val = 'nowhere.tar': no such file or folder",
    "train.batch_size=9": "train.batch_size = 9: not divisible by 2 ranks; take 8",
    "model=ViT-B-23": "did you mean 'ViT-B-",
    "run.dir=/proc/nothing": "run.dir = '/proc/nothing'",
}


def test_bad_input_ends_with_one_line_and_code_2(trainer: Trainer, tmp_path: Path) -> None:
    jobs = [
        trainer.zygote.start_training(*trainer.arguments(tmp_path / f"run-{i}", *change.split()))
        for i, change in enumerate(BAD_INPUT)
    ]
    for (change, message), job in zip(BAD_INPUT.items(), jobs, strict=True):
        ended = job.wait(60)
        # Rank 1 may find rank 0 gone before it finds the mistake: then its own code is 1.
        assert ended.codes[0] == 2 and ended.codes[1] in (1, 2), (change, ended.text)
        assert message in ended.logs[0]
        assert ended.logs[0].startswith("error: ") and ended.logs[0].count("\n") == 1, ended.logs[0]
    assert not [*tmp_path.glob("run-*")], "a start that fails leaves nothing behind"


def test_a_run_folder_of_another_recipe_is_refused(trainer: Trainer, straight: Path) -> None:
    before = metrics(straight)
    for change in ("optim.lr=1", "model.embed_dim=32", "data.augment.hflip=false", "seed=5"):
        text = trainer.train(straight, change, codes=[2, 2])
        key = change.split("=")[0]
        assert f"error: {key} = " in text and "train into another run.dir" in text
    assert "--fresh" in trainer.train(straight, "--fresh", codes=[2, 2])
    assert metrics(straight) == before


def test_a_folder_takes_one_launch_at_a_time_and_a_killed_one_frees_it(
    trainer: Trainer, straight: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    argv = trainer.arguments(run, "data.workers=0")
    job = trainer.zygote.start(FAULTY, argv, env=faults(hang=24))
    wait_until(lambda: len(steps_logged(run)) == 2, 60, "two steps")
    second = trainer.zygote.run(f"{JOBS}:train_impatiently", argv)
    assert second.codes == [2, 2], second.text
    assert f"run.dir = {str(run)!r}: another launch is training in this folder" in second.logs[0]
    assert steps_logged(run) == [1, 2], "the first is not disturbed"
    for rank in (0, 1):
        job.send(rank, signal.SIGKILL)
    trainer.train(run, "data.workers=0")
    assert metrics(run) == metrics(straight)
    assert weights_hash(run) == weights_hash(straight)


def test_moved_data_are_the_same_data_and_others_are_refused(
    trainer: Trainer, straight: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    run, moved = tmp_path / "run", tmp_path / "moved"
    shutil.copytree(tiny_shards, moved, ignore=shutil.ignore_patterns("*.idx"))
    others = write_shards(tmp_path / "others", start=1)  # equal names and counts
    ended = trainer.zygote.run(FAULTY, trainer.arguments(run), env=faults(kill=48))
    assert ended.codes[1] == -signal.SIGKILL, ended.text
    recipe = (run / "recipe.toml").read_text()
    text = trainer.train(run, f"data.train={others}/part-*.tar", codes=[2, 2])
    assert "error: data.train (its shards): " in text and "put it back, or take another run.dir" in text
    assert (run / "recipe.toml").read_text() == recipe
    text = trainer.train(run, f"data.train={moved}/part-*.tar")
    assert f"changed since the last start: data.train = '{moved}/part-*.tar'" in text
    assert metrics(run) == metrics(straight)
    assert weights_hash(run) == weights_hash(straight)


def test_data_that_one_rank_does_not_see_end_all(trainer: Trainer, tiny_shards: Path, tmp_path: Path) -> None:
    for folder in ("here", "nothing", "others"):
        (tmp_path / folder).mkdir()
    (tmp_path / "here/shards").symlink_to(tiny_shards)
    write_shards(tmp_path / "others/shards", start=1)
    argv = trainer.arguments(
        tmp_path / "run", "data.train=shards/part-*.tar", "train.collective_timeout_s=60"
    )
    for folder, message in (
        ("nothing", "error: rank 1: data.train = 'shards/part-*.tar': no shards there"),
        ("others", "error: data.train: rank 1 sees other shards than rank 0"),
    ):
        ended = trainer.zygote.run(
            f"{JOBS}:train_with_the_last_rank_elsewhere",
            [tmp_path / folder, *argv],
            cwd=tmp_path / "here",
            timeout_s=30,
        )
        assert ended.codes == [2, 2], ended.text
        assert message in ended.logs[0], ended.text


def faults(**where: object) -> dict[str, str]:
    return {"FAULTS": json.dumps(where)}


def events(run: Path) -> list[dict[str, Any]]:
    return [line for line in metrics(run) if "event" in line]


@pytest.mark.parametrize("stage", [0, pytest.param(1, marks=pytest.mark.slow), 2, 3])
def test_steps_that_are_not_finite_are_skipped_on_all_ranks(
    trainer: Trainer, tmp_path: Path, stage: int
) -> None:
    run = tmp_path / "run"
    argv = trainer.arguments(
        run, "train.steps=6", f"train.zero_stage={stage}", "train.ema_decay=0.9", "data.workers=0"
    )
    ended = trainer.zygote.run(FAULTY, argv, env=faults(nan_image=[16], inf_gradient=[32]))
    assert ended.codes == [0, 0], ended.text
    assert [(e["event"], e["step"]) for e in events(run)] == [("step_skipped", 2), ("step_skipped", 4)]
    assert (
        "the loss is not finite at step 2" in ended.logs[0]
        and "the gradient is not finite at step 4" in ended.logs[0]
    )
    assert [line["step"] for line in metrics(run) if "loss" in line] == [1, 3, 5, 6]
    for export in ("export", "export-ema"):
        model = load_model(run / export).model
        assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_rolled_back_it_leaves_the_bad_data_out_and_a_kill_changes_nothing(
    trainer: Trainer, tmp_path: Path
) -> None:
    """Bad batches end at samples 48 and 56; the checkpoint before them is step 4, at sample 32."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    env = faults(nan_image=[48, 56])
    argv = ["guard.max_skips=2", "data.workers=0"]
    ended = trainer.zygote.run(FAULTY, trainer.arguments(whole, *argv), env=env)
    assert ended.codes == [0, 0], ended.text
    (event,) = events(whole)
    assert (event["event"], event["step"], event["from_step"], event["skipped_samples"]) == (
        "rolled_back",
        4,
        7,
        [32, 56],
    )
    lines = [line for line in metrics(whole) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert [line["samples_seen"] for line in lines] == [8, 16, 24, 32, *range(64, 121, 8)]

    for position in (48, 96):  # before and after the roll-back
        ended = trainer.zygote.run(
            FAULTY, trainer.arguments(killed, *argv), env=faults(nan_image=[48, 56], kill=position)
        )
        assert ended.codes[1] == -signal.SIGKILL, ended.text
    assert trainer.zygote.run(FAULTY, trainer.arguments(killed, *argv), env=env).codes == [0, 0]
    assert metrics(killed) == metrics(whole)
    assert weights_hash(killed) == weights_hash(whole)


@pytest.mark.parametrize(
    "objective", ["queue_size=16", pytest.param("individual_temperature=true", marks=pytest.mark.slow)]
)
def test_a_roll_back_restores_the_average_and_the_objectives_state(
    trainer: Trainer, tmp_path: Path, objective: str
) -> None:
    """As if the data that it leaves out had never been there; and a kill on the way changes nothing."""
    rolled, killed, reference = (tmp_path / name for name in ("rolled", "killed", "reference"))
    argv = [
        f"objective={{name='clip', {objective}}}", "train.ema_decay=0.9", "guard.max_skips=1",
        "data.workers=0",
    ]  # fmt: skip
    for run, where in (
        (rolled, {"nan_image": [56]}),
        (killed, {"nan_image": [56], "kill": 96}),
        (killed, {"nan_image": [56]}),
        (reference, {"leave_out": [[32, 56]]}),
    ):
        ended = trainer.zygote.run(FAULTY, trainer.arguments(run, *argv), env=faults(**where))
        assert ("kill" in where) == (ended.codes[1] != 0), ended.text
    assert [event["event"] for event in events(rolled)] == ["rolled_back"]
    assert metrics(killed) == metrics(rolled)
    assert losses(rolled) == losses(reference) and len(losses(reference)) == 12
    state = "checkpoints/step-00000012/objective.safetensors"
    assert load_file(reference / state), "there is a state to compare"
    for run in (rolled, killed):
        assert (run / state).read_bytes() == (reference / state).read_bytes()
        for export in ("export", "export-ema"):
            assert weights_hash(run, export) == weights_hash(reference, export)


def test_a_roll_back_that_cannot_cut_the_log_ends_all_ranks(trainer: Trainer, tmp_path: Path) -> None:
    argv = trainer.arguments(
        tmp_path / "run", "guard.max_skips=1", "data.workers=0", "train.collective_timeout_s=60"
    )
    ended = trainer.zygote.run(FAULTY, argv, env=faults(nan_image=[56], no_log=True), timeout_s=30)
    assert ended.codes == [1, 1], ended.text
    for log in ended.logs:
        assert "metrics.jsonl: cannot be written ([Errno 28] No space left on device)" in log


def test_a_spike_rolls_back_and_the_limit_ends_the_run(trainer: Trainer, tmp_path: Path) -> None:
    run = tmp_path / "run"
    argv = trainer.arguments(
        run, "guard.spike_factor=3.0", "guard.max_rollbacks=1", "train.steps=40", "data.workers=0"
    )
    ended = trainer.zygote.run(FAULTY, argv, env=faults(spike=[200, 256]))
    assert ended.codes == [1, 1], ended.text
    (event,) = events(run)
    assert (event["event"], event["step"], event["from_step"]) == ("rolled_back", 24, 25)
    assert "(guard.spike_factor = 3, running median" in event["message"]
    (error,) = [line for line in ended.logs[0].splitlines() if line.startswith("error: ")]
    assert "guard.max_rollbacks = 1: training diverged again" in error
    assert steps_saved(run), "the checkpoints stay"


def test_an_exception_on_one_rank_ends_all(trainer: Trainer, tmp_path: Path) -> None:
    ended = trainer.zygote.run(
        FAULTY, trainer.arguments(tmp_path / "run"), env=faults(crash=24), timeout_s=30
    )
    assert ended.codes == [1, 1]
    assert "made to fail" in ended.logs[1]
    assert "another rank" in ended.logs[0] and "Traceback" not in ended.logs[0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_any_rank_saves_and_ends_with_code_3(
    trainer: Trainer, straight: Path, tmp_path: Path, number: signal.Signals
) -> None:
    run = tmp_path / "run"
    job = trainer.zygote.start_training(*trainer.arguments(run))
    wait_until(lambda: (run / "metrics.jsonl").exists(), 60, "first step")
    job.send(1, number)
    ended = job.wait(30)
    assert ended.codes == [3, 3], ended.text
    assert "the same command goes on from there" in ended.logs[0]
    assert steps_saved(run)[-1] == metrics(run)[-1]["step"]
    trainer.train(run)
    assert metrics(run) == metrics(straight)
    assert weights_hash(run) == weights_hash(straight)


def test_micro_batches_and_other_numbers_of_ranks_give_the_same_losses(
    trainer: Trainer, tmp_path: Path
) -> None:
    """Patch dropout is on. The run changes hands: two ranks, then one, then two with micro-batches at stage
    2."""
    same = (
        "train.precision=fp32",
        "data.workers=0",
        "checkpoint.every_steps=3",
        "train.steps=9",
        "optim.lr=1e-3",
    )
    trainer.train(tmp_path / "straight", *same)
    moved = tmp_path / "moved"
    for ranks, kill, changes in (
        (2, 32, ()),
        (1, 56, ()),
        (2, None, ("train.micro_batch_size=2", "train.zero_stage=2")),
    ):
        ended = trainer.zygote.run(
            FAULTY,
            trainer.arguments(moved, *same, *changes),
            ranks=ranks,
            env=faults(kill=kill),
            timeout_s=60,
        )
        assert (ended.codes[-1] == 0) == (kill is None), ended.text
    assert "changed since the last start: train.micro_batch_size = 2 (was None)" in ended.text
    differences = [abs(a - b) for a, b in zip(losses(moved), losses(tmp_path / "straight"), strict=True)]
    assert len(differences) == 9 and max(differences) <= 1e-5, differences


def test_a_full_disk_leaves_the_last_checkpoint_and_one_line(
    trainer: Trainer, straight: Path, tmp_path: Path
) -> None:
    """Files of more than 2 MB cannot be written from step 5 on: weights take 1.7 MB, AdamW's state twice
    that."""
    run = tmp_path / "run"
    goes_on = trainer.zygote.run(FAULTY, trainer.arguments(run), env=faults(disk_full=[40, 72]))
    assert goes_on.codes == [0, 0], goes_on.text
    (event,) = events(run)
    assert event["event"] == "save_failed" and event["step"] == 8 and "could not be saved" in event["message"]
    assert weights_hash(run) == weights_hash(straight)

    stops = tmp_path / "stops"
    argv = trainer.arguments(stops, "checkpoint.on_save_error=stop")
    ended = trainer.zygote.run(FAULTY, argv, env=faults(disk_full=[40, 1000]), timeout_s=60)
    assert ended.codes == [1, 1], ended.text
    # The first rank to say it ends the launch; on a busy machine that need not be rank 0.
    errors = [line for log in ended.logs for line in log.splitlines() if line.startswith("error: ")]
    assert errors and all("step-00000008: could not be saved" in error for error in errors), ended.text
    assert steps_saved(stops) == [4]
    trainer.train(stops, "checkpoint.on_save_error=stop")
    assert weights_hash(stops) == weights_hash(straight)


def test_resume_passes_over_damaged_checkpoints(trainer: Trainer, straight: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ended = trainer.zygote.run(FAULTY, trainer.arguments(run, "checkpoint.keep_last=3"), env=faults(kill=96))
    assert ended.codes[1] == -signal.SIGKILL and steps_saved(run) == [4, 8]
    weights = run / "checkpoints/step-00000008/optimizer.safetensors"
    flipped = bytearray(weights.read_bytes())
    flipped[-1] ^= 1
    weights.write_bytes(flipped)
    text = trainer.train(run, "checkpoint.keep_last=3")
    assert "optimizer.safetensors does not match its checksum" in text and "at step 4" in text
    assert metrics(run) == metrics(straight)


@pytest.mark.parametrize(
    "phase",
    [
        "evaluate",
        "save",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("forward", "learn", "export")),
    ],
)
def test_sigterm_in_any_phase_loses_nothing(
    trainer: Trainer, validated: Path, tiny_shards: Path, tmp_path: Path, phase: str
) -> None:
    run = tmp_path / "run"
    argv = trainer.arguments(run, *validating(tiny_shards))
    ended = trainer.zygote.run(FAULTY, argv, env=faults(sigterm=phase), timeout_s=60)
    assert ended.codes == ([0, 0] if phase == "export" else [3, 3]), ended.text
    assert steps_saved(run)[-1] == metrics(run)[-1]["step"]
    trainer.train(run, *validating(tiny_shards))
    assert metrics(run) == metrics(validated)
    assert_equal_to(validated, run)


@pytest.mark.parametrize("phase", ["build", "open data"])
def test_sigterm_before_the_first_step_ends_at_once(trainer: Trainer, tmp_path: Path, phase: str) -> None:
    argv = trainer.arguments(tmp_path / "run", "train.collective_timeout_s=60")
    ended = trainer.zygote.run(FAULTY, argv, env=faults(sigterm=phase), launcher=True, timeout_s=30)
    assert ended.codes[1] == 3 and ended.codes[0] != 0, ended.text
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_a_kill_changes_neither_the_average_nor_the_best(
    trainer: Trainer, validated: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    argv = trainer.arguments(run, *validating(tiny_shards))
    ended = trainer.zygote.run(FAULTY, argv, env=faults(kill=40))
    assert ended.codes[1] == -signal.SIGKILL, ended.text
    trainer.train(run, *validating(tiny_shards))
    assert metrics(run) == metrics(validated)
    assert_equal_to(validated, run)


def assert_equal_to(validated: Path, run: Path) -> None:
    assert (run / "eval.jsonl").read_text() == (validated / "eval.jsonl").read_text()
    for export in ("export", "export-ema", "export-best"):
        assert weights_hash(run, export) == weights_hash(validated, export)


def validating(shards: Path) -> list[str]:
    return [
        f"data.val={shards / 'part-00003.tar'}", "eval.every_steps=2", "eval.best_metric=clip_loss",
        "train.steps=6", "train.ema_decay=0.9", "checkpoint.every_steps=2", "checkpoint.keep_last=1",
        "data.workers=1",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def validated(trainer: Trainer, tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with validation, a moving average, and the best checkpoint kept."""
    run = tmp_path_factory.mktemp("validated") / "run"
    trainer.train(run, *validating(tiny_shards))
    return run


def test_the_best_checkpoint_stays_and_is_exported_with_the_average(validated: Path) -> None:
    evaluations = [json.loads(line) for line in (validated / "eval.jsonl").read_text().splitlines()]
    assert [line["step"] for line in evaluations] == [2, 4, 6]
    promised = possible_metrics(parse_recipe(tomllib.loads((validated / "recipe.toml").read_text())))
    assert set(promised) <= evaluations[0].keys() and len(promised) > 10
    best = min(evaluations, key=lambda line: line["clip_loss"])["step"]
    assert steps_saved(validated) == sorted({best, 6})
    checkpoint = validated / f"checkpoints/step-{best:08d}/open_clip_model.safetensors"
    assert weights_hash(validated, "export-best") == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    average, last = load_model(validated / "export-ema").model, load_model(validated).model
    assert any(not torch.equal(a, b) for a, b in zip(average.parameters(), last.parameters(), strict=True))


def test_a_new_best_value_is_saved_between_other_saves(
    trainer: Trainer, tiny_shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    rarely = ("checkpoint.every_steps=100", "checkpoint.keep_last=9", "train.steps=3", "data.workers=0")
    trainer.train(run, *validating(tiny_shards), *rarely, ranks=1)
    assert steps_saved(run)[0] == 2, "the first evaluation is the best so far"
    assert (run / "export-best").is_dir()


def test_saves_by_time_and_tensorboard(trainer: Trainer, tmp_path: Path) -> None:
    run = tmp_path / "run"
    often = ("checkpoint.every_minutes=0.00001", "checkpoint.keep_last=9")
    trainer.train(run, *often, "train.steps=5", "log.tensorboard=true", "data.workers=0", ranks=1)
    assert steps_saved(run) == [1, 2, 3, 4, 5]
    assert list((run / "tensorboard").iterdir())


def test_a_rank_that_hangs_is_given_up_after_the_time_that_the_recipe_names(
    trainer: Trainer, tmp_path: Path
) -> None:
    argv = trainer.arguments(tmp_path / "run", "train.collective_timeout_s=5", "data.workers=0")
    job = trainer.zygote.start(FAULTY, argv, env=faults(hang=24))
    wait_until(lambda: "error: another rank" in job.log(0), 60, "the end of the other rank")
    assert "imed out" in job.log(0) and "train.collective_timeout_s says how long a rank waits" in job.log(0)
    job.send(1, signal.SIGKILL)
    assert job.wait(30).codes == [1, -signal.SIGKILL]


def test_wandb_offline(trainer: Trainer, tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="extra: wandb")
    argv = trainer.arguments(tmp_path / "run", "train.steps=3", "log.wandb=tests", "data.workers=0")
    offline = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    ended = trainer.zygote.run("clipstack.train:main", argv, ranks=1, env=offline, timeout_s=120)
    assert ended.codes == [0], ended.text
    (record,) = (tmp_path / "run").rglob("*.wandb")  # it can be sent later
    assert record.stem == f"run-{(tmp_path / 'run/wandb-id.txt').read_text().strip()}"
