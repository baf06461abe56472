"""The wheel: what it carries, and that it works in an environment that has nothing but it and the base
dependencies."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from tests.clipstack.test_cli import NEEDS

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("clipstack", "serve", "data_pipelines")
HEAVY = {
    "torch",
    "torchvision",
    "open_clip_torch",
    "deepspeed",
    "fastapi",
    "polars",
    "pyarrow",
    "transformers",
}


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(out)]
    run(sys.executable, "-m", "pip", "wheel", "--quiet", *options, ROOT, cwd=out)
    (path,) = out.glob("clipstack-*.whl")
    return path


@pytest.fixture(scope="module")
def programs(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin/ of an empty environment with the wheel in it."""
    environment = tmp_path_factory.mktemp("empty") / "venv"
    run(sys.executable, "-m", "venv", environment, cwd=ROOT)
    pip = [environment / "bin/python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run(*pip, "--constraint", ROOT / "constraints.txt", wheel, cwd=ROOT)
    return environment / "bin"


@pytest.mark.slow
def test_the_wheel_carries_everything_that_the_checkout_has(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        carried = set(archive.namelist())
    for package in PACKAGES:
        files = [path for path in (ROOT / package).rglob("*") if path.is_file()]
        wanted = {str(path.relative_to(ROOT)) for path in files if "__pycache__" not in path.parts}
        assert f"{package}/py.typed" in wanted
        assert wanted <= carried, wanted - carried
    recipes = {f"clipstack/configs/{path.name}" for path in (ROOT / "configs").glob("*.toml")}
    assert "clipstack/configs/demo.toml" in recipes and recipes <= carried
    assert not {name for name in carried if name.startswith(("tests/", "benchmarks/", "docs/"))}


@pytest.mark.slow
def test_the_base_install_makes_and_checks_data(programs: Path, tmp_path: Path) -> None:
    clipstack = programs / "clipstack"
    assert "usage: clipstack COMMAND" in run(clipstack, "--help", cwd=tmp_path)
    run(
        clipstack,
        "data",
        "shapes",
        "--output",
        "shapes",
        "--num-train",
        "50",
        "--num-test",
        "10",
        cwd=tmp_path,
    )
    told = json.loads(run(clipstack, "data", "verify", "shapes", "--json", cwd=tmp_path))
    assert told["findings"] == [] and told["samples"] >= 60
    assert "seed" in run(clipstack, "train", "--help-config", cwd=tmp_path)


JPEG_SHARD = """
import io, tarfile
from PIL import Image
image = io.BytesIO()
Image.new("RGB", (32, 32), "red").save(image, "JPEG")
with tarfile.open("jpeg.tar", "w") as tar:
    for name, data in (("0.jpg", image.getvalue()), ("0.txt", b"a red square")):
        member = tarfile.TarInfo(name)
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
"""


@pytest.mark.slow
def test_the_base_install_names_the_extra_that_checking_jpegs_needs(programs: Path, tmp_path: Path) -> None:
    run(programs / "python", "-c", JPEG_SHARD, cwd=tmp_path)
    done = subprocess.run(
        [programs / "clipstack", "data", "verify", "jpeg.tar"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    said = done.stderr.splitlines()[-1]
    assert said.startswith(
        "error: clipstack data verify needs simplejpeg: pip install '.[data]' in the checkout"
    )


@pytest.mark.slow
def test_the_recipes_are_found_outside_of_a_checkout(programs: Path, tmp_path: Path) -> None:
    read = "from clipstack.config import load_recipe as r; print(r('configs/demo.toml').run.dir)"
    assert run(programs / "python", "-c", read, cwd=tmp_path).strip() == "runs/demo"


@pytest.mark.slow
def test_the_base_install_is_small(programs: Path, tmp_path: Path) -> None:
    listed = run(programs / "python", "-m", "pip", "list", "--format", "json", cwd=tmp_path)
    assert not HEAVY & {entry["name"].replace("-", "_") for entry in json.loads(listed)}
    files = (programs.parent / "lib").rglob("*")
    size_mb = sum(path.stat().st_size for path in files if path.is_file() and not path.is_symlink()) / 1e6
    assert size_mb < 250, f"{size_mb:.0f} MB"


@pytest.mark.slow
@pytest.mark.parametrize("command", NEEDS)
def test_a_command_whose_extra_is_missing_names_it(command: str, programs: Path, tmp_path: Path) -> None:
    arguments, extra = NEEDS[command]
    done = subprocess.run(
        [programs / "clipstack", command, *arguments.split()],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert re.match(rf"error: clipstack {command} needs \w+: pip install '\.\[{extra}\]'", done.stderr)
    assert not [*tmp_path.iterdir()], "nothing was begun"


@pytest.mark.slow
def test_doctor_tells_what_each_extra_would_bring(programs: Path, tmp_path: Path) -> None:
    told = run(programs / "clipstack", "doctor", cwd=tmp_path)
    assert "pip install '.[train]'" in told and "pip install '.[serve]'" in told


def test_every_version_that_is_pinned_once_is_pinned_exactly() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert lines and all("==" in line and "@" not in line for line in lines)
    names = [line.split("==")[0].lower().replace("_", "-") for line in lines]
    assert len(names) == len(set(names))


def test_the_development_extra_has_what_the_tests_import() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert any("websockets" in entry for entry in extras["dev"])
    assert all(name in extras["dev"][0] for name in ("train", "serve", "data", "eval", "onnx", "docs"))
    assert not any(entry.split(">")[0] in HEAVY for entry in project["dependencies"])


@pytest.mark.parametrize("file", ["CITATION.cff", "CHANGELOG.md"])
def test_the_version_is_told_everywhere(file: str) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert version in (ROOT / file).read_text()
    assert f'__version__ = "{version}"' in (ROOT / "clipstack/__init__.py").read_text()
