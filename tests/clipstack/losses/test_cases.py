"""Every published case, value and gradient, through the tiled engine in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from clipstack.losses import Embeddings, build_objective
from clipstack.world import World

CASES = Path(__file__).resolve().parents[3] / "../shared/cases/objectives.json"
NAMES = {"hcl": "hard_negative", "hn_nce": "hard_negative", "queue": "clip"}


def load_cases() -> list[Any]:
    if not CASES.exists():
        return []
    return [(case, want) for case in json.loads(CASES.read_text())["cases"] for want in case["expected"]]


def objective_of(want: dict[str, Any], queue_size: int) -> dict[str, Any]:
    loss = want["loss"].removesuffix("_duplicates")
    fields = {key: value for key, value in want["params"].items() if key not in ("ids", "logit_bias")}
    if loss == "debiased":
        del fields["beta"]
    return {"name": NAMES.get(loss, loss), **fields} | ({"queue_size": queue_size} if loss == "queue" else {})


def unit(rows: list[list[float]]) -> Tensor:
    return normalize(torch.tensor(rows, dtype=torch.float64), dim=1)


@pytest.mark.skipif(not CASES.exists(), reason="needs the shared case file")
@pytest.mark.parametrize("tile", [1, 3, 64])
@pytest.mark.parametrize(("case", "want"), load_cases(), ids=lambda x: x.get("loss"))
def test_case_has_the_published_value_and_gradients(
    case: dict[str, Any], want: dict[str, Any], tile: int
) -> None:
    objective = build_objective(objective_of(want, len(case["queue_image_raw"])), World(), tile=(tile, tile))
    bias = want["params"].get("logit_bias")
    if want["loss"] == "queue":
        scale = torch.tensor(case["logit_scale"], dtype=torch.float64)
        objective(Embeddings(unit(case["queue_image_raw"]), unit(case["queue_text_raw"]), scale))
    image, text = unit(case["image_raw"]).requires_grad_(), unit(case["text_raw"]).requires_grad_()
    scale = torch.tensor(case["logit_scale"], dtype=torch.float64, requires_grad=True)
    ids = want["params"].get("ids")
    total = objective(
        Embeddings(image, text, scale, None if bias is None else torch.tensor(bias, dtype=torch.float64)),
        sample_ids=None if ids is None else torch.tensor(ids)[:, None],
    ).total
    total.backward()
    assert total.item() == pytest.approx(float(want["value"]), rel=1e-9, abs=1e-14)
    assert scale.grad is not None and image.grad is not None and text.grad is not None
    assert scale.grad.item() == pytest.approx(float(want["d_logit_scale"]), rel=1e-7, abs=1e-12)
    for grad, key in ((image.grad[0], "d_u0_raw_normalized_input"), (text.grad[0], "d_v0")):
        assert grad.tolist() == pytest.approx([float(x) for x in want[key]], rel=1e-7, abs=1e-12)
