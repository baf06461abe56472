"""Training as users run it, on two ranks: equal launches, kills and resumes, signals, bad input."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from clipstack.checkpoint import load_model
from tests.clipstack.launching import Zygote, wait_until
from tests.clipstack.training_runs import losses, metrics, steps_saved, weights_hash


@dataclass(frozen=True)
class Trainer:
    """Runs the tiny recipe on two ranks."""

    zygote: Zygote
    recipe: Path

    def arguments(self, run: Path, *overrides: str) -> list[object]:
        return ["--config", self.recipe, f"run.dir={run}", *overrides]

    def train(self, run: Path, *overrides: str, ranks: int = 2, codes: list[int] | None = None, timeout_s: float = 90) -> str:
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
    assert {p.name for p in (straight / "export").iterdir()} == {
        "open_clip_config.json", "open_clip_model.safetensors", "clipstack.json"
    }  # fmt: skip


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
        wait_until(lambda step=step, log=log: log.exists() and len(log.read_text().splitlines()) >= step, 60, f"step {step}")
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
    "data.train=nowhere/part-{0..3}.tar": "nowhere/part-0.tar",
    "data.train=nowhere/part-*.tar": "nowhere/part-*.tar",
    "data.train=README.md": "README.md",
    "train.batch_size=9": "train.batch_size = 9: not divisible by 2 ranks; take 8",
    "model=ViT-B-23": "did you mean 'ViT-B-",
    "run.dir=/proc/nothing": "run.dir = '/proc/nothing'",
}


def test_bad_input_ends_with_one_line_and_code_2(trainer: Trainer, tmp_path: Path) -> None:
    jobs = [
        trainer.zygote.start_training(*trainer.arguments(tmp_path / f"run-{i}", change)) for i, change in enumerate(BAD_INPUT)
    ]
    for (change, message), job in zip(BAD_INPUT.items(), jobs, strict=True):
        ended = job.wait(60)
        assert ended.codes == [2, 2], (change, ended.text)
        assert message in ended.logs[0]
        assert ended.logs[0].startswith("error: ") and ended.logs[0].count("\n") == 1, ended.logs[0]


def test_a_run_folder_of_another_recipe_is_refused(trainer: Trainer, straight: Path) -> None:
    before = metrics(straight)
    for change in ("optim.lr=1", "model.embed_dim=32", "data.augment.hflip=false", "seed=5"):
        text = trainer.train(straight, change, codes=[2, 2])
        key = change.split("=")[0]
        assert f"error: {key} = " in text and "train into another run.dir" in text
    assert "--fresh" in trainer.train(straight, "--fresh", codes=[2, 2])
    assert metrics(straight) == before
