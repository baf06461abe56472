"""The server as a process: start, stop, signals, mistakes on the command line."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import numpy as np
import pytest

from serve.security import hash_token
from tests.serve.models import save_model, tiny_model
from tests.serve.pictures import data_uri, jpeg
from tests.serve.process import REPOSITORY, server_process


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("tiny") / "demo", tiny_model())


class Load(threading.Thread):
    """Sends requests one after another, each on a connection of its own, until the server is gone."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.url = url
        self.statuses: list[int] = []
        self.broken: list[str] = []
        self.some_answered = threading.Event()
        body = {"model": "demo", "input": ["a cat", {"image": data_uri(jpeg(1, width=640, height=480))}]}
        self.body = json.dumps(body).encode()

    def run(self) -> None:
        while True:
            with httpx.Client(timeout=30) as client:
                try:
                    reply = client.post(f"{self.url}/v1/embeddings", content=self.body)
                except httpx.ConnectError:
                    return  # the port is closed: nothing was accepted
                except httpx.HTTPError as error:
                    self.broken.append(repr(error))
                    return
            self.statuses.append(reply.status_code)
            if len(self.statuses) == 5:
                self.some_answered.set()
            if reply.status_code == 503:
                return  # told to go elsewhere


def test_sigterm_under_load_loses_nothing_and_exits_0(folder: Path, tmp_path: Path) -> None:
    with server_process("--model", str(folder), state=tmp_path) as server:
        server.wait_for("model loaded")
        threads = [Load(server.url) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            assert thread.some_answered.wait(60)
        assert server.stop(signal.SIGTERM) == 0
        for thread in threads:
            thread.join(60)
        assert [thread.broken for thread in threads] == [[]] * 4
        assert {status for thread in threads for status in thread.statuses} <= {200, 503}
        answered = server.wait_for("stopped")["answered"]
        assert answered == sum(len(thread.statuses) for thread in threads)
        assert not _alive_in_group(server.process.pid)


def _alive_in_group(parent: int) -> list[str]:
    """Processes whose parent was the server: there must be none left."""
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            text = status.read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if f"\nPPid:\t{parent}\n" in text:
            found.append(text.splitlines()[0])
    return found


ENDLESS_LOAD = """
import argparse, sys, threading
import serve.app
from serve.cli import add_arguments, run
serve.app.loaders_of = lambda settings, runtime: {"demo": threading.Event().wait}
parser = argparse.ArgumentParser()
add_arguments(parser)
sys.exit(run(parser.parse_args()))
"""


def test_sigterm_while_a_model_is_loading_ends_the_process(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-c", ENDLESS_LOAD, "--model", "demo=unused", "--port", str(port)],
        cwd=REPOSITORY, env={**os.environ, "XDG_STATE_HOME": str(tmp_path)},
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        with httpx.Client(transport=httpx.HTTPTransport(retries=8), timeout=60) as client:  # up to a minute
            assert client.get(f"http://127.0.0.1:{port}/readyz").status_code == 503
        server.send_signal(signal.SIGTERM)
        _, log = server.communicate(timeout=60)
    finally:
        server.kill()
        server.wait()
    assert server.returncode == 0
    assert '"event": "stopped"' in log and "Traceback" not in log


def test_a_model_s_name_vectors_and_label_sets_are_the_same_after_a_restart(
    folder: Path, tmp_path: Path
) -> None:
    seen = []
    for run, way in enumerate((signal.SIGINT, signal.SIGTERM)):
        with server_process("--model", str(folder), state=tmp_path) as server:
            server.wait_for("model loaded")
            with httpx.Client(base_url=server.url, timeout=30) as client:
                assert client.get("/readyz").status_code == 200
                if run == 0:
                    client.put("/v1/label-sets/pets", json={"labels": ["cat", "dog"]}).raise_for_status()
                question = {"inputs": [{"image": data_uri(jpeg(1))}], "label_set": "pets"}
                seen.append(client.post("/v1/classify", json=question).json())
            assert server.stop(way) == 0
    assert seen[0]["fingerprint"] == seen[1]["fingerprint"]
    first, second = ([entry["logit"] for entry in reply["data"][0]["predictions"]] for reply in seen)
    np.testing.assert_allclose(first, second, atol=1e-4)


def command(
    *arguments: str, cwd: Path = REPOSITORY, given: str = "sk-secret\n"
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "serve.cli", *arguments],
        cwd=cwd, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True,
        timeout=120, check=False, input=given,
    )  # fmt: skip


def test_without_a_model_it_says_how_to_get_one(tmp_path: Path) -> None:
    (tmp_path / "runs/demo/checkpoints").mkdir(parents=True)  # of a training that never began
    done = command(cwd=tmp_path)
    assert done.returncode == 2
    assert "nothing to serve" in done.stderr and "clipstack demo" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--model", "./nowhere"), ("nowhere",)),
        (("--port", "abc"), ("port", "abc")),
        (("--model", "ViT-B-32", "--label-set-file", "/dev/null/sets"), ("label_set_file", "/dev/null/sets")),
    ],
)
def test_mistakes_end_with_one_line(
    tmp_path: Path, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    done = command(
        "--label-set-file", str(tmp_path / "sets"), "--log-level", "error", "--host", "127.0.0.1", *arguments
    )
    assert done.returncode in (1, 2)
    last = done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in last


def test_a_token_is_hashed_for_the_settings() -> None:
    assert command("--hash-token").stdout.strip() == hash_token("sk-secret")


def test_no_token_has_no_hash() -> None:
    done = command("--hash-token", given="\n")
    assert (done.returncode, done.stdout) == (2, "") and "--hash-token: no token" in done.stderr
