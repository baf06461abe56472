"""The tasks of `clipstack eval`: a model and data to a report. Every function here is collective."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clipstack.checkpoint import LoadedModel
from clipstack.compositional import Case, read_cases
from clipstack.config import DataConfig
from clipstack.errors import ConfigError, DataError, SampleError
from clipstack.eval_data import EvalData
from clipstack.eval_report import EXAMPLES_OF_SKIPPED, Example, Report, Skipped, Source
from clipstack.features import Features, encode_all, encode_texts, encode_tokens, logit_scale_of
from clipstack.geometry import alignment, modality_gap, uniformity
from clipstack.intervals import bootstrap, clusters, mean_recall, percentile_interval, share
from clipstack.loader import EvalLoader
from clipstack.preprocess import Preprocess
from clipstack.retrieval import RECALL_AT, Ranks, recall_at, retrieval_metrics, retrieval_ranks
from clipstack.world import World
from clipstack.zero_shot import (
    Outcomes,
    classifier,
    confusion_matrix,
    outcomes,
    per_class_recall,
    reliability,
    zero_shot_metrics,
)
from data_pipelines.images import open_image
from data_pipelines.progress import Progress
from data_pipelines.stream import BadSample

NUM_EXAMPLES = 8
"""Of the best, and of the worst, samples."""


@dataclass(frozen=True)
class Setup:
    """What evaluates, and how."""

    loaded: LoadedModel
    world: World
    batch_size: int = 64
    """images that a rank encodes at once"""
    workers: int = 2
    """loader processes a rank"""


@dataclass(frozen=True)
class Prompts:
    """name: as reports tell it; texts: templates with a placeholder each."""

    name: str
    texts: tuple[str, ...] = field(repr=False)


def caption_lines(stored: tuple[str, ...]) -> tuple[str, ...]:
    """The captions of a sample: its stored texts, each line of them one caption, as CLIP_benchmark reads
    them."""
    return tuple(line for text in stored for line in text.splitlines() if line.strip())


def zero_shot_report(setup: Setup, data: EvalData, prompts: Prompts) -> Report:
    """Zero-shot classification. Raises ConfigError without class names, DataError without a usable sample."""
    if data.classnames is None:
        raise ConfigError(
            f"--data {data.path}: no classnames.txt beside it; give --classnames FILE with one name a line"
        )
    names = data.classnames
    features, skipped = _encode(setup, data, with_texts=False)
    known = (features.label >= 0) & (features.label < len(names))
    if not bool(known.any()):
        raise DataError(
            f"--data {data.path}: no sample has one of {len(names)} classes; "
            f"{_first_reason(skipped, features, len(names))}"
        )
    matrix = class_matrix(setup, names, prompts.texts)
    scale = logit_scale_of(setup.loaded.model, setup.loaded.preprocess, setup.world)
    result = outcomes(features.images[known], matrix, features.label[known], logit_scale=scale)
    hit = result.rank == 0
    return Report(
        task="zeroshot",
        n=len(result.label),
        source=_source(setup, data, prompts.name),
        metrics=zero_shot_metrics(result, len(names)),
        intervals=_zero_shot_intervals(result),
        skipped=_with(
            skipped,
            without_class=int((features.label < 0).sum()),
            labels_out_of_range=int((features.label >= len(names)).sum()),
        ),
        details={
            "classnames": list(names),
            "template_texts": list(prompts.texts),
            "logit_scale": scale,
            "reliability": reliability(result.confidence, hit).__dict__,
            "per_class": _per_class(result, names),
            "confusion": _confusion_cells(result, len(names)),
        },
        outcomes={"sample": features.sample[known].cpu().numpy(), "label": result.label, "rank": result.rank},
        examples=_zero_shot_examples(result, features.sample[known].cpu().numpy(), names),
    )


def class_matrix(setup: Setup, names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """(D, C) zero-shot classifier of the setup's model."""
    return classifier(
        lambda tokens: encode_tokens(setup.loaded.model, tokens, setup.world),
        setup.loaded.preprocess.tokenize,
        names,
        templates,
    )


def _zero_shot_intervals(result: Outcomes) -> dict[str, tuple[float, float]]:
    once = np.ones_like(result.rank)
    samples = {
        "top1": bootstrap(np.stack([result.rank < 1, once], axis=1).astype(np.int64), share),
        "top5": bootstrap(np.stack([result.rank < 5, once], axis=1).astype(np.int64), share),
        "mean_per_class_recall": bootstrap(np.stack([result.label, result.rank < 1], axis=1), mean_recall),
    }
    return {name: percentile_interval(values) for name, values in samples.items()}


def _per_class(result: Outcomes, names: Sequence[str]) -> list[dict[str, Any]]:
    support = np.bincount(result.label, minlength=len(names))
    predicted = np.bincount(result.predicted, minlength=len(names))
    hits = np.bincount(result.label[result.rank == 0], minlength=len(names))
    recall = per_class_recall(result.label, result.rank, len(names))
    return [
        {
            "class": name,
            "n": int(support[k]),
            "recall": float(recall[k]) if support[k] else None,
            "precision": float(hits[k] / predicted[k]) if predicted[k] else None,
        }
        for k, name in enumerate(names)
    ]


def _confusion_cells(result: Outcomes, num_classes: int) -> list[list[int]]:
    """[true class, predicted class, count] of every pair that occurs."""
    matrix = confusion_matrix(result.label, result.predicted, num_classes)
    return [[int(i), int(j), int(matrix[i, j])] for i, j in zip(*matrix.nonzero(), strict=True)]


def _zero_shot_examples(result: Outcomes, sample: Any, names: Sequence[str]) -> tuple[Example, ...]:
    """The surest hits and the surest misses."""
    surest = np.argsort(-result.confidence, kind="stable")
    out = []
    for is_good in (True, False):
        for row in islice((row for row in surest if (result.rank[row] == 0) == is_good), NUM_EXAMPLES):
            says = f"says {names[result.predicted[row]]} ({result.confidence[row]:.0%})"
            caption = (
                says if is_good else f"{says}, is {names[result.label[row]]} (place {result.rank[row] + 1})"
            )
            out.append(Example(int(sample[row]), caption, is_good))
    return tuple(out)


def retrieval_report(setup: Setup, data: EvalData) -> Report:
    """Image-text retrieval in both directions, and where the features lie. Raises DataError without a
    sample."""
    features, skipped = _encode(setup, data, with_texts=True)
    if not len(features.sample):
        raise DataError(f"--data {data.path}: no usable sample; {_first_reason(skipped, features, 0)}")
    ranks = retrieval_ranks(features.images, features.texts, features.owner, world=setup.world)
    owner = features.owner.cpu().numpy()
    geometry = {
        "alignment": alignment(features.images, features.texts, features.owner),
        "uniformity_image": uniformity(features.images),
        "uniformity_text": uniformity(features.texts),
        "modality_gap": modality_gap(features.images, features.texts),
    }
    return Report(
        task="retrieval",
        n=len(features.sample),
        source=_source(setup, data, None),
        metrics=retrieval_metrics(ranks) | geometry,
        intervals=_retrieval_intervals(ranks, owner),
        skipped=skipped,
        details={
            "n_texts": len(features.texts),
            "recall_curve": {
                direction: [[k, recall_at(values, k)] for k in _curve_places(len(features.texts))]
                for direction, values in ranks._asdict().items()
            },
        },
        outcomes={**ranks._asdict(), "owner": owner, "sample": features.sample.cpu().numpy()},
        examples=_retrieval_examples(features, ranks, data),
    )


def _curve_places(size: int) -> list[int]:
    """1, 2, 5, 10, 20, 50, ... up to the size of the gallery."""
    places = (step * 10**power for power in range(len(str(size))) for step in (1, 2, 5))
    return [place for place in places if place <= size]


def _retrieval_intervals(ranks: Ranks, owner: Any) -> dict[str, tuple[float, float]]:
    rows = np.arange(len(ranks.image_to_text))
    out = {}
    for direction, values in ranks._asdict().items():
        of = rows if direction == "image_to_text" else owner
        for k in RECALL_AT:
            out[f"{direction}_r{k}"] = percentile_interval(bootstrap(clusters(values < k, of), share))
    return out


def _retrieval_examples(features: Features, ranks: Ranks, data: EvalData) -> tuple[Example, ...]:
    """The images most similar to a caption of theirs that came first, and those whose caption came last."""
    own = (features.images[features.owner] * features.texts).sum(dim=1)  # (M,)
    lowest = torch.full((len(features.sample),), -2.0, device=own.device)
    closeness = lowest.scatter_reduce(0, features.owner, own, "amax").cpu().numpy()
    hits = np.flatnonzero(ranks.image_to_text == 0)
    best = hits[np.argsort(-closeness[hits], kind="stable")][:NUM_EXAMPLES]
    worst = np.argsort(-ranks.image_to_text, kind="stable")[:NUM_EXAMPLES]
    worst = worst[ranks.image_to_text[worst] > 0]
    out = []
    for row, is_good in [*((row, True) for row in best), *((row, False) for row in worst)]:
        similarity = features.texts @ features.images[row]
        mine = _text(features, data, int(similarity.masked_fill(features.owner != int(row), -2.0).argmax()))
        told = f"“{mine}” came first"
        if not is_good:
            nearest = _text(features, data, int(similarity.argmax()))
            told = f"“{mine}” came in place {ranks.image_to_text[row] + 1:,}; nearest: “{nearest}”"
        out.append(Example(int(features.sample[row]), told, is_good))
    return tuple(out)


def _text(features: Features, data: EvalData, row: int) -> str:
    """The caption behind a row of `features.texts`."""
    owner = int(features.owner[row])
    place = row - int(torch.searchsorted(features.owner, owner))
    return caption_lines(data.samples.read(int(features.sample[owner])).captions)[place]


def probe_report(
    setup: Setup, train: EvalData, test: EvalData, *, neighbours: int, inverse_penalty: float
) -> Report:
    """Linear probe and k nearest neighbours on frozen image features. Raises DataError without labelled
    samples.

    Labels are the data's own numbers, except between two trees, whose classes are matched by their folders'
    names. Raises ConfigError for a class that only the test data have.
    """
    from clipstack.probes import knn_accuracy, linear_probe_accuracy

    numbers = _numbers_in(train, test)
    train_features, train_skipped = _encode(setup, train, with_texts=False)
    features, skipped = _encode(setup, test, with_texts=False)
    parts = []
    for data, part, left_out in ((train, train_features, train_skipped), (test, features, skipped)):
        known = part.label >= 0
        if not bool(known.any()):
            raise DataError(f"{data.path}: no sample with a class; {_first_reason(left_out, part, 0)}")
        parts.append((part.images[known].cpu().numpy(), part.label[known].cpu().numpy()))
    (train_x, train_y), (x, y) = parts
    y = y if numbers is None else numbers[y]

    def fit() -> tuple[Any, Any]:
        return (
            linear_probe_accuracy(train_x, train_y, x, y, inverse_penalty=inverse_penalty),
            knn_accuracy(train_x, train_y, x, y, neighbours=neighbours),
        )

    linear, nearest = setup.world.from_main(fit)
    hits = {"linear_probe_top1": linear, "knn_top1": nearest}
    once = np.ones(len(y), dtype=np.int64)
    return Report(
        task="probe",
        n=len(y),
        source=_source(setup, test, None),
        metrics={name: float(hit.mean()) for name, hit in hits.items()},
        intervals={
            name: percentile_interval(bootstrap(np.stack([hit.astype(np.int64), once], axis=1), share))
            for name, hit in hits.items()
        },
        skipped=_with(skipped, without_class=int((features.label < 0).sum())),
        details={
            "n_train": len(train_y),
            "train_data": train.path,
            "neighbours": neighbours,
            "inverse_penalty": inverse_penalty,
        },
        outcomes={
            "sample": features.sample[features.label >= 0].cpu().numpy(),
            **{name: hit.astype(np.int64) for name, hit in hits.items()},
        },
    )


def _numbers_in(train: EvalData, test: EvalData) -> Any:
    """(C,) the training data's number of each class of the test data; None where both count alike."""
    if train.folders is None or test.folders is None:
        return None
    unknown = [name for name in test.folders if name not in train.folders]
    if unknown:
        raise ConfigError(
            f"--data {test.path}: {len(unknown)} class folders that --train-data {train.path} lacks, such as "
            f"{unknown[0]!r}"
        )
    return np.array([train.folders.index(name) for name in test.folders])


def compositional_report(setup: Setup, path: Path, images: Path) -> Report:
    """How often an image is closer to its caption than to every negative; equal is a miss. Raises
    DataError."""
    cases = read_cases(path)
    correct, bad = _judge(setup, cases, images)  # (N,) 1, 0, or -1 where the image cannot be used
    used = correct >= 0
    if not used.any():
        raise DataError(f"--images {images}: no usable image; {bad[0].shard}/{bad[0].key}: {bad[0].reason}")
    kinds = np.array([case.kind for case in cases])
    metrics = {"accuracy": float(correct[used].mean())}
    for kind in sorted(set(kinds[used])):
        metrics[f"accuracy_{kind}"] = float(correct[used & (kinds == kind)].mean())
    once = np.ones(int(used.sum()), dtype=np.int64)
    return Report(
        task="compositional",
        n=int(used.sum()),
        source=Source(
            model=setup.loaded.name,
            fingerprint=setup.loaded.fingerprint,
            data=str(path),
            data_digest=hashlib.sha256(repr(cases).encode()).hexdigest(),
        ),
        metrics=metrics,
        intervals={
            "accuracy": percentile_interval(bootstrap(np.stack([correct[used], once], axis=1), share))
        },
        skipped=Skipped(bad_samples=len(bad), examples=tuple(bad[:EXAMPLES_OF_SKIPPED])),
        details={
            "kinds": {
                kind: {"n": int((used & (kinds == kind)).sum()), "chance": _chance(cases, kind)}
                for kind in sorted(set(kinds))
            }
        },
        outcomes={"sample": np.flatnonzero(used), "correct": correct[used]},
    )


def _chance(cases: Sequence[Case], kind: str) -> float:
    return float(np.mean([1 / (1 + len(case.negatives)) for case in cases if case.kind == kind]))


@dataclass(frozen=True)
class _CaseImages(Dataset[Tensor | str]):
    """The image of each case, or what is wrong with it."""

    cases: Sequence[Case]
    folder: Path
    preprocess: Preprocess

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, place: int) -> Tensor | str:
        case = self.cases[place]
        try:
            image = open_image((self.folder / case.image).read_bytes())
        except SampleError as error:
            return str(error)
        except OSError as error:
            return f"cannot be read: {error.strerror}"
        return self.preprocess.eval_image(image if case.box is None else image.crop(case.box))


def _judge(setup: Setup, cases: Sequence[Case], folder: Path) -> tuple[Any, list[BadSample]]:
    """Every rank judges each world.size-th batch of cases; all learn all."""
    size, world = setup.batch_size, setup.world
    batches = [range(start, min(start + size, len(cases))) for start in range(0, len(cases), size)]
    loader = DataLoader(
        _CaseImages(cases, folder, setup.loaded.preprocess),
        batch_sampler=batches[world.rank :: world.size],  # type: ignore[arg-type]
        num_workers=setup.workers,
        collate_fn=list,
    )
    judged = torch.zeros(len(cases), dtype=torch.int64)
    bad: list[tuple[int, str]] = []
    for places, images in zip(batches[world.rank :: world.size], loader, strict=True):
        bad += [(place, image) for place, image in zip(places, images, strict=True) if isinstance(image, str)]
        usable = [place for place, image in zip(places, images, strict=True) if not isinstance(image, str)]
        if usable:
            pixels = torch.stack([image for image in images if not isinstance(image, str)])
            judged[usable] = _judge_batch(setup, [cases[place] for place in usable], pixels)
    everyones = sorted(one for ranks in world.gather_objects(bad) for one in ranks)
    correct = world.all_reduce(judged.to(world.device)).cpu().numpy()
    correct[[place for place, _ in everyones]] = -1
    return correct, [BadSample(folder.name, cases[place].image, reason) for place, reason in everyones]


def _judge_batch(setup: Setup, cases: Sequence[Case], pixels: Tensor) -> Tensor:
    """(B,) whether the caption is strictly nearer than all negatives."""
    model, world = setup.loaded.model, setup.world
    images = model.encode_image(pixels.to(world.device))
    owner = torch.tensor([row for row, case in enumerate(cases) for _ in range(1 + len(case.negatives))])
    texts = [text for case in cases for text in (case.caption, *case.negatives)]
    vectors = encode_texts(model, texts, preprocess=setup.loaded.preprocess, world=world)
    cosine = (images[owner.to(world.device)] * vectors).sum(dim=1).cpu()
    starts = torch.searchsorted(owner, torch.arange(len(cases)))
    own = cosine[starts]
    cosine[starts] = -torch.inf
    best_negative = torch.full((len(cases),), -torch.inf).scatter_reduce(0, owner, cosine, "amax")
    return (own > best_negative).to(torch.int64)


def _encode(setup: Setup, data: EvalData, *, with_texts: bool) -> tuple[Features, Skipped]:
    """Features of all usable samples, and what was left out, on every rank."""
    loader = EvalLoader(
        data.samples,
        config=DataConfig(train=data.path, max_bad_fraction=1.0),
        preprocess=setup.loaded.preprocess,
        batch_size=setup.batch_size,
        world=setup.world,
        workers=setup.workers,
    )
    try:
        features = encode_all(
            setup.loaded.model,
            _shown(loader, setup.world),
            preprocess=setup.loaded.preprocess,
            world=setup.world,
            captions=caption_lines if with_texts else None,
        )
    finally:
        loader.close()
    return features, _skipped(data, loader, setup.world)


def _shown(loader: EvalLoader, world: World) -> Any:
    if not world.is_main:
        yield from loader
        return
    with Progress("eval", len(loader), unit="batches") as progress:
        for batch in loader:
            yield batch
            progress.advance()


def _skipped(data: EvalData, loader: EvalLoader, world: World) -> Skipped:
    known = len(data.samples.damage)
    met = [bad for ranks in world.gather_objects(loader.bad[known:]) for bad in ranks]
    examples = (
        *data.bad_shards,
        *data.samples.damage,
        *sorted(met, key=lambda bad: (bad.shard, bad.key or "")),
    )
    return Skipped(
        bad_samples=len(met),
        empty_shards=len(data.empty_shards),
        unreadable_shards=len(data.bad_shards),
        damaged_shards=known,
        examples=examples[:EXAMPLES_OF_SKIPPED],
    )


def _with(skipped: Skipped, **counts: int) -> Skipped:
    return Skipped(**{**skipped.__dict__, **counts})


def _first_reason(skipped: Skipped, features: Features, num_classes: int) -> str:
    if skipped.examples and not len(features.sample):
        bad = skipped.examples[0]
        return f"the first of {skipped.bad_samples}: {bad.shard}/{bad.key}: {bad.reason}"
    if bool((features.label >= num_classes).any()) and num_classes:
        return f"labels go up to {int(features.label.max())}: is it the right --classnames file?"
    return "samples need a .cls member with the class index"


def _source(setup: Setup, data: EvalData, templates: str | None) -> Source:
    return Source(setup.loaded.name, setup.loaded.fingerprint, data.path, data.digest, templates)
