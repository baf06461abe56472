"""The commands of docs/deploy.md for several machines without ssh: two launchers, here on one machine."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.clipstack.training_runs import metrics, weights_hash, write_recipe, write_shards
from tests.docs.pages import REPOSITORY, read_blocks

BIN = Path(sys.executable).parent
TIMEOUT_S = 240
SAYS_TWO_RANKS = {"torchrun": "global_world_sizes=[2]", "deepspeed": "dist_world_size=2"}
"""What a launcher logs."""


def documented(launcher: str, replacements: dict[str, str]) -> list[str]:
    """The guide's command from the launcher's name on, with values of this machine."""
    (block,) = [
        block for block in read_blocks("docs/deploy.md")
        if "several machines" in block.why and f" {launcher} " in block.text
    ]  # fmt: skip
    words = shlex.split(block.text.replace("\\\n", " "))
    words = words[words.index(launcher) : words.index("--config")]
    for old, new in replacements.items():
        assert old in words, f"{old}: not in the guide's command"
        words = [new if word == old else word for word in words]
    return [str(BIN / words[0]), *words[1:]]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_two_machines_train_one_model_without_ssh(launcher: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
    hosts = tmp_path / "hosts"
    hosts.write_text("node1 slots=1\nnode2 slots=1\n")
    recipe = write_recipe(tmp_path, write_shards(tmp_path / "shards"))
    overrides = [f"run.dir={tmp_path / 'run'}", "train.steps=3", "train.precision=fp32", "data.workers=0"]
    nodes = [
        subprocess.Popen(
            [*documented(launcher, values(launcher, node, port, hosts)), "--config", str(recipe), *overrides],
            cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            # No ssh is found on this path, whatever the machine has.
            env={**os.environ, "PATH": str(BIN), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
            | {"LOGLEVEL": "INFO"},
        )
        for node in range(2)
    ]  # fmt: skip
    try:
        logs = [node.communicate(timeout=TIMEOUT_S)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(logs)
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3]
    assert weights_hash(tmp_path / "run")
    assert all(SAYS_TWO_RANKS[launcher] in log for log in logs), "\n".join(logs)


def values(launcher: str, node: int, port: str, hosts: Path) -> dict[str, str]:
    if launcher == "torchrun":
        return {"8": "1", "node1:29500": f"127.0.0.1:{port}"}
    return {"/models/hosts": str(hosts), "0": str(node), "node1": "127.0.0.1", "29500": port}
