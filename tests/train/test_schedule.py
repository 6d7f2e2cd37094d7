"""The learning rate over a run, and where a run ends."""

import pytest

from engine.config import BudgetConfig, ScheduleConfig
from train.schedule import Budget, rate_factor


def test_the_rate_rises_through_warm_up_and_is_never_nothing_at_first() -> None:
    config = ScheduleConfig(warmup=0.1)
    assert rate_factor(config, 0.0) == pytest.approx(0.01)
    assert rate_factor(config, 0.05) == pytest.approx(0.5)
    assert rate_factor(config, 0.1) == pytest.approx(1.0)


def test_cosine_falls_to_its_floor() -> None:
    config = ScheduleConfig(shape="cosine", warmup=0.2, floor=0.1)
    assert rate_factor(config, 0.6) == pytest.approx(0.55)
    assert rate_factor(config, 1.0) == pytest.approx(0.1)
    assert rate_factor(config, 1.2) == pytest.approx(0.1)


def test_warm_up_stable_decay_stays_and_then_falls_in_a_straight_line() -> None:
    config = ScheduleConfig(shape="wsd", warmup=0.1, decay=0.4)
    assert [rate_factor(config, share) for share in (0.1, 0.3, 0.59)] == [1.0, 1.0, 1.0]
    assert rate_factor(config, 0.8) == pytest.approx(0.5)
    assert rate_factor(config, 1.0) == pytest.approx(0.0)


def test_no_warm_up_begins_at_the_peak() -> None:
    assert rate_factor(ScheduleConfig(warmup=0.0), 0.0) == 1.0


@pytest.mark.parametrize(
    ("config", "steps"),
    [
        (BudgetConfig(steps=7), 7),
        (BudgetConfig(tokens=1001), 11),
        (BudgetConfig(epochs=2.5), 25),
        (BudgetConfig(epochs=0.001), 1),
    ],
)
def test_steps_tokens_and_epochs_become_steps(config: BudgetConfig, steps: int) -> None:
    budget = Budget(config, tokens_per_step=100, steps_per_epoch=10)
    assert budget.steps == steps
    assert budget.progress(steps, 0.0) == 1.0
    assert budget.seconds_left(0, 0.0, 2.0) == 2.0 * steps


def test_minutes_are_a_matter_of_time_alone() -> None:
    budget = Budget(BudgetConfig(minutes=2), tokens_per_step=100, steps_per_epoch=10)
    assert budget.steps is None
    assert budget.progress(10**6, 30.0) == 0.25
    assert budget.seconds_left(3, 30.0, 99.0) == 90.0
