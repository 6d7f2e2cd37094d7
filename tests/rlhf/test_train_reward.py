"""Training a reward model: the same loop, another front end and loss."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.chat_template import Message, answer_prompt
from engine.config import BudgetConfig, DataConfig, RewardConfig, override
from engine.errors import InputError
from engine.model import GPT
from engine.run import Run
from engine.runtime import Runtime, choose
from engine.tokenizer import Tokenizer
from rlhf import reward_model
from rlhf.preferences import PairBatch
from rlhf.reward_model import ImplicitRewardModel, RewardModel, reward_recipe, train_reward
from tests.train.conftest import Recorder
from train.finetune import finetuning_recipe
from train.stage import Outcome
from train.tracking import read_metrics

Learn = Callable[..., tuple[Outcome, Recorder]]


@pytest.fixture
def cpu() -> Runtime:
    return choose("cpu", "fp32")


@pytest.fixture
def learn(tmp_path: Path, chat: Run, likes_foxes: DataConfig, cpu: Runtime) -> Learn:
    """Train a reward model on those who like foxes, in tmp_path/NAME."""

    def run(name: str = "reward", *, steps: int = 4, rate: float = 0.01, **options: Any) -> tuple[Outcome, Recorder]:
        recipe = reward_recipe(chat, chat.find_checkpoint(), likes_foxes, rate)
        recipe = dataclasses.replace(recipe, budget=BudgetConfig(steps=steps))
        recorder = Recorder()
        return train_reward(recipe, Run(tmp_path / name), cpu, recorder, **options), recorder

    return run


def test_it_learns_what_is_liked_and_scores_by_it(learn: Learn, cpu: Runtime, tmp_path: Path) -> None:
    outcome, recorder = learn(steps=30)
    assert outcome.evaluation["accuracy"] > 0.9 and outcome.evaluation["loss"] < 0.4
    assert recorder.losses()[-1] < recorder.losses()[0] - 0.2
    run = Run(tmp_path / "reward")
    last = read_metrics(run.metrics)[-1]
    assert last["validation_accuracy"] == outcome.evaluation["accuracy"] and "validation_calibration_error" in last
    report = run.report.read_text()
    assert "accuracy" in report and "chosen" in report and run.loss_plot.exists()
    assert "reward " in run.samples.read_text()
    assert any(line.endswith(": 60 pairs to train on, 20 pairs to validate") for line in recorder.said)
    assert "budget     30 steps, about 180 pairs, 2.99 epochs" in recorder.said
    assert recorder.logged[-2]["epoch"] == pytest.approx(2.99, abs=0.1)
    for said in ("train      60 pairs", "validation 20 pairs", "scale      6 answers"):
        assert any(line.startswith(said) for line in recorder.said), recorder.said


def test_the_chat_models_own_answers_have_mean_0_and_deviation_1(learn: Learn, cpu: Runtime, tmp_path: Path) -> None:
    learn()
    run = Run(tmp_path / "reward")
    answers = json.loads((run.path / "answers.json").read_text())
    scores = RewardModel.load(run, cpu).score(answers)
    assert float(scores.mean()) == pytest.approx(0, abs=1e-5)
    assert float(scores.std(correction=0)) == pytest.approx(1, abs=1e-5)


def test_a_resumed_run_is_bit_equal_and_needs_its_base_no_more(
    learn: Learn, chat: Run, cpu: Runtime, tmp_path: Path
) -> None:
    _, whole = learn(steps=6)
    run = Run(tmp_path / "reward")
    first, last = Recorder(), Recorder()
    recipe = dataclasses.replace(run.read_recipe(), loop=dataclasses.replace(run.read_recipe().loop, save_every=4))
    target = Run(tmp_path / "half")
    train_reward(recipe, target, cpu, first)
    before = target.find_checkpoint().tensors("model")
    shutil.rmtree(target.find_checkpoint().path)
    shutil.rmtree(chat.path)
    train_reward(target.read_recipe(), target, cpu, last, resume=True)
    assert first.losses() == whole.losses() and last.losses() == whole.losses()[4:]
    after = target.find_checkpoint().tensors("model")
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_step_that_ran_out_of_memory_is_repeated_in_halves_with_the_same_gradient(
    learn: Learn, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, whole = learn(steps=2)
    honest, refused = reward_model.preference_loss, []

    def greedy(model: RewardModel, batch: PairBatch, config: RewardConfig) -> torch.Tensor:
        if len(batch.tokens) == 4 * model.config.context:
            refused.append(batch.pairs)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate a lot")
        return honest(model, batch, config)

    monkeypatch.setattr(reward_model, "preference_loss", greedy)
    _, halves = learn("halves", steps=2)
    assert len(refused) == 1
    assert halves.losses() == pytest.approx(whole.losses(), rel=1e-5)


def test_what_cannot_be_is_refused(
    learn: Learn, chat: Run, likes_foxes: DataConfig, cpu: Runtime, tmp_path: Path
) -> None:
    learn(steps=1)
    run = Run(tmp_path / "reward")
    with pytest.raises(InputError, match="is a reward model: it scores texts"):
        run.load_model(cpu)
    with pytest.raises(InputError, match="is a reward model; name the run"):
        finetuning_recipe(run, run.find_checkpoint(), likes_foxes)
    with pytest.raises(InputError, match="is no reward model"):
        RewardModel.load(chat, cpu)
    measured = run.find_checkpoint().path / "evaluation.json"
    original = measured.read_text()
    for bad in (
        original.replace('"sample_std": ', '"sample_std": 1'),
        '{"sample_mean": "0", "sample_std": 1}',
        "[]",
    ):
        measured.write_text(bad)
        with pytest.raises(InputError, match=r"evaluation\.json is damaged: .*; go on with `gpt reward"):
            RewardModel.load(run, cpu)
    measured.unlink()
    with pytest.raises(InputError, match="was not measured to its end"):
        RewardModel.load(run, cpu)
    chat.write_recipe(dataclasses.replace(chat.read_recipe(), chat=False))
    with pytest.raises(InputError, match="has not learnt conversations"):
        reward_recipe(chat, chat.find_checkpoint(), likes_foxes)


def test_an_implicit_reward_is_how_much_likelier_an_answer_has_become(
    chat: Run, likes_foxes: DataConfig, cpu: Runtime, tmp_path: Path
) -> None:
    recipe = reward_recipe(chat, chat.find_checkpoint(), likes_foxes, 0.01, implicit=True)
    run = Run(tmp_path / "reward")
    outcome = train_reward(dataclasses.replace(recipe, budget=BudgetConfig(steps=20)), run, cpu, Recorder())
    assert outcome.evaluation["accuracy"] > 0.9 and outcome.evaluation["loss"] < 0.4
    model, base = RewardModel.load(run, cpu), chat.load_model(cpu)[0]
    assert isinstance(model, ImplicitRewardModel)

    def log_prob(writer: GPT, prompt: list[int], answer: list[int]) -> float:
        with torch.no_grad():
            scores = writer.logits(writer(torch.tensor([*prompt, *answer])[None]))[0].log_softmax(-1)
        return sum(float(scores[len(prompt) - 1 + place, token]) for place, token in enumerate(answer))

    tokenizer = Tokenizer.load(run.tokenizer)
    prompt = answer_prompt(tokenizer, [Message("user", "say 3")])
    answer = [*tokenizer.encode("fox 3"), tokenizer.special["<|end|>"]]
    expected = recipe.reward.beta * (log_prob(model, prompt, answer) - log_prob(base, prompt, answer))
    measured = run.find_checkpoint().evaluation() or {}
    normalised = (expected - measured["sample_mean"]) / measured["sample_std"]
    assert float(model.score([[*prompt, *answer]])) == pytest.approx(normalised, rel=1e-3)
    own = model.score(json.loads((run.path / "answers.json").read_text()))
    assert float(own.mean()) == pytest.approx(0, abs=1e-4) and float(own.std(correction=0)) == pytest.approx(
        1, abs=1e-4
    )


def test_an_implicit_reward_model_begins_with_rewards_of_0_and_needs_its_base(
    chat: Run, likes_foxes: DataConfig, cpu: Runtime, tmp_path: Path
) -> None:
    recipe = reward_recipe(chat, chat.find_checkpoint(), likes_foxes, implicit=True)
    model = RewardModel.begin(recipe, chat, cpu)
    model.take_backbone(chat.find_checkpoint().tensors("model"))
    torch.testing.assert_close(model.score([[1, 5, 6, 7], [1, 8, 9]]), torch.zeros(2))
    run = Run(tmp_path / "reward")
    sharded = override(recipe, "loop.shard", True)
    with pytest.raises(InputError, match="leave out --shard"):
        train_reward(sharded, run, cpu, Recorder())
    train_reward(dataclasses.replace(recipe, budget=BudgetConfig(steps=1)), run, cpu, Recorder())
    with pytest.raises(InputError, match="is a reward model: it scores texts"):
        run.load_model(cpu)
    shutil.rmtree(chat.path)
    with pytest.raises(InputError, match="chat is not a run"):
        RewardModel.load(run, cpu)
