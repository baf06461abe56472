"""`clipstack doctor` finds what works, what is missing and what is broken, and says how to mend it."""

import importlib
import importlib.metadata
import json
import re
from pathlib import Path

import pytest

from clipstack.cli import main
from clipstack.doctor import BROKEN, MISSING, OK, _part, examine
from clipstack.errors import how_to_reinstall

ROOT = Path(__file__).resolve().parents[2]


def test_everything_that_this_environment_installs_works() -> None:
    states = {finding.name: finding.state for finding in examine()}
    assert states.pop("Weights & Biases") in (OK, MISSING)
    assert set(states.values()) == {OK}


def test_a_missing_package_names_the_extra() -> None:
    finding = _part("nothing", "train", "no-such-package-anywhere", lambda: "")
    assert finding.state == MISSING
    assert finding.fix.startswith("pip install '.[train]' in the checkout")


def test_a_package_whose_own_need_is_missing_names_the_extra() -> None:
    finding = _part("torch", "model", "torch", lambda: importlib.import_module("no_such_module").__name__)
    assert finding.state == BROKEN and "needs no_such_module" in finding.detail
    assert "'.[model]'" in finding.fix


def test_a_package_that_is_there_and_fails_is_broken() -> None:
    def fail() -> str:
        raise RuntimeError("operator torchvision::nms does not exist")

    finding = _part("torch", "model", "torch", fail)
    assert finding.state == BROKEN and "operator torchvision::nms" in finding.detail
    assert finding.fix.endswith(f"torch=={importlib.metadata.version('torch')}")
    assert "--force-reinstall --no-deps" in finding.fix


def test_a_build_of_torch_comes_from_its_own_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda package: "2.9.0+cu128")
    assert how_to_reinstall("torch").endswith("https://download.pytorch.org/whl/cu128 torch==2.9.0+cu128")


def test_no_advice_installs_the_package_of_that_name_from_the_index() -> None:
    """It is another project's."""
    files = [
        path for folder in ("clipstack", "serve", "data_pipelines") for path in (ROOT / folder).rglob("*.py")
    ]
    files += [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "docker").iterdir()]
    bad = re.compile(r"pip install[^\n`&#]*[ '\"]clipstack\b(?!-)")
    assert len(files) > 100
    assert not [
        str(path) for path in files if path.is_file() and bad.search(path.read_text(encoding="utf-8"))
    ]


def test_the_command_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    assert {"name", "state", "detail", "fix"} == set(json.loads(capsys.readouterr().out)[0])


def test_an_unknown_command_suggests_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert "did you mean train?" in capsys.readouterr().err
