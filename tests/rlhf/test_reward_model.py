"""Rewards by the program and by a reward model: what is scored, the loss in closed form, and what is measured."""

import dataclasses
import math
from itertools import islice

import pytest
import torch

from engine.chat_template import END, Message, answer_prompt
from engine.config import ModelConfig, RewardConfig, override
from engine.errors import InputError
from engine.model import GPT
from engine.tokenizer import Tokenizer
from rlhf.preferences import PairBatch, PairLoader, Pairs, Preference
from rlhf.prompts import Prompt
from rlhf.reward_model import ProgramReward, RewardModel, measure_preferences, preference_loss
from tests.engine.relatives import RELATIVES
from tests.rlhf.test_preferences import ASKED
from train.data.stories import story_requests

PLAIN = RewardConfig(centring=0.0)


@pytest.fixture
def model(small_config: ModelConfig) -> RewardModel:
    return RewardModel(override(small_config, "scalar_head", True))


@pytest.fixture
def batch(tokenizer: Tokenizer) -> PairBatch:
    pairs = Pairs(tokenizer, 48)
    for n in range(9):
        pairs.add(Preference(ASKED, "the brave fox " * (n % 4), f"bear {n}"))
    return next(PairLoader(pairs, 3 * 48, 2 * 48, seed=0, whole=True, prefetch=0))  # type: ignore[return-value]


def rewards_of(model: RewardModel, batch: PairBatch) -> torch.Tensor:
    return model.last_rewards(batch)


def test_a_zero_head_has_a_loss_of_log_2_and_a_margin_raises_it(model: RewardModel, batch: PairBatch) -> None:
    torch.nn.init.zeros_(model.head_weight)
    pairs = (len(batch.cu_seqlens) - 1) // 2
    assert preference_loss(model, batch, PLAIN).item() == pytest.approx(pairs * math.log(2), rel=1e-6)
    expected = pairs * math.log(1 + math.exp(0.5))
    assert preference_loss(model, batch, RewardConfig(margin=0.5)).item() == pytest.approx(expected, rel=1e-6)


def test_the_loss_is_bradley_terry_with_centring(model: RewardModel, batch: PairBatch) -> None:
    rewards = rewards_of(model, batch).detach()
    chosen, rejected = rewards[0:-1:2], rewards[1::2]
    assert len(rewards) % 2 == 1, "one sequence is padding"
    expected = (torch.log1p((rejected - chosen).exp()) + 0.01 * (chosen + rejected) ** 2).sum()
    torch.testing.assert_close(preference_loss(model, batch, RewardConfig()), expected)


def test_the_head_begins_at_its_scale(small_config: ModelConfig) -> None:
    head = RewardModel(ModelConfig(8, 1024, 1, 2, 8, scalar_head=True)).head
    assert head is not None and head.bias is None
    assert float(head.weight.detach().std()) == pytest.approx(1 / math.sqrt(1025), rel=0.1)


def test_a_conversation_scores_the_same_alone_and_packed(model: RewardModel) -> None:
    sequences = [torch.randint(0, model.config.vocab_size, (length,)).tolist() for length in (5, 48, 1, 17)]
    alone = torch.cat([model.score([each]) for each in sequences])
    for tokens_per_batch in (20, 10_000):
        torch.testing.assert_close(model.score(sequences, tokens_per_batch), alone, rtol=1e-5, atol=1e-6)
    hidden = model(torch.tensor(sequences[1])[None])
    torch.testing.assert_close(model.rewards(hidden)[0, -1].detach(), alone[1], rtol=1e-5, atol=1e-6)
    for wrong in ([], [1] * 49):
        with pytest.raises(InputError, match="sequence 0 has"):
            model.score([wrong])


def test_gradients_come_through_the_last_real_tokens_alone(model: RewardModel, batch: PairBatch) -> None:
    hidden = torch.randn(len(batch.tokens), model.config.width, requires_grad=True)
    model.forward = lambda *_, **__: hidden  # type: ignore[method-assign]
    preference_loss(model, batch, PLAIN).backward()
    assert hidden.grad is not None
    ends = batch.cu_seqlens[1:-1] - 1
    assert hidden.grad.abs().sum(1).nonzero()[:, 0].tolist() == ends.tolist()


def test_padding_changes_no_gradient(model: RewardModel, batch: PairBatch) -> None:
    preference_loss(model, batch, PLAIN).backward()
    before = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    batch.tokens[int(batch.cu_seqlens[-2]) :] = 5
    preference_loss(model, batch, PLAIN).backward()
    after = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert len(before) == len(list(model.parameters()))
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_parts_of_a_batch_add_up(model: RewardModel, batch: PairBatch) -> None:
    whole = preference_loss(model, batch, RewardConfig())
    parts = [preference_loss(model, part, RewardConfig()) for part in batch.split(2)]
    torch.testing.assert_close(sum(parts), whole)


def test_normalised_scores(model: RewardModel) -> None:
    sequences = [[1, 2], [3, 4, 5], [6]]
    raw = model.score(sequences)
    model.normalise(float(raw.mean()), float(raw.std(correction=0)))
    scores = model.score(sequences)
    assert float(scores.mean()) == pytest.approx(0, abs=1e-6) and float(scores.std(correction=0)) == pytest.approx(1)


def test_the_backbone_is_that_of_the_language_model(model: RewardModel, gpt: GPT) -> None:
    head = model.head_weight.clone()
    model.take_backbone(gpt.state_dict())
    tokens = torch.tensor([[1, 2, 3]])
    assert torch.equal(model(tokens), gpt(tokens)) and torch.equal(model.head_weight, head)


@pytest.mark.parametrize("name", RELATIVES)
def test_a_reward_model_of_every_family_has_a_head_of_its_own_over_the_same_body(name: str) -> None:
    base = GPT(RELATIVES[name])
    model = RewardModel(dataclasses.replace(base.config, scalar_head=True))
    model.take_backbone(base.state_dict())
    tokens = torch.tensor([[1, 2, 3]])
    assert torch.equal(model(tokens), base(tokens)) and model.head_weight.shape == (1, base.config.width)
    assert model.config.parameters == sum(parameter.numel() for parameter in model.parameters())
    model.rewards(model(tokens)).sum().backward()
    assert model.head_weight.grad is not None and model.embedding.weight.grad is not None


def test_ties_count_half() -> None:
    measured = measure_preferences(torch.tensor([1.0, 0.0, 2.0, 5.0]), torch.tensor([0.0, 1.0, 2.0, 5.0]))
    assert measured["accuracy"] == 0.5
    still = measure_preferences(torch.zeros(7), torch.zeros(7))
    assert (still["accuracy"], still["calibration_error"]) == (0.5, 0.0)
    assert still["loss"] == pytest.approx(math.log(2))


def test_calibration_is_perfect_where_the_model_is_right_as_often_as_it_says() -> None:
    odds = math.log(3)  # three to one
    right = measure_preferences(torch.tensor([odds] * 3 + [0.0]), torch.tensor([0.0] * 3 + [odds]))
    assert right["calibration_error"] == pytest.approx(0, abs=1e-6) and right["accuracy"] == 0.75
    sure = measure_preferences(torch.tensor([odds] * 4), torch.zeros(4))
    assert sure["calibration_error"] == pytest.approx(0.25)
    assert (sure["chosen_mean"], sure["chosen_std"]) == (pytest.approx(odds), 0)


def test_the_program_scores_the_true_story_high_and_another_s_low(tokenizer: Tokenizer) -> None:
    requests = list(islice(story_requests("test"), 6))
    prompts = [Prompt((*answer_prompt(tokenizer, [Message("user", each.text)]),), each.facts) for each in requests]
    stories = [[*tokenizer.encode(each.story), tokenizer.special[END]] for each in requests]
    reward = ProgramReward(tokenizer)
    assert reward(prompts, stories).mean() > 0.85
    assert reward(prompts, stories[1:] + stories[:1]).mean() < 0.6
    with pytest.raises(ValueError, match="no facts"):
        reward([Prompt((1,))], [[2]])


def test_a_model_scores_the_whole_conversation(small_config: ModelConfig) -> None:
    model = RewardModel(small_config)
    model.normalise(0.5, 2.0)
    prompts, answers = [Prompt((1, 2)), Prompt((3,))], [[4, 5], [6]]
    torch.testing.assert_close(model.score_answers(prompts, answers), model.score([[1, 2, 4, 5], [3, 6]]))
