"""Where a run ends."""

import pytest

from engine.config import BudgetConfig
from train.optimizer import Budget


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
