"""One launch at a time in a run folder."""

from __future__ import annotations

import errno
import fcntl
import os
import sys
import time
from contextlib import suppress
from pathlib import Path

from clipstack.checkpoint.layout import CHECKPOINTS
from clipstack.errors import ConfigError

LOCK_FILE = ".lock"
LOCK_WAIT_S = 30.0
"""The ranks of a launch whose launcher was killed still save; the same command may be given meanwhile."""
LOCK_POLL_S = 0.1


class RunLock:
    """Keeps a second launch out of a run folder: an flock on RUN/.lock, which the kernel drops when the
    process that holds it ends, however it ends. One process of a launch takes it.

    A launch that fails before it wrote anything takes away what it made, unless other files lie there.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._file: int | None = None
        self._is_held = False
        self._made: tuple[Path, ...] = ()

    def take(self, *, at_most_s: float) -> None:
        """Wait a little for the ranks of a launch that is ending. Raises ConfigError for one that is not."""
        os.register_at_fork(after_in_child=self.release)  # loader workers must not hold it for us
        give_up = time.monotonic() + min(LOCK_WAIT_S, at_most_s)
        said = False
        while not self._is_taken():
            if time.monotonic() >= give_up:
                raise ConfigError(
                    f"run.dir = {str(self._run_dir)!r}: another launch is training in this folder (it holds "
                    f"{LOCK_FILE}); wait for it, stop it, or choose another folder"
                )
            if not said:
                print(f"{self._run_dir}: waiting for another launch to leave it", file=sys.stderr, flush=True)
                said = True
            time.sleep(LOCK_POLL_S)

    def _is_taken(self) -> bool:
        file = self._file = self._opened() if self._file is None else self._file
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise unwritable(self._run_dir, error) from error
            print(
                f"{self._run_dir}: its file system knows no locks ({error.strerror}); nothing keeps a second "
                "launch out",
                file=sys.stderr,
                flush=True,
            )
            return True
        if not self._lies_there(file):  # its launch failed and took it away: it keeps nobody out any more
            self.release()
            return False
        self._is_held = True
        return True

    def _lies_there(self, file: int) -> bool:
        try:
            return os.path.samestat(os.fstat(file), (self._run_dir / LOCK_FILE).stat())
        except FileNotFoundError:
            return False

    def _opened(self) -> int:
        above = (self._run_dir, *self._run_dir.parents)
        self._made = tuple(folder for folder in above if not os.path.exists(folder))
        make_folder(self._run_dir, self._run_dir)
        try:
            return os.open(self._run_dir / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise unwritable(self._run_dir, error) from error

    def release(self) -> None:
        """In a forked child this lets go of the child's copy only."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if kind is not None and self._is_held and self._file is not None:
            self._take_away()
        self.release()

    def _take_away(self) -> None:
        """What a start makes, where nothing lies beside it or in it."""
        lock, empty = self._run_dir / LOCK_FILE, self._run_dir / CHECKPOINTS
        with suppress(OSError):  # what cannot go stays: the error that brought us here is the one to tell
            if not {*self._run_dir.iterdir()} <= {lock, empty}:
                return
            if empty.exists():
                empty.rmdir()
            lock.unlink()
            for folder in self._made:
                folder.rmdir()


def make_folder(folder: Path, run_dir: Path) -> None:
    """Raises ConfigError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"run.dir = {str(run_dir)!r}: cannot be made ({error}); choose another folder"
        ) from error


def unwritable(run_dir: Path, error: OSError) -> ConfigError:
    """The error of a run folder that the disk refuses to write in."""
    return ConfigError(
        f"run.dir = {str(run_dir)!r}: cannot be written ({error}); make room or choose another folder"
    )
