"""Runs the command blocks of the documentation, page by page, as a reader would: in order, in one folder.

A comment in the line before a block says what is to become of it:

    <!-- run -->            it has to end with exit code 0
    <!-- serve -->          it starts a server, which stays up until the page ends
    <!-- not run: WHY -->   nothing here can run it

Blocks run to the letter, with two exceptions. Recipes of `configs/` are small ones of the same names
(`small_recipe`). And the server listens on a free port, so `127.0.0.1:8000` is replaced by its address.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from clipstack.config import parse_recipe, to_toml

REPOSITORY = Path(__file__).resolve().parents[2]
COMMANDS = ("bash", "console", "python")
"""Languages of blocks that a reader would run."""
ADDRESS = "127.0.0.1:8000"
BLOCK_TIMEOUT_S = 200
START_TIMEOUT_S = 120
POLL_S = 0.05
_BLOCK = re.compile(
    r"^(?:<!-- (?P<mark>[^\n]*?) -->\n\n?)?^```(?P<language>[\w-]*)\n(?P<text>.*?)^```$", re.M | re.S
)
SMALL_MODEL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


@dataclass(frozen=True)
class Block:
    """A fenced block. mark: "run", "serve", "not run", or "" where nothing is said; why: of "not run"."""

    page: str
    line: int
    language: str
    mark: str
    why: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def read_blocks(page: str) -> list[Block]:
    """All fenced blocks of a page, named by its path below the repository."""
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    blocks = []
    for match in _BLOCK.finditer(text):
        mark, _, why = (match["mark"] or "").partition(": ")
        line = text.count("\n", 0, match.start("language")) + 1
        blocks.append(Block(page, line, match["language"], mark, why, match["text"]))
    return blocks


def run_page(page: str, folder: Path) -> None:
    """Run a page's blocks in `folder`, which holds what the page takes for granted. AssertionError names
    the block that failed and shows what it printed."""
    (folder / "clipstack").symlink_to(REPOSITORY / "clipstack")
    (folder / "configs").mkdir()
    for recipe in (REPOSITORY / "configs").glob("*.toml"):
        (folder / "configs" / recipe.name).write_text(small_recipe(recipe))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with ExitStack() as stack:
        for block in read_blocks(page):
            match block.mark:
                case "run":
                    _run(block, folder, port)
                case "serve":
                    stack.enter_context(_server(block, folder, port))


def small_recipe(path: Path) -> str:
    """A recipe that a CPU finishes in seconds: a tiny model, two steps of four pairs, no loader processes."""
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    table["model"] = SMALL_MODEL
    table["train"] |= {"steps": 2, "batch_size": 4, "micro_batch_size": 2, "precision": "fp32"}
    table["data"] |= {"workers": 0}
    return to_toml(parse_recipe(table))


def _run(block: Block, folder: Path, port: int) -> None:
    done = subprocess.run(
        _command(block, port), cwd=folder, env=_environment(folder, port), stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=BLOCK_TIMEOUT_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{block}: exit code {done.returncode}\n{done.stdout}"


def _command(block: Block, port: int) -> list[str]:
    text = block.text.replace(ADDRESS, f"127.0.0.1:{port}")
    if block.language == "python":
        return [sys.executable, "-c", text]
    return ["bash", "-euo", "pipefail", "-c", text]


def _environment(folder: Path, port: int) -> dict[str, str]:
    return {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "XDG_STATE_HOME": str(folder / ".state"),
        "CLIPSTACK_SERVE_PORT": str(port),
    }


@contextmanager
def _server(block: Block, folder: Path, port: int) -> Iterator[None]:
    """The server of a block, ready; at the end it is asked to stop and has to exit with 0."""
    log = folder / "server.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            _command(block, port), cwd=folder, env=_environment(folder, port), stdin=subprocess.DEVNULL,
            stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
    try:
        _wait_until_ready(process, f"http://127.0.0.1:{port}/readyz", f"{block}: {log}")
        yield
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(START_TIMEOUT_S) == 0, log.read_text()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, name: str) -> None:
    end = time.monotonic() + START_TIMEOUT_S
    while not _answers(url):
        assert process.poll() is None, f"{name}: ended with {process.returncode}"
        assert time.monotonic() < end, f"{name}: not ready in time"
        time.sleep(POLL_S)


def _answers(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 200
    except httpx.TransportError:
        return False
