"""What a run tells: metrics.jsonl, eval.jsonl, a progress bar or plain lines, TensorBoard, Weights &
Biases."""

from __future__ import annotations

import json
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
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
METRICS_FILE, EVAL_FILE, QUARANTINE_FILE = "metrics.jsonl", "eval.jsonl", "quarantine.jsonl"
WANDB_ID_FILE = "wandb-id.txt"
RETRY_S = 600.0
"""Between two tries to reach a sink that failed."""


class Sink(Protocol):
    """A place for numbers besides the run folder. Each method raises OSError where it cannot be reached."""

    name: str

    def open(self, step: int) -> None:
        """Begin after `step`, or go back to there."""

    def write(self, group: str, values: Mapping[str, Any], step: int) -> None: ...

    def close(self) -> None: ...


class PatientSink:
    """A sink that may fail: it says so once, tries again later, and never ends a run. What it misses stands
    in the run folder."""

    def __init__(self, sink: Sink, tell: Callable[[int, str], None]) -> None:
        self._sink, self._tell = sink, tell
        self._is_down = False
        self._retry_at = 0.0

    def open(self, step: int) -> None:
        self._try(step, lambda: self._sink.open(step))

    def write(self, group: str, values: Mapping[str, Any], step: int) -> None:
        if self._is_down:
            if time.monotonic() < self._retry_at or not self._try(step, lambda: self._sink.open(step - 1)):
                return
            self._is_down = False
            self._tell(step, f"{self._sink.name}: works again; the lines between are in the run folder only")
        self._try(step, lambda: self._sink.write(group, values, step))

    def close(self, step: int) -> None:
        if not self._is_down:
            self._try(step, self._sink.close)

    def _try(self, step: int, action: Callable[[], None]) -> bool:
        try:
            action()
        except OSError as error:
            self._retry_at = time.monotonic() + RETRY_S
            if not self._is_down:
                self._is_down = True
                self._tell(
                    step, f"{self._sink.name}: cannot be written ({error}); training goes on without it"
                )
            return False
        return True


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
        self._sinks = [PatientSink(sink, self._tell_of_sink) for sink in _sinks(run_dir, recipe.log)]

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
            _cut_back(self._run_dir / name, step, keep_rollbacks=rolled_back)
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
    try:
        lines = read_lines(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error}); move it away and run the same command again"
        ) from error
    kept = [
        json.dumps(line) + "\n"
        for line in lines
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
    name = "log.tensorboard"

    def __init__(self, run_dir: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                "log.tensorboard = true: not installed; pip install 'clipstack[tensorboard]'"
            ) from error
        self._make, self._folder = SummaryWriter, str(run_dir / "tensorboard")
        self._writer: SummaryWriter | None = None

    def open(self, step: int) -> None:
        self._drop()
        # What an earlier launch, or a roll-back, wrote of later steps is hidden.
        self._writer = self._make(self._folder, purge_step=step + 1)

    def write(self, group: str, values: Mapping[str, Any], step: int) -> None:
        assert self._writer is not None, "open comes first"
        for name, value in numbers(values):
            self._writer.add_scalar(f"{group}/{name}", value, step)
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _drop(self) -> None:
        """Let go of a writer that may have failed: it fails again when it is closed."""
        with suppress(OSError):
            self.close()
        self._writer = None


class _Wandb:
    name = "log.wandb"

    def __init__(self, run_dir: Path, project: str) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(
                f"log.wandb = {project!r}: not installed; pip install 'clipstack[wandb]'"
            ) from error
        self._wandb, self._run_dir, self._project = wandb, run_dir, project
        self._run: wandb.Run | None = None

    def open(self, step: int) -> None:
        if self._run is None:
            with self._as_os_error():
                self._run = self._wandb.init(
                    project=self._project,
                    dir=str(self._run_dir),
                    name=self._run_dir.name,
                    id=wandb_id(self._run_dir),
                    resume="allow",
                )

    def write(self, group: str, values: Mapping[str, Any], step: int) -> None:
        assert self._run is not None, "open comes first"
        with self._as_os_error():
            self._run.log({f"{group}/{name}": value for name, value in numbers(values)}, step=step)

    def close(self) -> None:
        if self._run is not None:
            with self._as_os_error():
                self._run.finish()

    @contextmanager
    def _as_os_error(self) -> Iterator[None]:
        try:
            yield
        except self._wandb.Error as error:
            raise OSError(str(error)) from error


def wandb_id(run_dir: Path) -> str:
    """The name of this run at Weights & Biases: drawn once and kept in the run folder, so that runs whose
    folders are named alike stay apart, and a folder that is moved stays the same run. Raises OSError."""
    path = run_dir / WANDB_ID_FILE
    if not path.exists():
        write_text(path, secrets.token_hex(8) + "\n")
    return path.read_text(encoding="utf-8").strip()


def numbers(values: Mapping[str, Any]) -> Sequence[tuple[str, float]]:
    return [
        (name, float(value))
        for name, value in values.items()
        if isinstance(value, int | float) and name != "step"
    ]
