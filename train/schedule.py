"""How long a run lasts and how its learning rate moves."""

import math

from engine.config import BudgetConfig, ScheduleConfig


def rate_factor(config: ScheduleConfig, progress: float) -> float:
    """The share of the peak learning rate at `progress`, the share of the run that is over (0 to 1)."""
    if progress < config.warmup:
        # Never 0: the first step would be wasted.
        return max(progress / config.warmup, 0.01)
    if config.shape == "cosine":
        rest = (progress - config.warmup) / (1 - config.warmup)
        return config.floor + (1 - config.floor) * (1 + math.cos(math.pi * min(rest, 1.0))) / 2
    if progress < 1 - config.decay:
        return 1.0
    return config.floor + (1 - config.floor) * max(0.0, (1 - progress) / config.decay)


class Budget:
    """The end of a run: a number of steps, or a time. The share that is over drives schedule and evaluations."""

    def __init__(self, config: BudgetConfig, tokens_per_step: int, steps_per_epoch: float) -> None:
        self.seconds = None if config.minutes is None else 60 * config.minutes
        self.steps: int | None = None
        if config.steps is not None:
            self.steps = config.steps
        elif config.tokens is not None:
            self.steps = math.ceil(config.tokens / tokens_per_step)
        elif config.epochs is not None:
            self.steps = max(1, round(config.epochs * steps_per_epoch))

    def progress(self, step: int, seconds: float) -> float:
        """The share of the run that is over after `step` steps and `seconds` of training; 1 or more at its end."""
        if self.steps is not None:
            return step / self.steps
        assert self.seconds is not None
        return seconds / self.seconds

    def seconds_left(self, step: int, seconds: float, seconds_per_step: float) -> float:
        if self.steps is not None:
            return max(0, self.steps - step) * seconds_per_step
        assert self.seconds is not None
        return max(0.0, self.seconds - seconds)

    def describe(self) -> str:
        if self.steps is not None:
            return f"{self.steps:,} steps"
        assert self.seconds is not None
        return f"{self.seconds / 60:g} minutes"
