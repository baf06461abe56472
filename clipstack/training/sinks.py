"""Where numbers go besides the run folder: TensorBoard and Weights & Biases, whose failures end no run."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from clipstack.config.models import LogConfig
from clipstack.errors import ConfigError, how_to_install
from clipstack.files import write_text

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


def open_sinks(run_dir: Path, config: LogConfig) -> list[Sink]:
    """Those that the recipe asks for. Raises ConfigError where one is not installed."""
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
                f"log.tensorboard = true: not installed; {how_to_install('tensorboard')}"
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
            raise ConfigError(f"log.wandb = {project!r}: not installed; {how_to_install('wandb')}") from error
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
    """What of a log line can be drawn as a curve."""
    return [
        (name, float(value))
        for name, value in values.items()
        if isinstance(value, int | float) and name != "step"
    ]
