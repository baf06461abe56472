"""The divergence guard: what it makes of a series of losses."""

from __future__ import annotations

import pytest

from clipstack.config.models import GuardConfig
from clipstack.errors import DivergenceError
from clipstack.training.guard import MEDIAN_FROM, Guard, Verdict, is_good


def learn(guard: Guard, losses: list[float]) -> None:
    for step, loss in enumerate(losses, start=1):
        assert guard.judge_loss(step, loss) is Verdict.FINE
        assert guard.judge_update(step, loss, applied=True) is Verdict.FINE


def test_bad_steps_are_skipped_until_there_are_too_many_in_a_row() -> None:
    guard = Guard(GuardConfig(max_skips=3))
    assert guard.judge_loss(1, None) is Verdict.SKIP
    assert guard.judge_update(2, 1.0, applied=False) is Verdict.SKIP
    learn(guard, [1.0])  # a good one in between: the count starts again
    assert [guard.judge_loss(step, None) for step in (4, 5, 6)] == [
        Verdict.SKIP,
        Verdict.SKIP,
        Verdict.ROLL_BACK,
    ]
    assert guard.reason == "the loss is not finite at step 6, 3 in a row"
    assert not is_good(guard.state())


def test_a_spike_is_measured_by_the_running_median() -> None:
    guard = Guard(GuardConfig(spike_factor=2.0))
    learn(guard, [9.0] * (MEDIAN_FROM - 1))
    assert guard.judge_loss(90, 1000.0) is Verdict.FINE, "too little is known yet"
    learn(guard, [1.0] * MEDIAN_FROM)
    assert guard.judge_loss(99, 2.01) is Verdict.ROLL_BACK
    assert guard.judge_loss(99, 1.99) is Verdict.FINE


@pytest.mark.parametrize("level", [-3.0, 0.0, 0.02])
def test_a_loss_around_zero_is_no_spike_but_a_leap_is(level: float) -> None:
    guard = Guard(GuardConfig(spike_factor=2.0))
    learn(guard, [level + 0.1 * (-1) ** step for step in range(60)])
    assert guard.judge_loss(61, level + 0.8 * max(0.9, abs(level))) is Verdict.FINE
    assert guard.judge_loss(61, level + 1.2 * max(0.9, abs(level))) is Verdict.ROLL_BACK


def test_off_by_default_a_spike_is_none() -> None:
    guard = Guard(GuardConfig())
    learn(guard, [1.0] * 50)
    assert guard.judge_loss(51, 1e9) is Verdict.FINE


def test_its_state_goes_through_a_checkpoint_but_a_roll_back_keeps_the_count() -> None:
    guard, other = Guard(GuardConfig(max_rollbacks=1)), Guard(GuardConfig(max_rollbacks=1))
    learn(guard, [1.0, 2.0])
    good = guard.state()
    guard.count_rollback()
    other.restore(guard.state())
    assert other.state() == guard.state()
    other.restore(good, keep_rollbacks=True)
    with pytest.raises(DivergenceError, match=r"guard\.max_rollbacks = 1"):
        other.count_rollback()
