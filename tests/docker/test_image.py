"""The image of the API, built and run for real, without a Docker engine."""

from __future__ import annotations

import os
import re
import signal
import time
from collections import Counter
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from serve.settings import Settings
from tests.docker.building import (
    REPOSITORY,
    Buildah,
    buildah,
    host_pip_config,
    skip_unless_possible,
    tree_size_bytes,
)
from tests.docker.running import USER, ImageServer, image_server
from tests.serve.models import save_model, tiny_model
from tests.serve.pictures import data_uri, jpeg
from tests.serve.process import server_process
from tests.serve.test_process import Load

IMAGE = "localhost/clipstack-serve-test:latest"
MAX_SIZE_BYTES = 1.6e9
ASKED = {"model": "demo", "input": ["a red circle", {"image": data_uri(jpeg(1, width=640, height=480))}]}
QUESTION = {"inputs": [{"image": data_uri(jpeg(2))}], "label_set": "pets"}
COMPILERS = re.compile(r"(.*-)?(gcc|g\+\+|cc|c\+\+|clang|ld|as|make|nvcc)(-\d+)?")
TRAINING = {"deepspeed", "webdataset", "tensorboard", "wandb", "pytest", "triton", "polars", "pip"}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_built_image_serves_as_the_checkout_does_and_stops_without_loss(
    tmp_path: Path, record_property: Any
) -> None:
    """One test, since the image takes minutes to build. What it measures is in docs/deploy.md."""
    skip_unless_possible()
    models, state = tmp_path / "models", tmp_path / "state"
    folder = save_model(models / "demo", tiny_model())
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors writes files that only their owner may read
    state.mkdir()
    os.chown(state, USER, USER)
    with buildah() as tool:
        root, config = build(tool, tmp_path)
        size_bytes = tree_size_bytes(root)
        check_contents(root)
        check_config(config)
        assert size_bytes <= MAX_SIZE_BYTES, f"{size_bytes / 1e9:.2f} GB"

        def start(number: int) -> Any:
            return image_server(
                root, config, "--model", "/models/demo",
                models=models, state=state, log=tmp_path / f"server-{number}.log",
            )  # fmt: skip

        with start(1) as server:
            ready_s, processor_s = server.wait_until_ready(), server.processor_s()
            check_process(server, config)
            inside = embeddings(server.url)
            httpx.put(f"{server.url}/v1/label-sets/pets", json={"labels": ["cat", "dog"]}).raise_for_status()
            before = logits(server.url)
            stop_under_load(server)
        with start(2) as server:
            server.wait_until_ready()
            np.testing.assert_allclose(logits(server.url), before, rtol=1e-5, err_msg="after a restart")
            server.terminate()
            assert server.process.wait(60) == 0
    with server_process("--model", str(folder), state=tmp_path / "outside") as outside:
        outside.wait_for("model loaded")
        # Not to the bit: what is computed in one batch depends on what arrives together.
        np.testing.assert_allclose(inside, embeddings(outside.url), rtol=0, atol=1e-6)
        assert outside.stop(signal.SIGTERM) == 0
    assert (state / "label-sets.sqlite3").is_file()
    record_property("image_gb", round(size_bytes / 1e9, 2))
    record_property("start_to_ready_s", round(ready_s, 1))
    record_property("start_to_ready_processor_s", round(processor_s, 1))
    print(f"image: {size_bytes / 1e9:.2f} GB")
    print(f"ready after {ready_s:.1f} s, {processor_s:.1f} s of them processor time")


def build(tool: Buildah, folder: Path) -> tuple[Path, dict[str, Any]]:
    """The image's root file system, and its configuration."""
    pip_config = folder / "pip.conf"
    pip_config.write_text(host_pip_config())
    tool.build(REPOSITORY / "docker/serve.Dockerfile", IMAGE, pip_config=pip_config)
    return tool.root_of(IMAGE), tool.config(IMAGE)


def check_contents(root: Path) -> None:
    programs = {path.name for bin in ("bin", "usr/bin", "usr/local/bin") for path in (root / bin).glob("*")}
    assert "python3" in programs
    assert [name for name in programs if COMPILERS.fullmatch(name)] == []
    (site,) = (root / "opt/venv/lib").glob("python3.*/site-packages")
    packages = {
        name(entry.name): entry.version.partition("+")[0] for entry in distributions(path=[str(site)])
    }
    assert {"torch", "open-clip-torch", "fastapi", "clipstack"} <= packages.keys()
    assert packages.keys() & TRAINING == set()
    pins = dict(line.split("==") for line in (REPOSITORY / "constraints.txt").read_text().split())
    pinned = {name(key): version for key, version in pins.items()}
    assert {key: pinned.get(key) for key in packages.keys() - {"clipstack"}} == {
        key: version for key, version in packages.items() if key != "clipstack"
    }
    # Nothing of the checkout but the packages that are installed.
    assert not [path for path in (root / "models", root / "state") if any(path.iterdir())]
    assert not (root / "build").exists()


def name(package: str) -> str:
    """As PyPI compares names."""
    return re.sub(r"[-_.]+", "-", package).lower()


def check_config(config: dict[str, Any]) -> None:
    assert config["User"] == f"{USER}:{USER}"
    assert config["Entrypoint"] == ["clipstack", "serve"] and not config.get("Cmd")
    assert config["Volumes"].keys() == {"/state"}
    assert config["StopSignal"] in ("SIGTERM", "15")
    assert config["Healthcheck"]["Test"][0] == "CMD"  # no shell
    assert not [entry for entry in config["Env"] if "PIP" in entry or "INDEX" in entry]


def check_process(server: ImageServer, config: dict[str, Any]) -> None:
    """Not root, without capabilities, process 1, nothing writable but its volume; the health check agrees."""
    status = server.status()
    assert status["Uid"] == status["Gid"] == [str(USER)] * 4
    assert int(status["CapEff"][0], 16) == 0
    assert status["NSpid"][-1] == "1"
    for folder in ("/", "/tmp", "/models", "/opt/venv", "/var/tmp", "/dev"):
        assert server.run_inside("sh", "-c", f"echo x > {folder}/written") != 0, folder
    assert server.run_inside("sh", "-c", "echo x > /state/written && rm /state/written") == 0
    assert server.run_inside(*config["Healthcheck"]["Test"][1:]) == 0


def embeddings(url: str) -> NDArray[np.float32]:
    """(2, D) of a text and an image."""
    reply = httpx.post(
        f"{url}/v1/embeddings", json=ASKED, headers={"Accept": "application/octet-stream"}, timeout=30
    )
    reply.raise_for_status()
    return np.frombuffer(reply.content, "<f4").reshape(2, -1)


def logits(url: str) -> list[float]:
    reply = httpx.post(f"{url}/v1/classify", json=QUESTION, timeout=30)
    reply.raise_for_status()
    return [entry["logit"] for entry in reply.json()["data"][0]["predictions"]]


def stop_under_load(server: ImageServer) -> None:
    """SIGTERM while four clients ask: each request that was accepted is answered, within the grace."""
    clients = [Load(server.url) for _ in range(4)]
    for client in clients:
        client.start()
    for client in clients:
        assert client.some_answered.wait(60)
    asked_at = time.monotonic()
    server.terminate()
    assert server.process.wait(60) == 0
    assert time.monotonic() - asked_at <= Settings().grace_s
    for client in clients:
        client.join(60)
    assert [client.broken for client in clients] == [[]] * 4
    assert {status for client in clients for status in client.statuses} <= {200, 503}
    assert [event["event"] for event in server.events()][-1] == "stopped"
    # By the server's own account no request was taken and not answered; one was there before the clients.
    taken = Counter(
        event["status"]
        for event in server.events()
        if event["event"] == "request" and event["route"] in ("/v1/embeddings", "other")
    )
    assert taken == Counter(status for client in clients for status in client.statuses) + Counter([200])
