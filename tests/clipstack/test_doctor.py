"""`clipstack doctor` finds what works, what is missing and what is broken, and says how to mend it."""

import json

import pytest

from clipstack.cli import main
from clipstack.doctor import BROKEN, MISSING, OK, _part, examine


def test_everything_that_this_environment_installs_works() -> None:
    states = {finding.name: finding.state for finding in examine()}
    assert states.pop("Weights & Biases") in (OK, MISSING)
    assert set(states.values()) == {OK}


def test_a_missing_package_names_the_extra() -> None:
    finding = _part("nothing", "train", "no-such-package-anywhere", lambda: "")
    assert (finding.state, finding.fix) == (MISSING, "pip install 'clipstack[train]'")


def test_a_package_that_is_there_and_fails_is_broken() -> None:
    def fail() -> str:
        raise RuntimeError("operator torchvision::nms does not exist")

    finding = _part("torch", "model", "torch", fail)
    assert finding.state == BROKEN and "operator torchvision::nms" in finding.detail and finding.fix


def test_the_command_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    assert {"name", "state", "detail", "fix"} == set(json.loads(capsys.readouterr().out)[0])


def test_an_unknown_command_suggests_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert "did you mean train?" in capsys.readouterr().err
