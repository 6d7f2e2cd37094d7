"""A chat model that nobody has trained, as a run to begin with, and preferences that are easy to learn."""

import dataclasses
import json
from pathlib import Path

import pytest

from engine import checkpoint
from engine.config import BudgetConfig, DataConfig, LoopConfig, ModelConfig, OptimizerConfig, preset
from engine.model import GPT
from engine.run import Run
from engine.tokenizer import Tokenizer
from tests.train.data.conftest import hub

__all__ = ["hub"]  # a fixture here too


@pytest.fixture
def chat(tmp_path: Path, tokenizer: Tokenizer, small_config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr("rlhf.reward_model.ANSWERS", 6)
    run = Run(tmp_path / "chat")
    recipe = dataclasses.replace(
        preset("nano"),
        model=small_config,
        budget=BudgetConfig(steps=4),
        data=DataConfig(evaluation_tokens=600, final_evaluation_tokens=600),
        optimizer=OptimizerConfig(embedding_rate=0.01, head_rate=0.01, matrix_rate=0.01),
        loop=LoopConfig(batch=4, samples=1, evaluate_every=100),
        chat=True,
    )
    run.write_recipe(recipe)
    tokenizer.save(run.tokenizer)
    checkpoint.save(run.checkpoints, 7, {"model": GPT(recipe.model).state_dict()}, {})
    return run


@pytest.fixture
def likes_foxes(tmp_path: Path) -> DataConfig:
    """Whoever was asked liked the answer with the fox, wherever it stood."""
    rows = [
        {"prompt": f"say {n}", "chosen": f"{'a ' * (n % 3)}fox {n}", "rejected": f"{'a ' * (n % 2)}bear {n}"}
        for n in range(80)
    ]
    path = tmp_path / "foxes.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig(source=str(path), holdout=0.25, evaluation_tokens=600, final_evaluation_tokens=600)
