"""The demo's scores: an oracle gets everything, a blind model gets nothing, each factor is told apart."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clipstack.config import load_recipe
from clipstack.demo.command import TRAINS_WITH, as_table
from clipstack.demo.examination import Examined
from clipstack.demo.page import write_page
from clipstack.demo.scores import (
    Probe,
    ProbeSet,
    Score,
    demo_scores,
    factor_scores,
    probe_scores,
    read_probe_set,
    retrieval_score,
)
from clipstack.errors import DataError
from clipstack.recipes import shipped_recipes
from data_pipelines.shapes import generate, scenes
from tests.clipstack.launching import REPOSITORY


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shapes")
    generate(out, num_train=10, num_test=40)
    return out


def unit(*values: float) -> Tensor:
    return F.normalize(torch.tensor(values), dim=0)


def one_hot(index: int, size: int) -> Tensor:
    return F.one_hot(torch.tensor(index), size).float()


def test_an_oracle_of_captions_gets_every_probe_and_every_retrieval(folder: Path) -> None:
    probe_set = read_probe_set(folder)
    names = probe_set.texts()
    texts = {text: one_hot(index, len(names)) for index, text in enumerate(names)}
    images = {probe.image: texts[probe.caption] for probe in probe_set.probes}
    scores = probe_scores(images, texts, probe_set.probes)
    assert {name: score.accuracy for name, score in scores.items()} == dict.fromkeys(scores, 1.0)
    assert retrieval_score(images, texts, probe_set.probes) == Score(1.0, 1 / 40, 40)
    chance = {name: round(1 / score.chance) for name, score in scores.items()}
    assert (
        chance["relation"] == 4
        and chance["binding"] == chance["order"] == 2
        and chance["colour in pair"] == len(scenes.COLOURS)
    )


def test_a_model_that_maps_everything_to_one_point_scores_nothing(folder: Path) -> None:
    probe_set = read_probe_set(folder)
    point = unit(1.0, 2.0, 3.0)
    texts = dict.fromkeys(probe_set.texts(), point)
    images = dict.fromkeys([*probe_set.labels, *(probe.image for probe in probe_set.probes)], point)
    scores = demo_scores(images, texts, probe_set)
    assert {score.accuracy for score in scores.values()} == {0.0}
    assert {"colour", "shape", "size", "place", "colour x shape", "relation", "image to text R@1"} <= set(
        scores
    )


def test_a_model_that_sees_colour_alone_gets_colour_and_no_other_factor(folder: Path) -> None:
    probe_set = read_probe_set(folder)
    colours = list(scenes.COLOURS)

    def of_text(text: str) -> Tensor:
        named = [float(colour in text.split()) for colour in colours]
        return unit(*named, 0.1)  # the last entry is there for texts without a colour

    texts = {text: of_text(text) for text in probe_set.texts()}
    images = {key: of_text(label["colour"]) for key, label in probe_set.labels.items()}
    scores = factor_scores(images, texts, probe_set)
    assert scores["colour"] == Score(1.0, 1 / len(colours), len(probe_set.labels))
    assert scores["shape"].accuracy == scores["size"].accuracy == scores["colour x shape"].accuracy == 0.0


def test_a_probe_counts_only_where_the_caption_beats_every_negative() -> None:
    texts = {"a": unit(1.0, 0.0), "b": unit(0.0, 1.0), "c": unit(1.0, 1.0)}
    images = {"near a": unit(1.0, 0.1), "near c": unit(1.0, 0.9)}
    probes = [Probe("k", "near a", "a", ("b", "c")), Probe("k", "near c", "a", ("b", "c"))]
    assert probe_scores(images, texts, probes) == {"k": Score(0.5, pytest.approx(1 / 3), 2)}


def test_prompts_of_a_class_are_averaged() -> None:
    texts = {"p": unit(1.0, 0.0, 0.0), "q": unit(0.0, 1.0, 0.0), "r": unit(0.6, 0.0, 0.8)}
    prompts = {"factor": {"first": ("p", "q"), "second": ("r",)}}
    labels = {"x": {"factor": "first"}}
    # "p" alone is nearer to neither; the mean of "p" and "q" is what the image shows
    scores = factor_scores({"x": unit(1.0, 1.0, 0.0)}, texts, ProbeSet((), prompts, labels))
    assert scores == {"factor": Score(1.0, 0.5, 1)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--ranks 0", "--ranks: 0: must be 1 or more"),
        ("--ranks two", "--ranks: two: must be a whole number, 1 or more"),
        ("--train-samples -1", "--train-samples: -1: must be 1 or more"),
        ("--ranks 3", "train.batch_size = 128: not divisible by 3 ranks; take 126"),
        (
            "--ranks 5 train.batch_size=10 train.micro_batch_size=4",
            "train.micro_batch_size = 4: does not divide",
        ),
    ],
)
def test_numbers_that_cannot_be_are_refused_before_anything_is_drawn(
    arguments: str, message: str, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "clipstack.cli", "demo", *arguments.split()],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert message in done.stderr and done.stderr.count("\n") == 1
    assert not done.stdout and not [*tmp_path.iterdir()]


def test_every_score_is_printed_beside_chance() -> None:
    line = as_table({"relation": Score(0.8125, 0.25, 16)}).splitlines()[-1]
    assert line.split()[:3] == ["relation", "81.2%", "25.0%"]


def test_the_page_tells_pictures_drawn_from_samples_seen(tmp_path: Path) -> None:
    lessons = [load_recipe(shipped_recipes()[name], ["data.train=x"]) for name in ("demo-first", "demo")]
    (tmp_path / "metrics.jsonl").write_text("")
    examined = Examined({"relation": Score(0.5, 0.25, 16)}, 16, [])
    page = write_page(
        tmp_path / "p.html", tmp_path, examined, lessons, num_pictures=77, minutes=1
    ).read_text()
    seen = sum(lesson.train.steps * lesson.train.batch_size for lesson in lessons)
    assert "on 77 drawn pictures" in page and f"{seen:,} samples seen" in page


def test_missing_or_foreign_probe_files_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"prompts.json: No such file"):
        read_probe_set(tmp_path)
    for name in ("prompts.json", "labels.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "probes.jsonl").write_text(json.dumps({"image": "x"}) + "\n")
    with pytest.raises(DataError, match="clipstack data shapes"):
        read_probe_set(tmp_path)
    (tmp_path / "labels.json").write_text("{")
    with pytest.raises(DataError, match="not valid JSON"):
        (tmp_path / "probes.jsonl").write_text("")
        read_probe_set(tmp_path)


def test_what_demo_looks_for_is_what_its_extra_brings() -> None:
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    brought = {re.split(r"[<>=]", word)[0] for extra in ("model", "train") for word in extras[extra]}
    modules = {name.removesuffix("_torch") for name in brought if "clipstack" not in name}
    assert {*TRAINS_WITH} == modules
