"""The image of the trainer, built and run for real, without a Docker engine."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.clipstack.training_runs import metrics, weights_hash, write_recipe, write_shards
from tests.docker.building import (
    REPOSITORY,
    Buildah,
    buildah,
    host_pip_config,
    skip_unless_possible,
    tree_size_bytes,
)
from tests.docker.running import USER, Volume, as_configured, start_inside

IMAGE = "localhost/clipstack-train-test:latest"
PACKAGES = "g++ libpython3-dev"
"""What Debian's own Python needs to compile extensions."""
COMMAND_TIMEOUT_S = 240
EXTENSION = "deepspeed_shm_comm"
LOAD = """
from deepspeed.accelerator import get_accelerator
get_accelerator().create_op_builder("ShareMemCommBuilder").load()
"""
"""What a script of DeepSpeed's own does at its start on a CPU."""
COMPILED = re.compile(r".*\.(o|so|cubin|ptx|ninja)")


class TrainImage:
    """The image's file system, where commands run as its user. /models and /cache are volumes."""

    def __init__(self, root: Path, config: dict[str, Any], folder: Path) -> None:
        self.root, self.config, self.folder = root, config, folder
        self.models, self.cache = folder / "models", folder / "cache"
        for volume in (self.models, self.cache):
            volume.mkdir()
            os.chown(volume, USER, USER)

    def run(self, *command: str, environ: Sequence[str] = ()) -> str:
        """What it printed. AssertionError with all of it if it fails."""
        process = start_inside(
            self.root,
            [*as_configured(self.config, "OMP_NUM_THREADS=1", *environ), *command],
            volumes=[
                Volume(self.folder / "data", "/data", "ro"),
                Volume(self.models, "/models"),
                Volume(self.cache, "/cache"),
            ],
            access="rw",  # as docs/deploy.md starts it
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        try:
            output, _ = process.communicate(timeout=COMMAND_TIMEOUT_S)
        finally:
            process.kill()
            process.wait()
        assert process.returncode == 0, f"{command}: {process.returncode}\n{output[-6000:]}"
        return output

    def compiled(self) -> dict[str, int]:
        """What compilers wrote, wherever a user of the image may write -> when."""
        places = [self.root / "opt/extensions", self.root / "tmp", self.models, self.cache]
        return {
            str(path): path.stat().st_mtime_ns
            for place in places
            for path in place.rglob("*")
            if COMPILED.fullmatch(path.name)
        }


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_built_trainer_trains_on_two_ranks_and_compiles_nothing(
    tmp_path: Path, record_property: Any
) -> None:
    """One test, since the image takes minutes to build. What it measures is in docs/deploy.md."""
    skip_unless_possible()
    data = tmp_path / "data"
    recipe = "/data/" + write_recipe(data, write_shards(data)).name
    with buildah() as tool:
        started_at = time.monotonic()
        image = build(tool, tmp_path)
        build_s = time.monotonic() - started_at
        size_bytes = tree_size_bytes(image.root)
        check_config(image.config)
        assert image.compiled()[str(image.root / f"opt/extensions/{EXTENSION}/{EXTENSION}.so")]
        before = image.compiled()

        # The three programs that docs/deploy.md names, and the image's own command.
        assert "--no_ssh" in image.run("deepspeed", "--help", environ=["DS_ACCELERATOR=cpu"])
        assert "--rdzv-endpoint" in image.run("torchrun", "--help").replace("_", "-")
        assert "train" in image.run(*image.config["Cmd"])

        # Data of its own making, two ranks by either launcher: the same weights.
        image.run(
            "clipstack",
            "data",
            "shapes",
            "--output",
            "/models/shapes",
            "--num-train",
            "64",
            "--num-test",
            "8",
        )
        image.run("clipstack", "data", "verify", "/models/shapes")
        script = ["clipstack/train.py", "--config", recipe]
        script += ["data.train=/data/part-*.tar", "train.steps=4", "train.precision=fp32"]
        image.run(
            "deepspeed", "--num_accelerators", "2", *script, "run.dir=/models/by-deepspeed",
            environ=["DS_ACCELERATOR=cpu"],
        )  # fmt: skip
        image.run(
            "torchrun", "--nproc_per_node", "2", *script, "run.dir=/models/by-torchrun",
            environ=["DS_ACCELERATOR=cpu"],
        )  # fmt: skip
        runs = [image.models / "by-deepspeed", image.models / "by-torchrun"]
        assert [[line["step"] for line in metrics(run)] for run in runs] == [[1, 2, 3, 4]] * 2
        assert weights_hash(runs[0]) == weights_hash(runs[1])
        assert {path.stat().st_uid for run in runs for path in run.rglob("*")} == {USER}

        # A script that asks DeepSpeed for the extension finds it made.
        image.run("python", "-c", LOAD, environ=["DS_ACCELERATOR=cpu"])
        assert image.compiled() == before
    record_property("image_gb", round(size_bytes / 1e9, 2))
    print(f"image: {size_bytes / 1e9:.2f} GB; built in {build_s:.0f} s")


def build(tool: Buildah, folder: Path) -> TrainImage:
    pip_config = folder / "pip.conf"
    pip_config.write_text(host_pip_config())
    dockerfile = REPOSITORY / "docker/train.Dockerfile"
    tool.build(dockerfile, IMAGE, pip_config=pip_config, DEBIAN_PACKAGES=PACKAGES)
    return TrainImage(tool.root_of(IMAGE), tool.config(IMAGE), folder)


def check_config(config: dict[str, Any]) -> None:
    assert config["User"] == f"{USER}:{USER}"
    assert not config.get("Entrypoint") and config["Cmd"] == ["clipstack", "--help"]
    assert config["Volumes"].keys() == {"/cache"}
    assert config["StopSignal"] in ("SIGTERM", "15")
    assert not [entry for entry in config["Env"] if "PIP" in entry or "INDEX" in entry]
