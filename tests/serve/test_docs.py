"""Every command of docs/serving.md and every example does what it says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from serve.app import create_app
from serve.settings import Settings, load_settings
from tests.serve.fakes import FakeRuntime
from tests.serve.live import live_server
from tests.serve.pictures import jpeg

REPOSITORY = Path(__file__).resolve().parents[2]
GUIDE = (REPOSITORY / "docs" / "serving.md").read_text(encoding="utf-8")
BLOCKS: list[tuple[str, str]] = re.findall(r"```(\w+)\n(.*?)```", GUIDE, flags=re.DOTALL)
START = "clipstack serve --model runs/demo\n"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    settings = Settings(
        models=("demo=unused",),  # type: ignore[arg-type]
        label_set_file=tmp_path_factory.mktemp("state") / "sets.sqlite3",
    )
    with live_server(create_app(settings, FakeRuntime())) as base:
        yield base


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("work")
    (made / "photo.jpg").write_bytes(jpeg(1))
    return made


def run(command: list[str], folder: Path, text: str | None = None) -> str:
    environ = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        command, cwd=folder, env=environ, input=text, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_guide_starts_the_server_as_the_command_line_has_it() -> None:
    """The process tests start it; here, that the guide's own line parses to the model it names."""
    import argparse

    from serve.cli import add_arguments, settings_of

    assert BLOCKS[0] == ("bash", START)
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    settings = settings_of(parser.parse_args(START.split()[2:]), {})
    assert [spec.source for spec in settings.models] == ["runs/demo"]


@pytest.mark.parametrize("block", [text for kind, text in BLOCKS if kind == "bash" and text != START])
def test_each_shell_command_of_the_guide_works(block: str, url: str, folder: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    run(["sh", "-eu"], folder, block.replace("http://127.0.0.1:8000", url))
    if "photo.f32" in block:
        assert np.linalg.norm(np.fromfile(folder / "photo.f32", "<f4")) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("block", [text for kind, text in BLOCKS if kind == "python"])
def test_each_python_block_of_the_guide_works(block: str, url: str, folder: Path) -> None:
    run([sys.executable, "-"], folder, block.replace("http://127.0.0.1:8000", url))


def test_the_settings_file_of_the_guide_is_sound() -> None:
    (block,) = [text for kind, text in BLOCKS if kind == "toml"]
    settings = load_settings(tomllib.loads(block))
    assert settings.models[0].id == "demo" and settings.rate_limit_per_s == 20


def test_the_python_examples_work(url: str, folder: Path) -> None:
    examples = REPOSITORY / "examples"
    assert "16 dimensions" in run([sys.executable, str(examples / "serve_openai.py"), url], folder)
    answer = run(
        [sys.executable, str(examples / "serve_client.py"), "photo.jpg", "cat", "dog", "--url", url], folder
    )
    assert len(answer.splitlines()) == 2


def test_the_curl_example_works(url: str, folder: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    assert '"deleted":true' in run(["sh", str(REPOSITORY / "examples" / "serve_curl.sh"), url], folder)


def test_limits_named_in_the_guide_are_the_defaults() -> None:
    settings = Settings()
    assert settings.max_body_bytes == 32 << 20 and settings.max_image_bytes == 10 << 20
    assert settings.max_image_pixels == 50_000_000 and settings.max_queue_items == 512
    assert (settings.max_texts, settings.max_images, settings.request_timeout_ms) == (256, 64, 30_000)
    assert settings.host == "127.0.0.1" and settings.url_fetch_hosts == ()
