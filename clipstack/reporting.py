"""What a run tells: metrics.jsonl, eval.jsonl, a progress bar or plain lines, TensorBoard, Weights &
Biases."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from clipstack.config import LogConfig, Recipe
from clipstack.errors import CheckpointError, ConfigError
from clipstack.files import write_text

SHOWN_METRICS = ("clip_loss", "top1", "mean_per_class_recall", "image_to_text_r1", "text_to_image_r1")
"""What of an evaluation goes to the terminal; eval.jsonl has all of it."""
ROLLED_BACK = "rolled_back"
"""The event of a roll-back; its step is the one gone back to."""
METRICS_FILE, EVAL_FILE = "metrics.jsonl", "eval.jsonl"


class Sink(Protocol):
    """A place for numbers besides the run folder."""

    def write(self, group: str, values: Mapping[str, Any], step: int) -> None: ...

    def close(self) -> None: ...


class Reporter:
    """Writes a run's numbers and speaks to the user. Rank 0 has one; the other ranks have a `Silent`."""

    def __init__(self, run_dir: Path, recipe: Recipe) -> None:
        self._run_dir = run_dir
        self._total = recipe.train.steps
        self._bar: tqdm[Any] | None = None
        self._pending: list[tuple[Path, Mapping[str, Any]]] = []
        self.problem: str | None = None
        """Why lines wait to be written; None where none do."""
        self._sinks = _sinks(run_dir, recipe.log)

    def start(self, step: int, *, rolled_back: bool = False) -> None:
        """Drop what lies beyond `step` from the logs, and show progress from there. Raises
        CheckpointError.

        rolled_back: not a resume: earlier roll-backs to this very step stay. A checkpoint does not know of
        roll-backs to itself, so a resumed run goes through them again.
        """
        self._pending = [(path, line) for path, line in self._pending if line["step"] <= step]
        for name in (METRICS_FILE, EVAL_FILE):
            _cut_back(self._run_dir / name, step, keep_rollbacks=rolled_back)
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
                _append(path, values)
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
            sink.close()

    def _send(self, group: str, values: Mapping[str, Any]) -> None:
        for sink in self._sinks:
            sink.write(group, values, values["step"])


class Silent(Reporter):
    """The reporter of the ranks that are not the main one."""

    def __init__(self) -> None:
        self._bar = None
        self._sinks = []
        self._pending = []
        self.problem = None

    def start(self, step: int, *, rolled_back: bool = False) -> None: ...

    def metrics(self, values: Mapping[str, Any]) -> None: ...

    def evaluation(self, values: Mapping[str, Any]) -> None: ...

    def event(self, name: str, step: int, message: str, **values: Any) -> None: ...

    def say(self, line: str) -> None: ...


def _worth_a_line(step: int, total: int) -> bool:
    """Twenty lines a run where there is no terminal to draw a bar on."""
    return step == 1 or step == total or step % max(1, total // 20) == 0


def _append(path: Path, values: Mapping[str, Any]) -> None:
    """Add one line, or nothing: where there is room for half a line only, it is taken back. Raises
    OSError."""
    size = path.stat().st_size if path.exists() else 0
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
    except OSError:
        if path.exists():
            os.truncate(path, size)
        raise


def _cut_back(path: Path, step: int, *, keep_rollbacks: bool) -> None:
    """Keep the lines up to `step`: what a crash logged after its last checkpoint will be logged again."""
    if not path.exists():
        return
    kept = [
        json.dumps(line) + "\n"
        for line in read_lines(path)
        if line["step"] < step
        or (line["step"] == step and (keep_rollbacks or line.get("event") != ROLLED_BACK))
    ]
    try:
        write_text(path, "".join(kept))
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be written ({error}); make room and run the same command again"
        ) from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file; a torn last line, as a crash leaves it, is dropped."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def _sinks(run_dir: Path, config: LogConfig) -> list[Sink]:
    sinks: list[Sink] = []
    if config.tensorboard:
        sinks.append(_TensorBoard(run_dir))
    if config.wandb is not None:
        sinks.append(_Wandb(run_dir, config.wandb))
    return sinks


class _TensorBoard:
    def __init__(self, run_dir: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                "log.tensorboard = true: not installed; pip install 'clipstack[tensorboard]'"
            ) from error
        self._writer = SummaryWriter(str(run_dir / "tensorboard"))

    def write(self, group: str, values: Mapping[str, Any], step: int) -> None:
        for name, value in numbers(values):
            self._writer.add_scalar(f"{group}/{name}", value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, run_dir: Path, project: str) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(
                f"log.wandb = {project!r}: not installed; pip install 'clipstack[wandb]'"
            ) from error
        self._run = wandb.init(
            project=project, dir=str(run_dir), name=run_dir.name, id=run_dir.name, resume="allow"
        )

    def write(self, group: str, values: Mapping[str, Any], step: int) -> None:
        self._run.log({f"{group}/{name}": value for name, value in numbers(values)}, step=step)

    def close(self) -> None:
        self._run.finish()


def numbers(values: Mapping[str, Any]) -> Sequence[tuple[str, float]]:
    return [
        (name, float(value))
        for name, value in values.items()
        if isinstance(value, int | float) and name != "step"
    ]
