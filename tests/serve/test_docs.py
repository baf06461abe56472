"""Every command of docs/serving.md and every example does what it says."""

from __future__ import annotations

import os
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
from tests.docs.pages import read_blocks, run_page
from tests.serve.fakes import FakeRuntime
from tests.serve.live import live_server
from tests.serve.models import save_model, tiny_model
from tests.serve.pictures import jpeg

REPOSITORY = Path(__file__).resolve().parents[2]


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


def run(command: list[str], folder: Path) -> str:
    environ = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        command, cwd=folder, env=environ, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_commands_of_the_guide(folder: Path) -> None:
    save_model(folder / "runs/demo", tiny_model())
    run_page("docs/serving.md", folder)
    assert np.linalg.norm(np.fromfile(folder / "photo.f32", "<f4")) == pytest.approx(1, abs=1e-5)


def test_the_settings_file_of_the_guide_is_sound() -> None:
    (block,) = [block for block in read_blocks("docs/serving.md") if block.language == "toml"]
    settings = load_settings(tomllib.loads(block.text))
    assert settings.models[0].id == "demo" and settings.rate_limit_per_s == 20


def test_the_python_examples_work(url: str, folder: Path) -> None:
    examples = REPOSITORY / "examples"
    assert "16 dimensions" in run([sys.executable, str(examples / "serve_openai.py"), url], folder)
    answer = run(
        [sys.executable, str(examples / "serve_client.py"), "photo.jpg", "cat", "dog", "--url", url], folder
    )
    assert len(answer.splitlines()) == 2


def test_the_client_example_names_a_photo_that_is_missing(folder: Path) -> None:
    command = [sys.executable, str(REPOSITORY / "examples/serve_client.py"), "nowhere.jpg", "cat"]
    environ = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        command, cwd=folder, env=environ, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert done.stderr == "nowhere.jpg: no such file\n"


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
