"""A whole, very small training run, made once: data on disk, and a recipe that takes a second."""

import dataclasses
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.config import BudgetConfig, Recipe, override, preset
from engine.run import Run
from engine.runtime import Runtime, choose
from engine.tokenizer import train_tokenizer
from train.data.shards import prepare
from train.data.sources import open_source
from train.loop import Loop
from train.pretrain import pretrain
from train.stage import Outcome


class Recorder:
    """A console that remembers."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.logged: list[dict[str, Any]] = []

    def say(self, message: str) -> None:
        self.said.append(message)

    def log(self, metrics: Any) -> None:
        self.logged.append(dict(metrics))

    def close(self) -> None:
        pass

    def losses(self) -> list[float]:
        return [line["loss"] for line in self.logged if "loss" in line]


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int, number: signal.Signals = signal.SIGINT) -> None:
    """Send this process a signal when a loop has done its step number `step`, once."""
    sent: list[int] = []

    def watch(self: Loop, done: int) -> None:
        if done == step and not sent:
            sent.append(done)
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Loop, "on_step", watch)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of prepared stories."""
    folder = tmp_path_factory.mktemp("prepared")
    source = open_source("stories", limit=60)
    tokenizer = train_tokenizer(source.documents("train"), 400)
    for split in ("train", "validation"):
        prepare(source, tokenizer, folder, split, workers=1)
    return folder


@pytest.fixture(scope="session")
def small(prepared: Path) -> Recipe:
    """Six steps of a model that fits in a cache line, more or less."""
    recipe = dataclasses.replace(preset("nano"), budget=BudgetConfig(steps=6))
    for path, value in {
        "data.source": str(prepared),
        "data.evaluation_tokens": 300,
        "data.final_evaluation_tokens": 300,
        "model.width": 16,
        "model.blocks": 2,
        "model.heads": 2,
        "model.context": 32,
        "loop.batch": 4,
        "loop.samples": 1,
        "loop.evaluate_every": 100,
    }.items():
        recipe = override(recipe, path, value)
    return recipe


@pytest.fixture
def cpu() -> Runtime:
    return choose("cpu", "fp32")


Train = Callable[..., tuple[Outcome, Recorder]]


@pytest.fixture
def train(tmp_path: Path, cpu: Runtime) -> Train:
    """Run a recipe in tmp_path/NAME."""

    def run(recipe: Recipe, name: str = "run", *, runtime: Runtime = cpu, **options: Any) -> tuple[Outcome, Recorder]:
        recorder = Recorder()
        return pretrain(recipe, Run(tmp_path / name), runtime, recorder, **options), recorder

    return run
