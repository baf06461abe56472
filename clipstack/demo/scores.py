"""What the demo's model learned, factor by factor: pure functions on features and the data set's probes.

Every score stands beside chance. Colour, shape, size, place and colour x shape are zero-shot classification
of single things; the probes ask of scenes with two things whether its caption beats the same caption with
one factor changed; retrieval asks for each scene's own caption among all of them. All pictures show
colour x shape pairs that training never saw.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from clipstack.errors import DataError

Features = Mapping[str, Tensor]
"""Image key or text -> (D,) unit-norm feature."""


class Score(NamedTuple):
    """Accuracy and chance are fractions; num is how many questions were asked."""

    accuracy: float
    chance: float
    num: int


@dataclass(frozen=True)
class Probe:
    """One question: is an image closer to its caption than to each of the negatives?"""

    kind: str
    image: str
    caption: str
    negatives: tuple[str, ...]


@dataclass(frozen=True)
class ProbeSet:
    """The probe files of a shapes data set."""

    probes: tuple[Probe, ...]
    prompts: Mapping[str, Mapping[str, tuple[str, ...]]]
    """Factor -> class -> prompts whose mean stands for the class."""
    labels: Mapping[str, Mapping[str, str]]
    """Key of a single thing's image -> factor -> class."""

    def texts(self) -> list[str]:
        """Every text whose feature is needed, each once."""
        probed = (text for probe in self.probes for text in (probe.caption, *probe.negatives))
        prompted = (
            text for classes in self.prompts.values() for prompts in classes.values() for text in prompts
        )
        return list(dict.fromkeys([*probed, *prompted]))


def read_probe_set(folder: Path) -> ProbeSet:
    """Read probes.jsonl, prompts.json and labels.json as `clipstack data shapes` writes them.

    Raises DataError.
    """
    prompts = _read_json(folder / "prompts.json")
    lines = _read(folder / "probes.jsonl").splitlines()
    try:
        return ProbeSet(
            probes=tuple(_probe(json.loads(line)) for line in lines),
            prompts={f: {c: tuple(texts) for c, texts in classes.items()} for f, classes in prompts.items()},
            labels=_read_json(folder / "labels.json"),
        )
    except (AttributeError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise DataError(
            f"{folder}: the probe files are not what `clipstack data shapes` writes; make them anew"
        ) from error


def _probe(row: Mapping[str, Any]) -> Probe:
    return Probe(row["kind"], row["image"], row["caption"], tuple(row["negatives"]))


def _read_json(path: Path) -> Any:
    try:
        return json.loads(_read(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: not valid JSON: {error}; make the data set anew") from error


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(
            f"{path}: {error.strerror}; `clipstack data shapes --output {path.parent}` writes it"
        ) from error


def demo_scores(images: Features, texts: Features, probe_set: ProbeSet) -> dict[str, Score]:
    """Every factor's score: zero-shot factors, then probes, then "image to text R@1".

    `images` holds the features of the single and the test split, `texts` those of `probe_set.texts()`.
    """
    return {
        **factor_scores(images, texts, probe_set),
        **probe_scores(images, texts, probe_set.probes),
        "image to text R@1": retrieval_score(images, texts, probe_set.probes),
    }


def factor_scores(images: Features, texts: Features, probe_set: ProbeSet) -> dict[str, Score]:
    """Zero-shot top-1 of each factor over the labelled images, by prompt ensembles."""
    keys = list(probe_set.labels)
    features = torch.stack([images[key] for key in keys])  # (N, D)
    scores = {}
    for factor, prompts in probe_set.prompts.items():
        classes = list(prompts)
        weights = torch.stack([_mean_feature(texts, prompts[name]) for name in classes])  # (C, D)
        truth = torch.tensor([classes.index(probe_set.labels[key][factor]) for key in keys])
        scores[factor] = Score(
            _accuracy(_beats_all(features @ weights.T, truth)), 1 / len(classes), len(keys)
        )
    return scores


def _mean_feature(texts: Features, prompts: Sequence[str]) -> Tensor:
    return F.normalize(torch.stack([texts[prompt] for prompt in prompts]).mean(0), dim=0)


def probe_scores(images: Features, texts: Features, probes: Sequence[Probe]) -> dict[str, Score]:
    """Share of probes of each kind whose true caption beats every negative."""
    scores = {}
    for kind in dict.fromkeys(probe.kind for probe in probes):
        asked = [probe for probe in probes if probe.kind == kind]
        hits = torch.tensor([_is_hit(images, texts, probe) for probe in asked])
        chance = sum(1 / (1 + len(probe.negatives)) for probe in asked) / len(asked)
        scores[kind] = Score(_accuracy(hits), chance, len(asked))
    return scores


def _is_hit(images: Features, texts: Features, probe: Probe) -> bool:
    options = torch.stack([texts[text] for text in (probe.caption, *probe.negatives)])  # (1 + negatives, D)
    return bool(_beats_all((options @ images[probe.image])[None], torch.zeros(1, dtype=torch.int64)))


def retrieval_score(images: Features, texts: Features, probes: Sequence[Probe]) -> Score:
    """R@1 of each probed image's own caption among the captions of all of them."""
    captions = {probe.image: probe.caption for probe in probes}
    gallery = torch.stack([texts[caption] for caption in captions.values()])  # (N, D)
    similarity = torch.stack([images[key] for key in captions]) @ gallery.T  # (N, N)
    return Score(
        _accuracy(_beats_all(similarity, torch.arange(len(captions)))), 1 / len(captions), len(captions)
    )


def _beats_all(similarity: Tensor, truth: Tensor) -> Tensor:
    """(N,) whether column `truth` of each row is strictly the largest: one that cannot tell gets none."""
    true = similarity.gather(1, truth[:, None])  # (N, 1)
    return (similarity >= true).sum(1) == 1


def _accuracy(hits: Tensor) -> float:
    return float(hits.double().mean())
