"""The engine: on two ranks and at every ZeRO stage, the gradients of one process on the whole batch."""

from __future__ import annotations

import pytest

from tests.clipstack.launching import Zygote

JOBS = "tests.clipstack.rank_jobs"


@pytest.mark.parametrize("check", ["every_stage_gives_the_gradients_of_one_process"])
def test_on_two_ranks(zygote: Zygote, check: str) -> None:
    ended = zygote.run(f"{JOBS}:{check}")
    assert ended.codes == [0, 0], ended.text
