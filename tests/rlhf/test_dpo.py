"""DPO and IPO on a model: where they start, what they read, and that they learn what was preferred."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.chat_template import Message, render
from engine.config import AlignmentConfig, BudgetConfig, DataConfig
from engine.model import GPT
from engine.run import Run
from engine.runtime import choose
from engine.tokenizer import Tokenizer
from rlhf.align import align, alignment_recipe
from rlhf.methods import DPO
from rlhf.preferences import PairBatch, Pairs, Preference
from tests.train.conftest import Recorder
from tests.train.team import train_on
from train.data.loader import IGNORE_INDEX, pack
from train.tracking import read_metrics

TALK = (Message("user", "say fox"), Message("assistant", "bear"), Message("user", "no"))


@pytest.fixture
def batch(tokenizer: Tokenizer, gpt: GPT) -> PairBatch:
    """Three pairs, of which one has an earlier answer, and padding behind them."""
    pairs = Pairs(tokenizer, gpt.config.context)
    for prompt, chosen, rejected in ((TALK[:1], "a fox", "a bear there"), (TALK, "fox", "so"), (TALK[:1], "b", "a")):
        pairs.add(Preference(prompt, chosen, rejected))
    padding = (np.zeros(5, np.int64), np.full(5, IGNORE_INDEX))
    return PairBatch.of(pack([*map(pairs.whole, range(3)), padding], int(pairs.lengths.sum()) + 5))


@pytest.mark.parametrize(("method", "start"), [("dpo", math.log(2)), ("ipo", 1 / (4 * 0.2**2))])
def test_before_the_first_step_the_loss_is_that_of_no_preference(
    gpt: GPT, batch: PairBatch, tokenizer: Tokenizer, method: str, start: float
) -> None:
    dpo = DPO(AlignmentConfig(method=method, beta=0.2), gpt, tokenizer)  # type: ignore[arg-type]
    assert float(dpo.loss(gpt, batch).detach()) == pytest.approx(3 * start)
    measured = dpo.metrics.take()
    assert measured["accuracy"] == 0.5 and measured["chosen_change"] == measured["rejected_change"] == 0


def test_only_the_last_answer_and_its_end_count(gpt: GPT, batch: PairBatch, tokenizer: Tokenizer) -> None:
    dpo = DPO(AlignmentConfig(), gpt, tokenizer)
    dpo.loss(gpt, batch)
    measured = dpo.metrics.take()
    for name, answers in (("chosen", ("a fox", "fox", "b")), ("rejected", ("a bear there", "so", "a"))):
        expected = []
        for prompt, answer in zip((TALK[:1], TALK, TALK[:1]), answers, strict=True):
            ids, _ = render(tokenizer, [*prompt, Message("assistant", answer)])
            begin = len(ids) - len(tokenizer.encode(answer)) - 1
            log_probs = gpt.logits(gpt(torch.tensor([ids[:-1]])))[0].log_softmax(dim=-1)
            expected.append(log_probs[range(begin - 1, len(ids) - 1), ids[begin:]].sum())
        assert measured[name] == pytest.approx(float(torch.stack(expected).mean().detach()), abs=1e-4)


def test_a_batch_in_parts_is_the_whole_and_measures_the_same(gpt: GPT, batch: PairBatch, tokenizer: Tokenizer) -> None:
    reference = GPT(gpt.config)
    dpo = DPO(AlignmentConfig(method="dpo", beta=0.2, label_smoothing=0.1), reference, tokenizer)
    # Of two pairs and of one: the mean of their means would be another.
    parts = torch.stack([dpo.loss(gpt, part) for part in batch.split(2)])
    measured = dpo.metrics.take()
    torch.testing.assert_close(parts.sum(), dpo.loss(gpt, batch))
    assert measured == pytest.approx(dpo.metrics.take(), rel=1e-5)


@pytest.mark.parametrize("method", ["dpo", "ipo"])
def test_an_evaluation_is_the_mean_over_pairs_however_they_are_batched(
    gpt: GPT, tokenizer: Tokenizer, method: str
) -> None:
    config = AlignmentConfig(method=method, beta=0.2)  # type: ignore[arg-type]
    dpo, pairs = DPO(config, GPT(gpt.config), tokenizer), Pairs(tokenizer, gpt.config.context)
    for number in range(9):
        pairs.add(Preference(TALK if number == 8 else TALK[:1], "a fox there " * (1 + number // 3), "bear"))
    one_by_one, some, all_at_once = (dpo.evaluate(pairs, gpt, 10**6, size) for size in (1, 150, 10**6))
    assert some == pytest.approx(one_by_one, rel=1e-5) and all_at_once == pytest.approx(one_by_one, rel=1e-5)
    # Padding is no token; and the pairs that hold so many tokens are the same ones, too.
    assert one_by_one["tokens"] == pairs.tokens
    first = int(pairs.lengths[:4].sum())
    for size in (1, 10**6):
        assert dpo.evaluate(pairs, gpt, first, size)["tokens"] == first


def test_a_process_without_a_pair_has_a_loss_of_0_and_gradients(gpt: GPT, tokenizer: Tokenizer) -> None:
    padding = PairBatch(torch.tensor([0]), torch.tensor([-100]), torch.tensor([0, 1], dtype=torch.int32), 8)
    dpo = DPO(AlignmentConfig(method="dpo"), gpt, tokenizer)
    (part,) = padding.split(1)
    loss = dpo.loss(gpt, part)
    loss.backward()
    assert loss == 0 and dpo.metrics.take() == {}
    assert all(parameter.grad is not None for parameter in gpt.parameters())


@pytest.mark.parametrize("method", ["dpo", "ipo"])
def test_what_was_preferred_becomes_likelier(chat: Run, likes_foxes: DataConfig, tmp_path: Path, method: str) -> None:
    config = AlignmentConfig(method=method, beta=0.2)  # type: ignore[arg-type]
    recipe = alignment_recipe(chat, chat.find_checkpoint(), likes_foxes, config, rate=0.003, batch=4)
    recipe = dataclasses.replace(recipe, budget=BudgetConfig(steps=20))
    recorder = Recorder()
    outcome = align(recipe, Run(tmp_path / "run"), choose("cpu", "fp32"), recorder)
    assert outcome.evaluation["accuracy"] > 0.9
    assert any(line.endswith(": 60 pairs to train on, 20 pairs to validate") for line in recorder.said)
    assert any(line.startswith("budget     20 steps, about ") and " pairs, " in line for line in recorder.said)
    last = [line for line in recorder.logged if "loss" in line][-1]
    assert last["chosen_change"] > last["rejected_change"] and last["chosen"] < 0
    Run(tmp_path / "run").load_model(choose("cpu", "fp32"))


def test_what_a_pass_measured_before_it_ran_out_of_memory_is_not_logged(
    chat: Run, likes_foxes: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, calls = DPO.loss, iter(range(1000))

    def greedy(self: DPO, policy: GPT, batch: PairBatch) -> torch.Tensor:
        loss = honest(self, policy, batch)
        if next(calls) == 4:
            raise torch.OutOfMemoryError("in the second of the second run's three passes")
        return loss

    monkeypatch.setattr(DPO, "loss", greedy)
    monkeypatch.setattr("rlhf.align.HELD_OUT", 2)
    recipe = alignment_recipe(chat, chat.find_checkpoint(), likes_foxes, AlignmentConfig(method="dpo"), batch=6)
    loop = dataclasses.replace(recipe.loop, micro_batch=2, samples=0)
    recipe = dataclasses.replace(recipe, loop=loop, budget=BudgetConfig(steps=1))
    logged = []
    for name in ("undisturbed", "repeated"):
        recorder = Recorder()
        align(recipe, Run(tmp_path / name), choose("cpu", "fp32"), recorder)
        logged.append(recorder.logged[0])
    assert any("out of memory: from now on" in line for line in recorder.said)
    for name in ("loss", "accuracy", "chosen", "rejected"):
        assert logged[0][name] == pytest.approx(logged[1][name], rel=1e-5), name


def test_two_processes_learn_what_one_does(chat: Run, likes_foxes: DataConfig, tmp_path: Path) -> None:
    recipe = alignment_recipe(chat, chat.find_checkpoint(), likes_foxes, AlignmentConfig(method="dpo"), batch=4)
    recipe = dataclasses.replace(recipe, budget=BudgetConfig(steps=4))
    for count in (1, 2):
        train_on(recipe, tmp_path / str(count), count)
    one, two = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("1", "2"))
    for name in ("loss", "tokens", "accuracy", "chosen", "rejected", "gradient_norm", "validation_loss"):
        assert [line.get(name, 0) for line in two] == pytest.approx([line.get(name, 0) for line in one], rel=1e-4)
