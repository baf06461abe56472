"""The engine: on two ranks and at every ZeRO stage, the gradients of one process on the whole batch."""

from __future__ import annotations

import pytest

from tests.clipstack.launching import Zygote

JOBS = "tests.clipstack.rank_jobs"


@pytest.mark.parametrize(
    "check",
    [
        "every_stage_gives_the_gradients_of_one_process",
        "micro_batches_give_the_gradients_of_the_whole_batch",
        "updates_equal_those_of_plain_adamw",
        "siglip_trains_its_bias_as_one_process_does",
        "memory_for_activations_does_not_grow_with_the_batch",
        "running_statistics_become_the_main_ranks",
    ],
)
def test_on_two_ranks(zygote: Zygote, check: str) -> None:
    ended = zygote.run(f"{JOBS}:{check}")
    assert ended.codes == [0, 0], ended.text


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("stages", [("0", "1"), ("2", "3")])
def test_a_matrix_of_settings_on_two_ranks(zygote: Zygote, stages: tuple[str, ...]) -> None:
    ended = zygote.run(
        f"{JOBS}:a_matrix_of_settings_gives_the_gradients_of_one_process", stages, timeout_s=500
    )
    assert ended.codes == [0, 0], ended.text
