"""Writes checkpoints behind training's back, one at a time, and says when one could not be written.

Safe because the writer shares nothing with training: it gets a Snapshot of copies in main memory, writes a
folder that appears whole or not at all, and no process is forked while it is at work (`settle` comes first).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from clipstack.checkpoint.folder import drop_later, prune, remove_unfinished, sound_checkpoints
from clipstack.checkpoint.layout import checkpoint_name
from clipstack.checkpoint.snapshot import Snapshot, read_progress, save_snapshot
from clipstack.config.models import CheckpointConfig
from clipstack.errors import CheckpointError
from clipstack.training.guard import is_good
from clipstack.training.reporting import Reporter
from clipstack.world import World
from data_pipelines.files import flush_to_disk


class Saver:
    """Every rank has one and calls it alike; the main rank's writes."""

    def __init__(self, folder: Path, config: CheckpointConfig, world: World, reporter: Reporter) -> None:
        self._folder, self._config, self._world, self._reporter = folder, config, world, reporter
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._step = 0
        self._last_save = time.monotonic()

    def is_due_by_time(self) -> bool:
        """Whether `checkpoint.every_minutes` have passed, by this process's clock."""
        every_s = self._config.every_minutes * 60
        return 0 < every_s <= time.monotonic() - self._last_save

    def has_failed(self) -> bool:
        """Whether a write has ended badly since the last `settle`; known to the main rank only."""
        return self._writing is not None and self._writing.done() and self._writing.exception() is not None

    def save(self, snapshot: Snapshot, *, best_step: int | None) -> None:
        """Start to write. An earlier write ends first; see `settle` for what its failure means.
        Collective."""
        self.settle()
        self._step, self._last_save = snapshot.step, time.monotonic()
        if self._world.is_main:
            self._reporter.write_pending()
            self._writing = self._thread.submit(
                self._write, snapshot, best_step, self._reporter.problem, self._reporter.files
            )

    def save_for_sure(self, snapshot: Snapshot, *, best_step: int | None) -> None:
        """Write, and wait for it. Raises CheckpointError on every rank if that fails. Collective."""
        self.save(snapshot, best_step=best_step)
        self._world.from_main(self._finish)

    def settle(self) -> None:
        """Wait for what is being written. If it failed, report it, or raise CheckpointError on every rank
        where `checkpoint.on_save_error` is "stop". Collective."""
        try:
            self._world.from_main(self._finish)
        except CheckpointError as error:
            if self._config.on_save_error == "stop":
                raise
            self._reporter.event("save_failed", self._step, str(error))

    def close(self) -> None:
        """Let a write end; its failure is told by `settle` only."""
        self._thread.shutdown(wait=True)

    def _finish(self) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write(
        self, snapshot: Snapshot, best_step: int | None, log_problem: str | None, logs: Sequence[Path]
    ) -> None:
        # A checkpoint must not claim steps that the log will never show, even where the power fails.
        problem = log_problem or _flush_problem(logs)
        if problem is not None:
            raise CheckpointError(f"step {snapshot.step}: not saved, since {problem}")
        try:
            self._replace_older(snapshot, best_step)
        except OSError as error:
            path = self._folder / checkpoint_name(snapshot.step)
            raise CheckpointError(f"{path}: could not be saved ({error})") from error

    def _replace_older(self, snapshot: Snapshot, best_step: int | None) -> None:
        drop_later(self._folder, snapshot.step)
        remove_unfinished(self._folder)
        save_snapshot(self._folder, snapshot)
        keep = [] if best_step is None else [self._folder / checkpoint_name(best_step)]
        guard = snapshot.progress.get("guard")
        if guard is not None and not is_good(guard):
            good = newest_good(self._folder)
            keep += [] if good is None else [good]
        prune(
            self._folder,
            keep_last=self._config.keep_last,
            keep_every_steps=self._config.keep_every_steps,
            keep=keep,
        )


def newest_good(folder: Path) -> Path | None:
    """What a roll-back goes back to, and what `prune` must therefore keep: the newest sound checkpoint that
    was not saved between skipped steps."""
    return next((p for p in sound_checkpoints(folder) if is_good(read_progress(p)["guard"])), None)


def _flush_problem(logs: Sequence[Path]) -> str | None:
    """Flush files to the disk; why that failed, or None."""
    for log in logs:
        try:
            flush_to_disk(log)
        except OSError as error:
            return f"{log} cannot be flushed to the disk ({error})"
    return None
