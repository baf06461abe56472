"""What a built image starts, run as Docker would: its own user, process 1, a root of its own, volumes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx

from tests.clipstack.launching import wait_until

USER = 10001
START_S = 120
Access = Literal["rw", "ro"]
# In a mount namespace of its own: volumes are bound, and the root becomes read-only where that is asked for;
# /dev holds the usual devices, and localhost has an address. Then the command becomes process 1, without
# rights and without a way to get any.
SCRIPT = """
set -eu
root=$1 access=$2
shift 2
mount --bind "$root" "$root"
while [ "$1" != -- ]; do
    mount --bind "$1" "$root/$2"
    mount -o "remount,bind,$3" "$root/$2"
    shift 3
done
shift
touch "$root/etc/hosts"
mount --bind /etc/hosts "$root/etc/hosts"
mount -t proc proc "$root/proc"
mount -t tmpfs -o mode=755 tmpfs "$root/dev"
for name in null zero urandom random; do
    touch "$root/dev/$name"
    mount --bind "/dev/$name" "$root/dev/$name"
done
mkdir "$root/dev/shm"
mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"
mount -o remount,ro "$root/dev"
mount -o "remount,bind,$access" "$root"
exec setpriv --no-new-privs chroot --userspec=%d:%d --groups= "$root" "$@"
""" % (USER, USER)  # noqa: UP031 - the script has braces of its own


@dataclass(frozen=True)
class Volume:
    """A folder of this machine, and where the image sees it."""

    source: Path
    target: str
    access: Access = "rw"


def start_inside(
    root: Path,
    command: Sequence[str],
    *,
    volumes: Sequence[Volume],
    access: Literal["rw", "ro"],
    **options: Any,
) -> subprocess.Popen[str]:
    """A command as process 1 in the image's file system. access: to the root itself. options: of Popen."""
    mounts = [word for volume in volumes for word in (str(volume.source), volume.target, volume.access)]
    return subprocess.Popen(
        ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", SCRIPT, "sh",
         str(root), access, *mounts, "--", *command],
        stdin=subprocess.DEVNULL, text=True, **options,
    )  # fmt: skip


def as_configured(config: dict[str, Any], *environ: str) -> list[str]:
    """The start of a command line: an image's environment and folder, and more variables (NAME=value)."""
    return ["/usr/bin/env", "-i", "-C", config["WorkingDir"], *config["Env"], *environ]


class ImageServer:
    """The process that an image starts. root: its file system. config: as `docker inspect` shows it."""

    def __init__(
        self, root: Path, config: dict[str, Any], *arguments: str, models: Path, state: Path, log: Path
    ) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        environ = [f"CLIPSTACK_SERVE_PORT={port}", "OMP_NUM_THREADS=1", "HOME=/state"]
        self._inside = as_configured(config, *environ)
        self._started_at = time.monotonic()
        with log.open("a") as output:
            self.process = start_inside(
                root, [*self._inside, *config["Entrypoint"], *arguments],
                volumes=[Volume(models, "/models", "ro"), Volume(state, "/state")], access="ro",
                stdout=output, stderr=output,
            )  # fmt: skip

    def wait_until_ready(self) -> float:
        """Seconds from the start to the first good answer of /readyz."""
        with httpx.Client(base_url=self.url) as client:
            wait_until(lambda: self._is_ready(client), START_S, "readiness")
        return time.monotonic() - self._started_at

    def _is_ready(self, client: httpx.Client) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        try:
            return client.get("/readyz").status_code == 200
        except httpx.TransportError:
            return False

    @property
    def pid(self) -> int:
        """Of the server, as this machine counts."""
        parent = self.process.pid
        (child,) = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        return int(child)

    def processor_s(self) -> float:
        """Processor time that the server has used so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        user, system = int(fields[11]), int(fields[12])
        return (user + system) / os.sysconf("SC_CLK_TCK")

    def status(self) -> dict[str, list[str]]:
        """/proc/PID/status, by name."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return {name: value.split() for name, _, value in (line.partition(":") for line in lines)}

    def run_inside(self, *command: str) -> int:
        """The exit status of another command, as `docker exec` and health checks run it."""
        entered = [
            "nsenter",
            "--target",
            str(self.pid),
            "--mount",
            "--root",
            "-S",
            str(USER),
            "-G",
            str(USER),
        ]
        done = subprocess.run([*entered, *self._inside, *command], capture_output=True, check=False)
        return done.returncode

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGTERM)

    def events(self) -> list[dict[str, Any]]:
        """What it logged."""
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]


@contextmanager
def image_server(
    root: Path, config: dict[str, Any], *arguments: str, models: Path, state: Path, log: Path
) -> Iterator[ImageServer]:
    """Killed at the end of the block, if it still runs; its mounts go with its namespace."""
    server = ImageServer(root, config, *arguments, models=models, state=state, log=log)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.wait()
