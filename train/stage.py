"""A stage of training: all that differs between pretraining, finetuning and alignment, and how long it lasts."""

import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from engine.checkpoint import Checkpoint
from engine.config import ModelConfig, Recipe
from engine.model import GPT
from train.data.loader import Batches
from train.optimizer import Budget
from train.tracking import RunningMetrics


class TrainingError(Exception):
    """The run cannot continue. The message says why, and which checkpoint is good."""


@dataclass(frozen=True)
class Amounts:
    """The amounts that a stage learns, in its own units: for the lines that a run prints before it starts."""

    data: str  # what there is to train on and to validate
    steps: Callable[[int, float], str]  # says how much is learnt in a number of steps, which are a number of epochs
    step: str | None = None  # what a step learns; None means the sequences of the batch


@dataclass(frozen=True)
class Stage:
    """A stage of training: all that it brings to `run_stage` and to the loop."""

    # The recipe, completed by what the data decides, such as the vocabulary.
    recipe: Recipe
    batches: Batches
    # Evaluates a model on the first `tokens` held out, `tokens_per_batch` at a time: {"loss": ...} and more.
    evaluate: Callable[..., dict[str, float]]
    sample: Callable[[Any], list[str]]  # lets a model write a few texts, for samples.md
    amounts: Amounts
    # Makes the model, which then takes the weights of `base` if there is one.
    model: Callable[[ModelConfig], GPT] = GPT
    base: Checkpoint | None = None
    begin: Callable[[GPT], None] | None = None  # gives a new model what the text says of its weights
    # The loss summed over a batch's targets. None means `packed_loss`.
    loss: Callable[[Any, Any], Tensor] | None = None
    # For a loss of text: the UTF-8 bytes that each token spells, int64 [vocab], to count bits per byte.
    byte_lengths: Tensor | None = None
    # What the loss and the batches measure, for the log.
    metrics: RunningMetrics = field(default_factory=RunningMetrics)
    # A second model that the loss trains, PPO's critic. It is saved beside the first one.
    critic: nn.Module | None = None
    notes: tuple[str, ...] = ()  # more lines for the console before the run starts

    @cached_property
    def budget(self) -> Budget:
        recipe = self.recipe
        steps_per_epoch = self.batches.batches_per_epoch() * recipe.tokens_per_pass / recipe.tokens_per_step
        return Budget(recipe.budget, recipe.tokens_per_step, steps_per_epoch)


@dataclass(frozen=True)
class State:
    """How far a run has come: state.json of a checkpoint."""

    step: int
    seconds: float
    skipped: int
    parts: int
    batches: dict[str, Any]
    scaler: dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    step: int
    stopped_by: signal.Signals | None  # the signal that stopped the run before its end, if one did
    evaluation: dict[str, float]
    checkpoint: Checkpoint
