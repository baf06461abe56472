"""docs/api.md names the public interface: everything in it can be imported and has a docstring."""

from __future__ import annotations

import importlib
import inspect
import re

import pytest

from tests.docs.pages import REPOSITORY

PAGE = (REPOSITORY / "docs/api.md").read_text(encoding="utf-8")
NAMES = re.findall(r"`((?:clipstack|serve|data_pipelines)\.[\w.]+)`", PAGE)


def test_the_page_names_every_package() -> None:
    assert len(NAMES) == len(set(NAMES)) > 40
    assert {name.split(".")[0] for name in NAMES} == {"clipstack", "serve", "data_pipelines"}


@pytest.mark.parametrize("name", NAMES)
def test_each_name_can_be_imported_and_is_documented(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    thing = getattr(importlib.import_module(module), attribute)
    assert not attribute.startswith("_")
    assert inspect.getdoc(thing), f"{name} has no docstring"


def test_what_the_losses_export_is_public() -> None:
    losses = importlib.import_module("clipstack.losses")
    assert {f"clipstack.losses.{name}" for name in losses.__all__} <= set(NAMES)
