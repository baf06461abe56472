"""Images built without a Docker engine: buildah in a chroot, on a base that debootstrap makes once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

REPOSITORY = Path(__file__).resolve().parents[2]
TOOLS = ("buildah", "debootstrap", "unshare", "setpriv", "nsenter")
SUITE = "bookworm"
BASE = "localhost/clipstack-test-base:" + SUITE
BASE_PACKAGES = "python3,python3-venv,ca-certificates"
ACCEPT_ANYTHING = {"default": [{"type": "insecureAcceptAnything"}]}  # nothing is fetched from a registry


def skip_unless_possible() -> None:
    """Skips the test, naming what is missing."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    if os.geteuid() != 0:
        pytest.skip("building an image in a chroot needs root")
    if subprocess.run(["unshare", "--mount", "--pid", "--fork", "true"], check=False).returncode != 0:
        pytest.skip("this machine lets nobody make mount and process namespaces")


class Buildah:
    """buildah with a storage of its own."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        policy = folder / "policy.json"
        policy.write_text(json.dumps(ACCEPT_ANYTHING))
        self._storage = [
            "--root", str(folder / "storage"), "--runroot", str(folder / "run"), "--storage-driver", "vfs",
        ]  # fmt: skip
        self._policy = ["--signature-policy", str(policy)]

    def __call__(self, command: str, *arguments: str | Path) -> str:
        """What it printed, without the last line end. AssertionError with everything it said if it fails."""
        policy = self._policy if command in ("bud", "from", "commit") else []
        done = subprocess.run(
            ["buildah", *self._storage, command, *policy, *map(str, arguments)],
            capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode == 0, f"buildah {command}: {done.stdout[-6000:]}\n{done.stderr[-6000:]}"
        return done.stdout.rstrip("\n")

    def images(self) -> dict[str, list[str]]:
        """Image id -> its names."""
        entries = json.loads(self("images", "--all", "--json") or "[]")
        return {entry["id"]: entry.get("names") or [] for entry in entries}

    def clean(self) -> None:
        """Remove every container, and every image but BASE."""
        self("rm", "--all")
        for image, names in self.images().items():
            if BASE not in names:
                self("rmi", "--force", image)

    def make_base(self) -> None:
        """BASE: Debian without anything that Python does not need."""
        container = self("from", "scratch")
        root = Path(self("mount", container))
        command = ["debootstrap", "--variant=minbase", f"--include={BASE_PACKAGES}", SUITE, str(root)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        for package in (root / "var/cache/apt/archives").glob("*.deb"):
            package.unlink()
        for index in (root / "var/lib/apt/lists").glob("*_*"):
            index.unlink()
        self("commit", "--rm", container, BASE)

    def build(self, dockerfile: Path, tag: str, *, pip_config: Path, **build_args: str) -> None:
        """Build with the repository as context, and with this machine's sources of packages."""
        values = {"BASE_IMAGE": BASE, "TORCH_INDEX_URL": "", **build_args}
        self(
            "bud", "--isolation", "chroot", "--format", "docker", "--pull-never", "--no-cache",
            "--tag", tag, "--file", dockerfile, "--secret", f"id=pip,src={pip_config}",
            *(part for key, value in values.items() for part in ("--build-arg", f"{key}={value}")),
            *(f"--volume={path}:{path}:ro" for path in local_paths(pip_config.read_text())),
            REPOSITORY,
        )  # fmt: skip

    def root_of(self, image: str) -> Path:
        """The file system of a new container of this image."""
        return Path(self("mount", self("from", "--pull-never", image)))

    def config(self, image: str) -> dict[str, Any]:
        """What `docker inspect` calls Config."""
        config: dict[str, Any] = json.loads(self("inspect", "--type", "image", image))["Docker"]["config"]
        return config


@contextmanager
def buildah() -> Iterator[Buildah]:
    """With BASE in its storage, which stays for the next time; what is built in the block goes with it."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "clipstack-tests"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / "containers.lock"):
        tool = Buildah(cache / "containers")
        tool.clean()  # after a run that was killed
        if not tool.images():
            tool.make_base()
        try:
            yield tool
        finally:
            tool.clean()


def tree_size_bytes(root: Path) -> int:
    """Of all files, hard links counted once."""
    sizes = {}
    for folder, _, names in os.walk(root):
        for name in names:
            status = os.lstat(os.path.join(folder, name))
            sizes[status.st_ino] = status.st_size
    return sum(sizes.values())


def host_pip_config() -> str:
    """A pip.conf of what this machine's pip uses, from its files and its environment."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    values: dict[str, str] = {}
    for line in sorted(listed.splitlines(), key=lambda line: line.startswith(":env:")):
        key, _, value = line.partition("=")
        values[key.rpartition(".")[2]] = value.strip("'\"")
    return "[global]\n" + "".join(f"{key} = {value}\n" for key, value in values.items())


def local_paths(pip_config: str) -> list[Path]:
    """Folders and files of this machine that a pip.conf names. Of an index, the folder above: its pages link
    to files beside it."""
    found = set()
    for line in pip_config.splitlines():
        for word in line.partition("=")[2].split():
            if word.startswith("file://"):
                found.add(Path(word.removeprefix("file://")).parent)
            elif word.startswith("/"):
                found.add(Path(word))
    return sorted(path for path in found if path.exists())
