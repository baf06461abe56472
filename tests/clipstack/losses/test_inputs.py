"""Bad input ends in an error that names the field, on every rank; schedules follow the progress of the
training.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from clipstack.errors import ConfigError
from clipstack.losses import Embeddings, EmbeddingsError, NonFiniteError, build_objective
from clipstack.losses.softmax import ramp
from clipstack.world import World
from tests.clipstack.losses.ranks import run_ranks


def unit(n: int, dim: int = 4) -> Tensor:
    return normalize(torch.randn(n, dim, generator=torch.Generator().manual_seed(n)), dim=1)


def embeddings(n: int = 4, **changes: Any) -> Embeddings:
    return Embeddings(unit(n), unit(n), torch.tensor(2.0))._replace(**changes)


def spoiled(value: float) -> Tensor:
    tensor = unit(4)
    tensor[1, 2] = value
    return tensor


BAD: list[tuple[Embeddings, dict[str, Any], type[Exception], str]] = [
    (embeddings(1), {}, EmbeddingsError, "image: a batch of 1"),
    (embeddings(image=spoiled(float("nan"))), {}, NonFiniteError, "image: features with NaN"),
    (embeddings(text=spoiled(float("inf"))), {}, NonFiniteError, "text: features with NaN"),
    (embeddings(text=2 * unit(4)), {}, EmbeddingsError, "text: a feature's norm differs from 1 by 1"),
    (embeddings(text=unit(5)), {}, EmbeddingsError, "text: 5 captions for 4 images; give text_owner"),
    (embeddings(text=unit(4, 3)), {}, EmbeddingsError, "text: float32 of shape"),
    (embeddings(text=unit(4).double()), {}, EmbeddingsError, "text: float64"),
    (embeddings(image=unit(4)[0]), {}, EmbeddingsError, "image: float32 of shape"),
    (embeddings(image=unit(4)[:0], text=unit(4)[:0]), {}, EmbeddingsError, "image: float32 of shape"),
    (embeddings(logit_scale=torch.tensor(float("nan"))), {}, NonFiniteError, "logit_scale = nan"),
    (embeddings(logit_scale=torch.tensor(100.0)), {}, EmbeddingsError, "logit_scale = 100"),
    (embeddings(logit_scale=torch.ones(2)), {}, EmbeddingsError, "logit_scale: float32 of shape"),
    (embeddings(logit_bias=torch.tensor(float("inf"))), {}, NonFiniteError, "logit_bias = inf"),
    (embeddings(image_view=3 * unit(4)), {}, EmbeddingsError, "image_view: a feature's norm"),
    (embeddings(image_view=unit(3)), {}, EmbeddingsError, "image_view: float32 of shape"),
    (
        embeddings(text_owner=torch.tensor([0, 1, 2, 2])),
        {},
        EmbeddingsError,
        "text_owner: give numbers from 0 to 3",
    ),
    (embeddings(text_owner=torch.tensor([0, 1, 2])), {}, EmbeddingsError, "text_owner: int64 of shape"),
    (
        embeddings(),
        {"sample_ids": torch.zeros(3, 1, dtype=torch.int64)},
        EmbeddingsError,
        "sample_ids: int64 of shape",
    ),
    (embeddings(), {"sample_ids": torch.zeros(4, 1)}, EmbeddingsError, "sample_ids: float32 of shape"),
    (
        embeddings(),
        {"sample_index": torch.zeros(3, dtype=torch.int64)},
        EmbeddingsError,
        "sample_index: int64",
    ),
    (embeddings(), {"progress": 1.5}, ConfigError, "progress = 1.5"),
    (embeddings(), {"progress": float("nan")}, ConfigError, "progress = nan"),
]


@pytest.mark.parametrize(("features", "more", "error", "message"), BAD, ids=[case[3] for case in BAD])
def test_bad_input_is_refused_by_name(
    features: Embeddings, more: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        build_objective({"name": "clip"}, World())(features, **more)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "siglip"}, "logit_bias"),
        ({"name": "clip", "image_image": {}}, "image_view"),
        ({"name": "clip", "individual_temperature": {}}, "sample_index"),
    ],
)
def test_what_an_objective_needs_is_asked_for_by_name(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_objective(config, World())(embeddings())


def test_a_refused_step_leaves_the_state_alone() -> None:
    objective = build_objective({"name": "clip", "queue_size": 8}, World())
    objective(embeddings())
    before = objective.state_dict()["queue"]["image"]
    with pytest.raises(NonFiniteError):
        objective(embeddings(image=spoiled(float("nan"))))
    assert torch.equal(objective.state_dict()["queue"]["image"], before)


def errors_of_a_rank(world: World) -> list[str]:
    """Rank 1 alone hands in something bad, several times; then all hand in something good."""
    objective = build_objective({"name": "clip"}, world)
    bad: list[dict[str, Any]] = [
        {"image": spoiled(float("nan"))},
        {"text": 2 * unit(4)},
        {"image": unit(4)[0]},
    ]
    messages = []
    for features in [
        *(embeddings(**change if world.rank == 1 else {}) for change in bad),
        embeddings(4 - world.rank),
    ]:
        try:
            objective(features)
        except EmbeddingsError as error:
            messages.append(f"{type(error).__name__}: {error}")
    assert objective(embeddings()).total.isfinite()
    return messages


def test_all_ranks_raise_what_one_rank_found_and_go_on_together(tmp_path: Path) -> None:
    first, second = run_ranks(errors_of_a_rank, 2, tmp_path)
    assert first == second
    assert [message.split(":")[0] for message in first] == ["NonFiniteError"] + ["EmbeddingsError"] * 3
    assert "image" in first[0] and "(rank 1)" in first[0] and "text" in first[1]
    assert "image rows: unequal over ranks, [4, 3]" in first[3]


def test_beta_waits_for_the_warmup_then_rises_linearly() -> None:
    assert [ramp(x, 0.2, 0.4) for x in (0.0, 0.2, 0.3, 0.4, 0.6, 1.0)] == pytest.approx(
        [0, 0, 0.25, 0.5, 1, 1]
    )
    assert [ramp(x, 0.5, 0.0) for x in (0.4, 0.5)] == [0, 1]
    assert [ramp(x, 0.0, 0.0) for x in (0.0, 1.0)] == [1, 1]


def test_hard_negatives_begin_as_clip_and_end_at_full_strength() -> None:
    config = {"name": "hard_negative", "beta": 1.0, "warmup_fraction": 0.1, "ramp_fraction": 0.3}
    objective, clip = build_objective(config, World()), build_objective({"name": "clip"}, World())
    losses = [objective(embeddings(), progress=p).total.item() for p in (0.0, 0.25, 0.4, 1.0)]
    assert losses[0] == clip(embeddings()).total.item()
    assert losses[0] < losses[1] < losses[2] == losses[3]


def test_terms_are_named_finite_and_without_graph() -> None:
    features = embeddings(6, image=unit(6).requires_grad_())
    ids = torch.tensor([0, 1, 2, 3, 4, 0])
    terms = build_objective({"name": "hard_negative", "beta": 0.5}, World())(features, sample_ids=ids).terms
    assert set(terms) == {
        "loss", "clip_loss", "logit_scale", "effective_negatives", "masked_share", "positive_cosine",
        "hardest_negative_cosine", "alignment", "uniformity",
    }  # fmt: skip
    assert all(
        term.dim() == 0 and not term.requires_grad and bool(term.isfinite()) for term in terms.values()
    )


def test_terms_have_the_values_of_their_definitions() -> None:
    features, ids, beta = embeddings(6), torch.tensor([0, 1, 2, 3, 4, 0]), 0.5
    objective = build_objective({"name": "hard_negative", "beta": beta}, World(), tile=(4, 3))
    terms = objective(features, sample_ids=ids).terms
    cosines = features.image.double() @ features.text.double().T
    logits = features.logit_scale.double().exp() * cosines
    negative = ids[:, None] != ids[None, :]
    counts, hardest = [], []
    for z, c in ((logits, cosines), (logits.T, cosines.T)):
        for i in range(6):
            weights = (beta * z[i][negative[i]]).exp()
            counts.append(float(weights.sum() ** 2 / weights.square().sum()))
            hardest.append(float(c[i][negative[i]].max()))
    pairs = [(i, j) for i in range(6) for j in range(i)]
    uniformity = [
        torch.stack([(-2 * (x[i] - x[j]).square().sum()).exp() for i, j in pairs]).mean().log()
        for x in (features.image.double(), features.text.double())
    ]
    want = {
        "clip_loss": build_objective({"name": "clip"}, World())(features, sample_ids=ids).total.item(),
        "effective_negatives": sum(counts) / 12,
        "masked_share": 2 / 30,
        "positive_cosine": float(cosines.diagonal().mean()),
        "hardest_negative_cosine": sum(hardest) / 12,
        "alignment": float((features.image - features.text).square().sum(1).mean()),
        "uniformity": float(sum(uniformity)) / 2,
    }
    for name, value in want.items():
        assert terms[name].item() == pytest.approx(value, rel=1e-5, abs=1e-6), name
