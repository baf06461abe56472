"""Every `clipstack` command in docs/evaluation.md runs as it stands."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from clipstack.cli import main
from tests.clipstack.evaluation.conftest import png

GUIDE = Path(__file__).resolve().parents[3] / "docs" / "evaluation.md"


def commands() -> list[str]:
    blocks = re.findall(r"^```bash\n(.*?)^```", GUIDE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.splitlines() if line]


def test_the_commands_of_the_guide_run(
    model_folders: dict[str, Path], benchmark_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_folders["trained"], "runs/colours")
    shutil.copytree(model_folders["random"], "runs/plain")
    shutil.copytree(benchmark_folder, "data/colours")
    Path("pictures").mkdir()
    Path("pictures/a.png").write_bytes(png(0))
    case = {"image": "a.png", "caption": "red", "negatives": ["blue"], "kind": "swap"}
    Path("swaps.jsonl").write_text(json.dumps(case))
    lines = commands()
    assert len(lines) >= 8
    for line in lines:
        words = shlex.split(line)
        assert words[0] == "clipstack"
        if words[1] in ("eval", "embed"):
            words += ["--workers", "0"]
        assert main(words[1:]) == 0, line
    assert "top1" in Path("exported/MODEL_CARD.md").read_text()
