"""What a run tells as it goes: its log, its sinks, a progress bar or plain lines."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from clipstack.config import Recipe
from clipstack.run_log import EVAL_FILE, METRICS_FILE, QUARANTINE_FILE, append_line, cut_back
from clipstack.training.sinks import PatientSink, open_sinks

SHOWN_METRICS = ("clip_loss", "top1", "mean_per_class_recall", "image_to_text_r1", "text_to_image_r1")
"""What of an evaluation goes to the terminal; eval.jsonl has all of it."""


class Reporter:
    """Writes a run's numbers and speaks to the user. Rank 0 has one; the other ranks have a `Silent`."""

    def __init__(self, run_dir: Path, recipe: Recipe) -> None:
        self._run_dir = run_dir
        self._total = recipe.train.steps
        self._bar: tqdm[Any] | None = None
        self._pending: list[tuple[Path, Mapping[str, Any]]] = []
        self.problem: str | None = None
        """Why lines wait to be written; None where none do."""
        self._step = 0
        self._sinks = [PatientSink(sink, self._tell_of_sink) for sink in open_sinks(run_dir, recipe.log)]

    def _tell_of_sink(self, step: int, message: str) -> None:
        self.event("telemetry", step, message)

    @property
    def files(self) -> list[Path]:
        """What a checkpoint counts on, as far as it exists: to be flushed to the disk before it."""
        paths = [self._run_dir / name for name in (METRICS_FILE, EVAL_FILE, QUARANTINE_FILE)]
        return [path for path in paths if path.exists()]

    def start(self, step: int, *, rolled_back: bool = False) -> None:
        """Drop what lies beyond `step` from the logs, and show progress from there. Raises
        CheckpointError.

        rolled_back: not a resume: earlier roll-backs to this very step stay. A checkpoint does not know of
        roll-backs to itself, so a resumed run goes through them again.
        """
        self._pending = [(path, line) for path, line in self._pending if line["step"] <= step]
        for name in (METRICS_FILE, EVAL_FILE):
            cut_back(self._run_dir / name, step, keep_rollbacks=rolled_back)
        self._step = step
        for sink in self._sinks:
            sink.open(step)
        if sys.stderr.isatty():
            if self._bar is not None:
                self._bar.close()
            self._bar = tqdm(total=self._total, initial=step, unit="step", dynamic_ncols=True, smoothing=0.1)

    def advance(self) -> None:
        if self._bar is not None:
            self._bar.update(1)

    def metrics(self, values: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl."""
        self._append(METRICS_FILE, values)
        self._send("train", values)
        short = f"loss {values['loss']:.4f} · lr {values['lr']:.2e} · {values['samples_per_s']:.0f} samples/s"
        if self._bar is not None:
            self._bar.set_postfix_str(short)
        elif _worth_a_line(values["step"], self._total):
            self.say(f"step {values['step']}/{self._total} · {short}")

    def evaluation(self, values: Mapping[str, Any]) -> None:
        """One line of eval.jsonl."""
        self._append(EVAL_FILE, values)
        self._send("eval", values)
        shown = ", ".join(f"{name} {values[name]:.4f}" for name in SHOWN_METRICS if name in values)
        self.say(f"step {values['step']}: {shown}")

    def event(self, name: str, step: int, message: str, **values: Any) -> None:
        """Something that is no ordinary step, in metrics.jsonl and on the terminal."""
        self._append(METRICS_FILE, {"event": name, "step": step, "message": message, **values})
        self.say(f"{name}: {message}")

    def say(self, line: str) -> None:
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)

    def _append(self, name: str, values: Mapping[str, Any]) -> None:
        self._pending.append((self._run_dir / name, values))
        self.write_pending()

    def write_pending(self) -> None:
        """Write the lines that wait. Those that the disk refuses wait on: a full disk is no reason to stop
        training."""
        while self._pending:
            path, values = self._pending[0]
            try:
                append_line(path, values)
            except OSError as error:
                if self.problem is None:
                    self.say(f"{path}: cannot be written ({error}); lines wait in memory until it can")
                self.problem = f"{path} cannot be written ({error})"
                return
            del self._pending[0]
        self.problem = None

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        for sink in self._sinks:
            sink.close(self._step)

    def _send(self, group: str, values: Mapping[str, Any]) -> None:
        self._step = values["step"]
        for sink in self._sinks:
            sink.write(group, values, values["step"])


class Silent(Reporter):
    """The reporter of the ranks that are not the main one."""

    def __init__(self) -> None:
        self._bar = None
        self._sinks = []
        self._pending = []
        self._step = 0
        self.problem = None

    @property
    def files(self) -> list[Path]:
        return []

    def start(self, step: int, *, rolled_back: bool = False) -> None: ...

    def metrics(self, values: Mapping[str, Any]) -> None: ...

    def evaluation(self, values: Mapping[str, Any]) -> None: ...

    def event(self, name: str, step: int, message: str, **values: Any) -> None: ...

    def say(self, line: str) -> None: ...


def _worth_a_line(step: int, total: int) -> bool:
    """Twenty lines a run where there is no terminal to draw a bar on."""
    return step == 1 or step == total or step % max(1, total // 20) == 0
