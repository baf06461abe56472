"""The task retrieval of `clipstack eval`: images to captions and back, and where the features lie."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from clipstack.errors import DataError
from clipstack.evaluation.data import EvalData
from clipstack.evaluation.features import Features
from clipstack.evaluation.geometry import alignment, modality_gap, uniformity
from clipstack.evaluation.intervals import bootstrap, clusters, percentile_interval, share
from clipstack.evaluation.report import Example, Report
from clipstack.evaluation.task import NUM_EXAMPLES, Setup, caption_lines, encode_data, first_reason, source_of
from clipstack.retrieval import RECALL_AT, Ranks, recall_at, retrieval_metrics, retrieval_ranks


def retrieval_report(setup: Setup, data: EvalData) -> Report:
    """Image-text retrieval in both directions, and where the features lie. Raises DataError without a
    sample."""
    features, skipped = encode_data(setup, data, with_texts=True)
    if not len(features.sample):
        raise DataError(f"--data {data.path}: no usable sample; {first_reason(skipped, features, 0)}")
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
        source=source_of(setup, data, None),
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
