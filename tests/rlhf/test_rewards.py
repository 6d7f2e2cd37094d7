"""Rewards: by the program, by a model, and the best of n by either."""

from itertools import islice

import pytest
import torch

from engine.chat_template import END, Message, answer_ends, answer_prompt
from engine.config import ModelConfig
from engine.model import GPT
from engine.tokenizer import Tokenizer
from rlhf.best_of_n import best_of_n, best_of_n_kl, draw_answers
from rlhf.reward_model import RewardModel
from rlhf.rewards import ModelReward, ProgramReward, Prompt
from train.data.story_requests import story_requests


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
    torch.testing.assert_close(ModelReward(model)(prompts, answers), model.score([[1, 2, 4, 5], [3, 6]]))


def test_the_best_of_more_is_better_and_its_kl_is_bounded(gpt: GPT, tokenizer: Tokenizer) -> None:
    def high(prompts: object, answers: list[list[int]]) -> torch.Tensor:
        return torch.tensor([float(answer[0]) for answer in answers])

    def low(prompts: object, answers: list[list[int]]) -> torch.Tensor:
        return -high(prompts, answers)

    prompts, answers = draw_answers(gpt, [Prompt((1, 2)), Prompt((3,))], 8, answer_ends(tokenizer), seed=0)
    assert [prompt.ids for prompt in prompts[::8]] == [(1, 2), (3,)] and len(answers) == 16
    found = best_of_n(prompts, answers, 8, "high", {"high": high, "low": low})  # type: ignore[dict-item]
    assert [each.n for each in found] == [1, 2, 4, 8]
    rewards = [each.rewards["high"] for each in found]
    assert rewards == sorted(rewards) and rewards[0] < rewards[-1]
    assert rewards[0] == pytest.approx(float(high(None, answers).mean()))
    assert rewards[-1] == pytest.approx(float(high(None, answers).view(2, 8).amax(dim=1).mean()))
    assert all(each.rewards["low"] == -each.rewards["high"] for each in found)
    assert found[0].kl == 0 and best_of_n_kl(64) == pytest.approx(3.17, abs=0.01)
