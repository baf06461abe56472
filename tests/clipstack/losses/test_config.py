"""Objective tables: what is refused, and with which words."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from clipstack.config.objectives import OBJECTIVES, HardNegativeObjective, parse_objective
from clipstack.errors import ConfigError
from clipstack.losses import build_objective
from clipstack.world import World

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({}, "objective.name: missing; give one of clip, hard_negative, debiased, dcl, siglip"),
    ({"name": "clipp"}, "objective.name = 'clipp': no such objective; give one of clip,"),
    ({"name": "hard_negative", "beta": -1}, "objective.beta = -1: must be >= 0"),
    ({"name": "hard_negative", "beta": float("nan")}, "objective.beta = nan"),
    ({"name": "hard_negative", "beta": "hard"}, "objective.beta = 'hard'"),
    ({"name": "hard_negative", "beta_mode": "angle"}, "objective.beta_mode = 'angle'"),
    ({"name": "hard_negative", "tau_plus": 1.0}, "objective.tau_plus = 1.0: must be < 1"),
    ({"name": "hard_negative", "tau_plus": -0.1}, "objective.tau_plus = -0.1: must be >= 0"),
    ({"name": "hard_negative", "alpha": 1.5}, "objective.alpha = 1.5: must be <= 1"),
    ({"name": "hard_negative", "warmup_fraction": 2}, "objective.warmup_fraction = 2: must be <= 1"),
    ({"name": "debiased", "tau_plus": 1}, "objective.tau_plus = 1: must be < 1"),
    ({"name": "clip", "beta": 1}, "objective.beta: 'clip' has no such option; it has mask_duplicates"),
    ({"name": "dcl", "label_smoothing": 0.1}, "objective.label_smoothing: 'dcl' has no such option"),
    ({"name": "siglip", "queue_size": 8}, "objective.queue_size: 'siglip' has no such option"),
    (
        {"name": "hard_negative", "individual_temperature": {}},
        "objective.individual_temperature: 'hard_negative' has no",
    ),
    ({"name": "clip", "queue_sise": 8}, "did you mean queue_size?"),
    ({"name": "clip", "queue_size": -8}, "objective.queue_size = -8: must be >= 0"),
    ({"name": "clip", "label_smoothing": 1.0}, "objective.label_smoothing = 1.0: must be < 1"),
    (
        {"name": "clip", "individual_temperature": {"gamma": 0}},
        "objective.individual_temperature.gamma = 0: must be > 0",
    ),
    ({"name": "clip", "individual_temperature": {"gama": 1}}, "did you mean gamma?"),
    ({"name": "clip", "individual_temperature": {"tau_init": 2}}, "tau_init = 2.0 must lie between"),
    ({"name": "clip", "individual_temperature": {}, "queue_size": 4}, "cannot be combined with queue_size"),
    ({"name": "clip", "mixing": {"count": 0}}, "objective.mixing: count and query_count are both 0"),
    (
        {"name": "clip", "image_image": {"temperature": 0}},
        "objective.image_image.temperature = 0: must be > 0",
    ),
]


@pytest.mark.parametrize(("table", "message"), REFUSED, ids=str)
def test_a_wrong_field_is_refused_in_one_line_that_names_it(table: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_objective(table, World())
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_name_alone_is_no_table() -> None:
    with pytest.raises(ConfigError, match=r"objective = 'clip': give a table"):
        build_objective("clip", World())  # type: ignore[arg-type]


def test_two_wrong_fields_are_both_named() -> None:
    with pytest.raises(ConfigError, match=r"objective\.beta = -1.*; objective\.alpha = 3"):
        parse_objective({"name": "hard_negative", "beta": -1, "alpha": 3})


def test_a_model_and_its_table_build_the_same_objective() -> None:
    config = HardNegativeObjective(beta=0.5)
    assert build_objective(config, World()).config == build_objective(config.model_dump(), World()).config


def test_true_asks_for_a_terms_defaults() -> None:
    on, off = (parse_objective({"name": "clip", "individual_temperature": value}) for value in (True, False))
    assert on == parse_objective({"name": "clip", "individual_temperature": {}})
    assert off == parse_objective({"name": "clip"})


def test_configs_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        HardNegativeObjective().beta = 1.0  # type: ignore[misc]


DOCS = (Path(__file__).resolve().parents[3] / "docs" / "objectives.md").read_text(encoding="utf-8")


def test_every_table_of_the_docs_is_an_objective() -> None:
    tables = re.findall(r"```toml\n(.*?)```", DOCS, re.DOTALL)
    assert len(tables) >= 3
    for table in tables:
        build_objective(tomllib.loads(table)["objective"], World())


def test_the_docs_name_every_option() -> None:
    for model in OBJECTIVES:
        for option in model.model_fields:
            assert f"`{option}`" in DOCS or option == "name", option


def test_reading_a_config_imports_no_torch() -> None:
    code = "import sys, clipstack.config.objectives; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
