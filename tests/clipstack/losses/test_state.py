"""What an objective remembers goes through a checkpoint: the steps after a resume are those of the
uninterrupted run.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from clipstack.errors import CheckpointError
from clipstack.losses import Embeddings, Objective, build_objective
from clipstack.world import World
from tests.clipstack.losses.ranks import run_ranks

N = 6
CONFIGS: list[dict[str, Any]] = [
    {"name": "clip", "queue_size": 9},
    {"name": "hard_negative", "beta": 0.5, "queue_size": 4, "mixing": {"top_k": 3, "count": 2}},
    {"name": "clip", "individual_temperature": {"gamma": 0.5, "lr": 0.01}},
    {"name": "clip"},
]


def step(objective: Objective, number: int, world: World) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    image, text = (
        normalize(torch.randn(N, 4, generator=generator, dtype=torch.float64), dim=1).chunk(world.size)[
            world.rank
        ]
        for _ in "uv"
    )
    ids = torch.randperm(20, generator=generator)[:N].chunk(world.size)[world.rank]
    out = objective(
        Embeddings(image, text, torch.tensor(2.0, dtype=torch.float64)), sample_ids=ids, sample_index=ids
    )
    return world.mean(out.total)


def through_a_file(state: dict[str, Any]) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_resumed_objective_goes_on_bit_for_bit(config: dict[str, Any]) -> None:
    whole = build_objective(config, World())
    for number in range(3):
        step(whole, number, World())
    resumed = build_objective(config, World())
    resumed.load_state_dict(through_a_file(whole.state_dict()))
    for number in range(3, 6):
        assert torch.equal(step(resumed, number, World()), step(whole, number, World()))


def resume_on_rank(
    world: World, config: dict[str, Any], state: dict[str, Any]
) -> tuple[list[Tensor], dict[str, Any]]:
    objective = build_objective(config, world)
    objective.load_state_dict(state)
    losses = [step(objective, number, world) for number in range(3, 6)]
    return losses, objective.state_dict()


@pytest.mark.parametrize("config", CONFIGS[:3], ids=str)
def test_state_of_one_process_is_good_for_two_and_the_same_on_both(
    config: dict[str, Any], tmp_path: Path
) -> None:
    whole = build_objective(config, World())
    for number in range(3):
        step(whole, number, World())
    state = through_a_file(whole.state_dict())
    (first, first_state), (second, second_state) = run_ranks(resume_on_rank, 2, tmp_path, config, state)
    want = [step(whole, number, World()) for number in range(3, 6)]
    torch.testing.assert_close(first, want, rtol=1e-12, atol=1e-12)
    assert first == second and str(first_state) == str(second_state)


def test_evaluation_without_gradients_leaves_the_state_alone() -> None:
    objective = build_objective(CONFIGS[0], World())
    step(objective, 0, World())
    with torch.no_grad():
        step(objective, 1, World())
    assert objective.state_dict()["queue"]["image"].shape == (N, 4)


def test_a_queue_holds_the_newest_pairs() -> None:
    objective = build_objective({"name": "clip", "queue_size": 9}, World())
    for number in range(3):
        step(objective, number, World())
    queue = objective.state_dict()["queue"]
    assert {name: tensor.shape[0] for name, tensor in queue.items()} == dict.fromkeys(queue, 9)
    fresh = build_objective({"name": "clip", "queue_size": 6}, World())
    step(fresh, 2, World())
    assert torch.equal(queue["text"][-6:], fresh.state_dict()["queue"]["text"])


def test_a_sample_that_comes_twice_in_a_step_is_taken_once() -> None:
    objective = build_objective({"name": "clip", "individual_temperature": {"gamma": 1.0}}, World())
    image = normalize(
        torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), dim=1
    )
    index = torch.tensor([5, 2, 5, 0])
    objective(Embeddings(image, image.roll(1, 0), torch.tensor(1.0, dtype=torch.float64)), sample_index=index)
    log_u = objective.state_dict()["log_u"]
    assert log_u.shape == (2, 6)
    assert log_u.isfinite().any(0).tolist() == [True, False, True, False, False, True]


@pytest.mark.parametrize(
    ("change", "message"),
    [({"version": 99}, "version 99"), ({"name": "dcl"}, "written by 'dcl'"), ({"extra": 1}, "extra")],
)
def test_anothers_state_is_refused(change: dict[str, Any], message: str) -> None:
    objective = build_objective({"name": "clip", "queue_size": 9}, World())
    with pytest.raises(CheckpointError, match=message):
        objective.load_state_dict(objective.state_dict() | change)
