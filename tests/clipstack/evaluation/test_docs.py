"""The commands of docs/evaluation.md run as they stand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.clipstack.evaluation.conftest import png
from tests.docs.pages import run_page


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_commands_of_the_guide(
    model_folders: dict[str, Path], benchmark_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(model_folders["trained"], tmp_path / "runs/colours")
    shutil.copytree(model_folders["random"], tmp_path / "runs/plain")
    shutil.copytree(benchmark_folder, tmp_path / "data/colours")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/a.png").write_bytes(png(0))
    case = {"image": "a.png", "caption": "red", "negatives": ["blue"], "kind": "swap"}
    (tmp_path / "swaps.jsonl").write_text(json.dumps(case))
    run_page("docs/evaluation.md", tmp_path)
    assert "top1" in (tmp_path / "exported/MODEL_CARD.md").read_text()
