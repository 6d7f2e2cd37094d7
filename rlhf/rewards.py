"""What an answer is worth: by a program that checks it, or by a reward model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from engine.chat_template import answer_ends
from engine.tokenizer import Tokenizer
from rlhf.reward_model import RewardModel
from train.data.stories import AskedFacts
from train.data.story_score import score_story


@dataclass(frozen=True)
class Prompt:
    """What the policy answers: token ids, and what a story must say where the prompt asks for a built-in one."""

    ids: tuple[int, ...]
    facts: AskedFacts | None = None


class Reward(Protocol):
    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[Sequence[int]]) -> Tensor:
        """The worth of each answer (token ids, the end piece included where there is one): fp32 [n], on the CPU."""
        ...


class ProgramReward:
    """How well a story answers a request for one: train/data/story_score.py, in [0, 1]. Cannot be argued with."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.ends = tokenizer, answer_ends(tokenizer)

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[Sequence[int]]) -> Tensor:
        scores = []
        for prompt, answer in zip(prompts, answers, strict=True):
            if prompt.facts is None:
                raise ValueError("a prompt has no facts; the program scores answers to the built-in requests alone")
            text = self.tokenizer.decode([token for token in answer if token not in self.ends])
            scores.append(score_story(prompt.facts, text).total)
        return torch.tensor(scores)


class ModelReward:
    """The normalised score of a reward model: 0 is a typical answer of the finetuned model, 1 a deviation above."""

    def __init__(self, model: RewardModel) -> None:
        self.model = model

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[Sequence[int]]) -> Tensor:
        return self.model.score([[*prompt.ids, *answer] for prompt, answer in zip(prompts, answers, strict=True)])
