"""The training loop: `fit()` reads top to bottom. What is done when is `due()`; how fast it learns is
`lr_at()`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipstack.checkpoint import export_model
from clipstack.checkpoint.layout import CHECKPOINTS, EXPORT, checkpoint_name
from clipstack.checkpoint.manifest import damage
from clipstack.checkpoint.snapshot import Snapshot, load_snapshot
from clipstack.config import Recipe, to_toml
from clipstack.config.models import OptimConfig
from clipstack.errors import ConfigError, DivergenceError
from clipstack.loading.train_loader import Batch, TrainLoader
from clipstack.losses import build_objective
from clipstack.losses.inputs import NonFiniteError
from clipstack.losses.types import Embeddings, LossOutput
from clipstack.preprocess import Preprocess
from clipstack.run_log import ROLLED_BACK
from clipstack.stopping import STOPPED, StopRequest
from clipstack.training.dropout import row_keys
from clipstack.training.ema import ModelEma
from clipstack.training.engine import Engine, StepResult
from clipstack.training.grad_cache import Part, make_passes
from clipstack.training.guard import Guard, Verdict
from clipstack.training.reporting import Reporter, Silent
from clipstack.training.saver import Saver, newest_good
from clipstack.training.telemetry import Clock
from clipstack.training.validation import lower_is_better, validate
from clipstack.world import World


class Outcome(Enum):
    """How a call of `fit` ended; the values are exit codes."""

    FINISHED = 0
    STOPPED = STOPPED


def fit(
    recipe: Recipe,
    engine: Engine,
    loader: TrainLoader,
    *,
    world: World,
    resume_from: Snapshot | None,
    stop: StopRequest,
    peak_s_per_sample: float | None = None,
) -> Outcome:
    """Train until `recipe.train.steps`, or until a signal asks to stop. Collective.

    peak_s_per_sample: what a sample would take if all devices worked at their peak, for the MFU; None where
    that is unknown.
    """
    run = Training(recipe, engine, loader, world, peak_s_per_sample=peak_s_per_sample)
    reporter, steps = run.reporter, recipe.train.steps
    try:
        if resume_from is not None:
            run.restore(resume_from)
        world.from_main(lambda: reporter.start(run.progress.step))
        batches = run.batches()
        while run.progress.step < steps:
            with run.clock.waiting_for_data():
                batch = next(batches)
            step = run.progress.step + 1
            lr = lr_at(run.progress.step, recipe.optim, steps)

            # ---- Learn, unless the step is bad ----
            loss = run.forward(batch)
            agreed = run.agree(loss, stop)
            verdict = run.guard.judge_loss(step, agreed.loss)
            if verdict is Verdict.FINE:
                assert loss is not None and agreed.loss is not None
                result = run.learn(loss, lr)
                verdict = run.guard.judge_update(step, agreed.loss, applied=result.applied)
            if verdict is Verdict.ROLL_BACK:
                run.roll_back(step, batch.next_sample)
                batches = run.batches()
                continue
            run.advance(batch)

            # ---- Then what is due, in this order: what is logged is in the checkpoint, and a checkpoint
            # knows its evaluation ----
            if verdict is Verdict.SKIP:
                reporter.event("step_skipped", step, run.guard.reason)
            elif due(recipe.log.every_steps, step, steps):
                assert loss is not None
                reporter.metrics(run.metrics(loss, lr=lr, grad_norm=result.grad_norm))
            if agreed.save_failed:
                run.saver.settle()
            if recipe.data.val is not None and due(recipe.eval.every_steps, step, steps):
                run.evaluate()
            if agreed.stop or step == steps:
                run.save_for_sure()
            elif (
                agreed.save
                or due(recipe.checkpoint.every_steps, step, steps)
                or run.progress.best_step == step
            ):
                run.save()
            if agreed.stop and step < steps:
                reporter.say(f"stopped by signal at step {step}; the same command goes on from there")
                return Outcome.STOPPED
        run.export()
        return Outcome.FINISHED
    finally:
        run.close()


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


@dataclass
class Progress:
    """How far a run is; every checkpoint holds it."""

    step: int = 0
    samples_seen: int = 0
    """Position in the order of the data."""
    best: float | None = None
    best_step: int | None = None
    best_metric: str | None = None
    """What `best` is a value of."""
    skipped_windows: list[tuple[int, int]] = field(default_factory=list)
    """Positions [low, high) that roll-backs leave out."""


@dataclass(frozen=True)
class Agreed:
    """What all ranks know about a step. loss: the mean over ranks; None where it is not finite on some
    rank."""

    loss: float | None
    stop: bool
    save: bool
    save_failed: bool


@dataclass(frozen=True)
class StepLoss:
    """output: what the objective gave. logit_scale: () the LOG of the scale that it was computed with."""

    output: LossOutput
    logit_scale: Tensor


class Training:
    """The parts of a run, and what `fit` does with them. Every method is collective unless it says
    otherwise."""

    def __init__(
        self,
        recipe: Recipe,
        engine: Engine,
        loader: TrainLoader,
        world: World,
        *,
        peak_s_per_sample: float | None = None,
    ) -> None:
        run_dir, train = recipe.run.dir, recipe.train
        self.recipe, self.engine, self.world = recipe, engine, world
        self.progress = Progress()
        self.guard = Guard(recipe.guard)
        self._preprocess = Preprocess.from_record(engine.model.record, augment=recipe.data.augment)
        self._objective = build_objective(recipe.objective, world)
        self._loader = loader
        self._share = train.batch_size // world.size
        self._passes = make_passes(
            self._encode, engine.backward, share=self._share, micro_batch_size=train.micro_batch_size
        )
        self._ema = None if train.ema_decay is None else ModelEma(engine, train.ema_decay)
        self.reporter = world.together(lambda: Reporter(run_dir, recipe) if world.is_main else Silent())
        self.saver = Saver(run_dir / CHECKPOINTS, recipe.checkpoint, world, self.reporter)
        self.clock = Clock(world.device, peak_s_per_sample=peak_s_per_sample)
        engine.train()

    # ---- One step ----

    def batches(self) -> Iterator[Batch]:
        """This rank's shares of the global batches to come. Not collective."""
        return self._loader.iterate(self.progress.samples_seen, self.progress.skipped_windows)

    def forward(self, batch: Batch) -> StepLoss | None:
        """The loss of the global batch; None where features or loss are not finite here."""
        step, rank, device = self.progress.step, self.world.rank, self.world.device
        # For dropout inside fused attention, which has no keyed form.
        torch.manual_seed(int(row_keys(self.recipe.seed, step, torch.tensor([-1 - rank]))))
        places = torch.arange(self._share) + rank * self._share
        share = Part(batch.images, batch.tokens, row_keys(self.recipe.seed, step, places))
        embeddings = self._passes.forward(share)
        try:
            output = self._objective(
                embeddings,
                sample_ids=batch.sample_ids.to(device),
                sample_index=batch.sample_index.to(device),
                progress=step / self.recipe.train.steps,
            )
        except NonFiniteError:
            return None
        return StepLoss(output, embeddings.logit_scale.detach())

    def _encode(self, part: Part) -> Embeddings:
        device = self.world.device
        return self.engine.forward(
            self._preprocess.normalize(part.images.to(device, non_blocking=True)),
            self.engine.trim_tokens(part.tokens).to(device, non_blocking=True),
            dropout_keys=part.keys.to(device, non_blocking=True),
        )

    def agree(self, loss: StepLoss | None, stop: StopRequest) -> Agreed:
        """One small reduction, by which all ranks learn of a bad loss, a signal and the main rank's clock."""
        total = math.nan if loss is None else float(loss.output.total.detach())
        is_bad, main = not math.isfinite(total), self.world.is_main
        mine = [
            0.0 if is_bad else total, is_bad, stop.is_set,
            main and self.saver.is_due_by_time(), main and self.saver.has_failed(),
        ]  # fmt: skip
        sums = self.world.all_reduce(
            torch.tensor(mine, dtype=torch.float64, device=self.world.device)
        ).tolist()
        return Agreed(
            loss=None if sums[1] else sums[0] / self.world.size,
            stop=bool(sums[2]),
            save=bool(sums[3]),
            save_failed=bool(sums[4]),
        )

    def learn(self, loss: StepLoss, lr: float) -> StepResult:
        """Backward pass and optimizer step."""
        self._passes.backward(loss.output.total)
        result = self.engine.step(lr)
        if self._ema is not None and result.applied:
            self._ema.update(self.progress.step + 1)
        return result

    def advance(self, batch: Batch) -> None:
        """A step is done, or skipped. Not collective."""
        self.progress.step += 1
        self.progress.samples_seen = batch.next_sample
        self.clock.count(self.recipe.train.batch_size)
        self.reporter.advance()

    # ---- What is due now and then ----

    def metrics(self, loss: StepLoss, *, lr: float, grad_norm: float) -> dict[str, Any]:
        """One line of metrics.jsonl: means over the ranks."""
        terms = {
            **loss.output.terms,
            "loss": loss.output.total,
            "logit_scale": loss.logit_scale,
        }  # the LOG of the scale
        stacked = torch.stack([value.detach().double().reshape(()) for value in terms.values()])
        values = dict(zip(terms, self.world.mean(stacked).tolist(), strict=True))
        return {
            "step": self.progress.step,
            "samples_seen": self.progress.samples_seen,
            "epoch": self._loader.epochs(self.progress.samples_seen)[0],
            "loss": values.pop("loss"),
            "clip_loss": values.pop("clip_loss"),
            "lr": lr,
            "grad_norm": grad_norm,
            **values,
            **self.clock.read(),
        }

    def evaluate(self) -> None:
        """Validate, and remember where the best value was."""
        self.saver.settle()  # validation forks loader processes
        self.engine.share_statistics()
        self.engine.eval()
        values = validate(self.engine, self._preprocess, self.recipe, self.world)
        self.engine.train()
        note_best(self.progress, values, self.recipe.eval.best_metric)
        self.reporter.evaluation(
            {"step": self.progress.step, "samples_seen": self.progress.samples_seen, **values}
        )

    def save(self) -> None:
        """Write a checkpoint while training goes on."""
        self._loader.write_quarantine()
        with self.clock.saving():
            self.saver.save(self._snapshot(), best_step=self.progress.best_step)

    def save_for_sure(self) -> None:
        """Write a checkpoint now. Raises CheckpointError."""
        self._loader.write_quarantine()
        with self.clock.saving():
            self.saver.save_for_sure(self._snapshot(), best_step=self.progress.best_step)

    def export(self) -> None:
        """Write the finished model, and the moving average and the best checkpoint where there are such, as
        their own."""
        run_dir, best_step = self.recipe.run.dir, self.progress.best_step

        def write() -> None:
            if self._ema is not None:
                export_model(run_dir, run_dir / "export-ema", average=True)
            if best_step is not None:
                best = run_dir / CHECKPOINTS / checkpoint_name(best_step)
                problem = damage(best)
                if problem is None:
                    export_model(best, run_dir / "export-best")
                else:  # its save failed, or the disk did
                    self.reporter.say(f"no export-best: {best}: {problem}")
            export_model(run_dir, run_dir / EXPORT)  # the last: a run with an export is finished

        self.world.from_main(write)
        self.reporter.say(f"done: {self.progress.step} steps; the model is in {run_dir / 'export'}")

    # ---- State in and out ----

    def _snapshot(self) -> Snapshot:
        weights = self.engine.weights()
        return Snapshot(
            step=self.progress.step,
            samples_seen=self.progress.samples_seen,
            record=self.engine.model.record,
            max_logit_scale=self.engine.model.max_logit_scale,
            weights=weights,
            optimizer=self.engine.optimizer_state(),
            ema=None if self._ema is None else self._ema.weights(weights),
            objective=copied(self._objective.state_dict()),
            order=self._loader.state(),
            recipe_toml=to_toml(self.recipe),
            progress={**asdict(self.progress), "guard": self.guard.state()},
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from a snapshot whose weights and optimizer state the engine has."""
        self._restore_the_rest(snapshot)
        self.guard.restore(snapshot.progress["guard"])

    def _restore_the_rest(self, snapshot: Snapshot) -> None:
        saved = dict(snapshot.progress)
        del saved["guard"]
        self.progress = Progress(
            **{**saved, "skipped_windows": [(low, high) for low, high in saved["skipped_windows"]]}
        )
        self._objective.load_state_dict(snapshot.objective)
        if self._ema is not None and snapshot.ema is not None:
            self._ema.load_weights(snapshot.ema)

    def roll_back(self, step: int, next_sample: int) -> None:
        """Go back to the newest checkpoint of good times, and leave out the data since. Raises
        DivergenceError, and CheckpointError where the disk refuses; on every rank."""
        self.saver.settle()
        self.guard.count_rollback()
        folder = self.recipe.run.dir / CHECKPOINTS
        reason = self.guard.reason
        path = self.world.from_main(lambda: to_go_back_to(folder, reason))
        snapshot = self.world.together(lambda: load_snapshot(path))
        self.engine.load_weights(snapshot.weights)
        self.engine.load_optimizer_state(snapshot.optimizer)
        windows = self.progress.skipped_windows
        self._restore_the_rest(snapshot)
        self.guard.restore(snapshot.progress["guard"], keep_rollbacks=True)
        window = (self.progress.samples_seen, next_sample)
        self.progress.skipped_windows = [*windows, window]
        # The log goes back as well, as it would if the run were killed now; the event stays, and says what
        # happened.
        self.world.from_main(lambda: self.reporter.start(snapshot.step, rolled_back=True))
        self.reporter.event(
            ROLLED_BACK, snapshot.step,
            f"{self.guard.reason}; back to step {snapshot.step}, leaving out samples {window[0]} to "
            f"{window[1]} of the order",
            from_step=step, skipped_samples=list(window),
        )  # fmt: skip

    def close(self) -> None:
        """End processes, threads and files. Not collective."""
        self._loader.close()
        self.saver.close()
        self.reporter.close()


def to_go_back_to(folder: Path, reason: str) -> Path:
    """The checkpoint for a roll-back. Raises DivergenceError for none."""
    path = newest_good(folder)
    if path is None:
        raise DivergenceError(
            f"{reason}, and no checkpoint to go back to in {folder}; train with a smaller optim.lr or a "
            "longer optim.warmup_fraction"
        )
    return path


def copied(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A tree of tables whose tensors are copies: training goes on in the originals."""
    return {
        name: copied(value)
        if isinstance(value, Mapping)
        else value.detach().to("cpu", copy=True)
        if isinstance(value, Tensor)
        else value
        for name, value in tree.items()
    }


def note_best(progress: Progress, values: Mapping[str, Any], metric: str | None) -> None:
    """Remember this step if `metric` is better than ever. Raises ConfigError for data that do not give
    it."""
    if metric is None:
        return
    if metric not in values:
        raise ConfigError(
            f"eval.best_metric = {metric!r}: validation gives {', '.join(sorted(values))}; name one of these"
        )
    if metric != progress.best_metric:  # another question than before: nothing is best yet
        progress.best = progress.best_step = None
        progress.best_metric = metric
    value = float(values[metric])
    if not math.isfinite(value):
        return
    if progress.best is None or (value < progress.best if lower_is_better(metric) else value > progress.best):
        progress.best, progress.best_step = value, progress.step
