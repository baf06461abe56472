"""The training loop: `fit()` reads top to bottom. What is done when is `due()`; how fast it learns is `lr_at()`."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from clipstack.checkpoint import Snapshot, export_model, prune, save_snapshot
from clipstack.config import OptimConfig, Recipe, to_toml
from clipstack.engine import Engine
from clipstack.errors import CheckpointError, DivergenceError
from clipstack.evaluate import validate
from clipstack.loader import Batch, TrainLoader
from clipstack.losses import build_objective
from clipstack.losses.types import LossOutput
from clipstack.model import ClipModel
from clipstack.preprocess import Preprocess
from clipstack.reporting import Reporter, Silent
from clipstack.world import World


class Outcome(Enum):
    """How a call of `fit` ended; the values are exit codes."""

    FINISHED = 0
    STOPPED = 3


@dataclass
class Progress:
    """How far a run is: all of it is in every checkpoint."""

    step: int = 0
    samples_seen: int = 0
    best: float | None = None
    best_step: int | None = None
    skipped_windows: list[tuple[int, int]] = field(default_factory=list)


def fit(
    recipe: Recipe,
    model: ClipModel,
    engine: Engine,
    *,
    world: World,
    resume_from: Snapshot | None,
) -> Outcome:
    """Train until `recipe.train.steps`, or until a signal asks to stop. Collective."""
    run_dir = recipe.run.dir
    preprocess = Preprocess.from_record(model.record, augment=recipe.data.augment)
    objective = build_objective(recipe.objective, world)
    loader = TrainLoader(
        recipe.data, preprocess=preprocess, batch_size=recipe.train.batch_size, world=world, seed=recipe.seed,
        quarantine_path=run_dir / "quarantine.jsonl",
    )  # fmt: skip
    progress = Progress()
    if resume_from is not None:
        loader.check_state(resume_from.order)
        objective.load_state_dict(resume_from.objective)
        progress = _progress_of(resume_from)
    reporter = Reporter(run_dir, recipe) if world.is_main else Silent()
    reporter.start(progress.step)

    def save() -> None:
        _save(
            recipe, engine, objective.state_dict(), loader.state(), progress, world=world, reporter=reporter
        )

    def evaluate() -> None:
        engine.eval()
        values = validate(engine, preprocess, recipe, world)
        engine.train()
        _note_best(progress, values, recipe.eval.best_metric)
        reporter.evaluation({"step": progress.step, "samples_seen": progress.samples_seen, **values})

    stop = StopRequest()
    clock = Clock()
    steps = recipe.train.steps
    last_save = time.monotonic()
    engine.train()
    try:
        with stop.listening():
            for batch in _timed(loader.iterate(progress.samples_seen, progress.skipped_windows), clock):
                if progress.step >= steps:
                    break
                seed_step(recipe.seed, progress.step, world.rank)
                lr = lr_at(progress.step, recipe.optim, steps)
                embeddings = engine.forward(
                    preprocess.normalize(batch.images.to(world.device, non_blocking=True)),
                    model.trim_tokens(batch.tokens).to(world.device, non_blocking=True),
                )
                loss = objective(
                    embeddings,
                    sample_ids=batch.sample_ids.to(world.device),
                    sample_index=batch.sample_index.to(world.device),
                    progress=progress.step / steps,
                )
                wants = _agree(stop, loss.total, time.monotonic() - last_save, recipe, world)
                if wants.is_non_finite:
                    raise DivergenceError(
                        f"step {progress.step + 1}: the loss is not finite; resume with a smaller optim.lr or a longer "
                        f"optim.warmup_fraction from the last checkpoint in {run_dir / 'checkpoints'}"
                    )
                engine.backward(loss.total)
                grad_norm = engine.step(lr).grad_norm
                progress.step += 1
                progress.samples_seen = batch.next_sample
                clock.count(recipe.train.batch_size)
                reporter.advance()

                # In this order: what is logged is in the checkpoint, and a checkpoint knows its evaluation.
                if due(recipe.log.every_steps, progress.step, steps):
                    reporter.metrics(
                        _metrics(
                            progress,
                            loss,
                            embeddings.logit_scale,
                            lr=lr,
                            grad_norm=grad_norm,
                            clock=clock,
                            world=world,
                            loader=loader,
                        )
                    )
                if recipe.data.val is not None and due(recipe.eval.every_steps, progress.step, steps):
                    evaluate()
                if wants.save or wants.stop or due(recipe.checkpoint.every_steps, progress.step, steps):
                    save()
                    last_save = time.monotonic()
                if wants.stop and progress.step < steps:
                    reporter.say(
                        f"stopped by signal at step {progress.step}; the same command goes on from there"
                    )
                    return Outcome.STOPPED
            world.from_main(lambda: export_model(run_dir, run_dir / "export"))
            reporter.say(f"done: {progress.step} steps; the model is in {run_dir / 'export'}")
            return Outcome.FINISHED
    finally:
        loader.close()
        reporter.close()


def due(every: int | None, step: int, steps: int) -> bool:
    """Whether something done every so many steps is due after `step`; the last step is always due."""
    return step == steps or (every is not None and step % every == 0)


def lr_at(step: int, config: OptimConfig, steps: int) -> float:
    """The learning rate of the step with this index, 0 the first: linear warm-up, then the schedule."""
    warmup = round(config.warmup_fraction * steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "constant":
        return config.lr
    share = (step - warmup) / max(1, steps - warmup)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * share))


def seed_step(seed: int, step: int, rank: int) -> None:
    """Key the global generators, which dropout draws from, to (seed, step, rank).

    A resumed run then drops what the uninterrupted one would have dropped, with no generator state to save.
    """
    mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + rank * 0x94D049BB133111EB) % 2**63
    torch.manual_seed(mixed)


@dataclass(frozen=True)
class Wants:
    """What at least one rank wants after this step."""

    stop: bool
    is_non_finite: bool
    save: bool


def _agree(stop: StopRequest, loss: Tensor, unsaved_s: float, recipe: Recipe, world: World) -> Wants:
    """All ranks learn of a signal, of a bad loss and of the main rank's clock in one small reduction. Collective."""
    every_s = recipe.checkpoint.every_minutes * 60
    mine = [stop.requested, not bool(torch.isfinite(loss)), world.is_main and 0 < every_s <= unsaved_s]
    flags = world.all_reduce(torch.tensor(mine, dtype=torch.int32, device=world.device), op=dist.ReduceOp.MAX)
    return Wants(*(bool(flag) for flag in flags.tolist()))


class StopRequest:
    """Set by SIGTERM or SIGINT; the loop looks at it once a step."""

    def __init__(self) -> None:
        self.requested = False

    def listening(self) -> _Handlers:
        return _Handlers(self)

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.requested = True


class _Handlers:
    def __init__(self, handler: StopRequest) -> None:
        self._handler = handler
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._handler)

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)


class Clock:
    """Throughput and the share of time spent waiting for data, since the last reading."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._start, self._waited_s, self._samples = time.perf_counter(), 0.0, 0

    def waited(self, seconds: float) -> None:
        self._waited_s += seconds

    def count(self, samples: int) -> None:
        self._samples += samples

    def read(self) -> dict[str, float]:
        elapsed = time.perf_counter() - self._start
        out = {"samples_per_s": self._samples / elapsed, "data_wait_fraction": self._waited_s / elapsed}
        self._reset()
        return out


def _timed(batches: Iterator[Batch], clock: Clock) -> Iterator[Batch]:
    while True:
        start = time.perf_counter()
        batch = next(batches)
        clock.waited(time.perf_counter() - start)
        yield batch


def _metrics(
    progress: Progress, loss: LossOutput, logit_scale: Tensor, *, lr: float, grad_norm: float, clock: Clock, world: World,
    loader: TrainLoader,
) -> dict[str, Any]:  # fmt: skip
    """One line of metrics.jsonl: means over the ranks. Collective."""
    terms = {**loss.terms, "loss": loss.total, "logit_scale": logit_scale}  # the LOG of the scale
    means = world.mean(
        torch.stack([value.detach().double().reshape(()) for value in terms.values()])
    ).tolist()
    values = dict(zip(terms, means, strict=True))
    timing = clock.read()
    return {
        "step": progress.step,
        "samples_seen": progress.samples_seen,
        "epoch": loader.epochs(progress.samples_seen)[0],
        "loss": values.pop("loss"),
        "clip_loss": values.pop("clip_loss"),
        "lr": lr,
        "grad_norm": grad_norm,
        **values,
        **timing,
    }


def _save(
    recipe: Recipe, engine: Engine, objective: Mapping[str, Any], order: Mapping[str, Any], progress: Progress, *,
    world: World, reporter: Reporter,
) -> None:  # fmt: skip
    """Write a checkpoint. Every rank takes part in gathering; the main one writes. Collective."""
    folder = recipe.run.dir / "checkpoints"
    weights, optimizer = engine.weights(), engine.optimizer_state()

    def write() -> None:
        snapshot = Snapshot(
            step=progress.step,
            samples_seen=progress.samples_seen,
            record=engine.model.record,
            max_logit_scale=engine.model.max_logit_scale,
            weights=weights,
            optimizer=optimizer,
            objective=objective,
            order=order,
            recipe_toml=to_toml(recipe),
            progress={
                "best": progress.best,
                "best_step": progress.best_step,
                "skipped_windows": progress.skipped_windows,
            },
        )
        save_snapshot(folder, snapshot)
        prune(
            folder,
            keep_last=recipe.checkpoint.keep_last,
            keep_every_steps=recipe.checkpoint.keep_every_steps,
            keep=_best_folder(folder, progress),
        )

    try:
        world.from_main(write)
    except CheckpointError as error:
        if recipe.checkpoint.on_save_error == "stop":
            raise
        reporter.event("save_failed", progress.step, str(error))


def _best_folder(folder: Path, progress: Progress) -> Path | None:
    return None if progress.best_step is None else folder / f"step-{progress.best_step:08d}"


def _note_best(progress: Progress, values: Mapping[str, Any], metric: str | None) -> None:
    if metric is None:
        return
    value = float(values[metric])
    better = progress.best is None or (value < progress.best if "loss" in metric else value > progress.best)
    if better:
        progress.best, progress.best_step = value, progress.step


def _progress_of(snapshot: Snapshot) -> Progress:
    saved = snapshot.progress
    return Progress(
        step=snapshot.step,
        samples_seen=snapshot.samples_seen,
        best=saved.get("best"),
        best_step=saved.get("best_step"),
        skipped_windows=[(low, high) for low, high in saved.get("skipped_windows", [])],
    )
