"""The task compositional of `clipstack eval`: is an image closer to its caption than to its negatives?"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clipstack.errors import DataError, SampleError
from clipstack.evaluation.compositional_cases import Case, read_cases
from clipstack.evaluation.features import encode_texts
from clipstack.evaluation.intervals import bootstrap, percentile_interval, share
from clipstack.evaluation.report import EXAMPLES_OF_SKIPPED, Report, Skipped, Source
from clipstack.evaluation.task import Setup
from clipstack.preprocess import Preprocess
from data_pipelines.images import open_image
from data_pipelines.stream.quarantine import BadSample


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
