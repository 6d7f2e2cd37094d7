"""What an answer is worth: by a program that checks it, or by a reward model."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from engine.chat_template import Message, answer_ends, render
from engine.errors import InputError
from engine.run import Run
from engine.runtime import Runtime
from engine.tokenizer import Tokenizer
from rlhf.reward_model import RewardModel
from train.data.stories import AskedFacts
from train.data.story_score import StoryScore, score_story
from train.evaluation import Judge
from train.heldout import Case

PROGRAM = "program"


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
        return torch.tensor([score.total for score in self.scores(prompts, answers)])

    def scores(self, prompts: Sequence[Prompt], answers: Sequence[Sequence[int]]) -> list[StoryScore]:
        scores = []
        for prompt, answer in zip(prompts, answers, strict=True):
            if prompt.facts is None:
                raise ValueError("a prompt has no facts; the program scores answers to the built-in requests alone")
            text = self.tokenizer.decode([token for token in answer if token not in self.ends])
            scores.append(score_story(prompt.facts, text))
        return scores


class ModelReward:
    """The normalised score of a reward model: 0 is a typical answer of the finetuned model, 1 a deviation above."""

    def __init__(self, model: RewardModel) -> None:
        self.model = model

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[Sequence[int]]) -> Tensor:
        return self.model.score([[*prompt.ids, *answer] for prompt, answer in zip(prompts, answers, strict=True)])


def open_reward(name: str, tokenizer: Tokenizer, runtime: Runtime, facts: bool) -> Reward:
    """A reward by its name: `program`, or the run of a reward model.

    Raises InputError where the program has no facts to go by, or the model reads other tokens.
    """
    if name == PROGRAM:
        if not facts:
            raise InputError("the program knows the built-in requests alone: use it with --data stories-instruct")
        return ProgramReward(tokenizer)
    run = Run(Path(name))
    model = RewardModel.load(run, runtime)
    if Tokenizer.load(run.tokenizer).fingerprint != tokenizer.fingerprint:
        raise InputError(f"{run.path} has another tokenizer than the policy; train a reward model from the same run")
    return ModelReward(model.requires_grad_(False))


def judge_by(run: Run, runtime: Runtime) -> Judge:
    """The reward model of a run as a judge of texts (train.evaluation). What is too long for it loses its end."""
    model, tokenizer = RewardModel.load(run, runtime), Tokenizer.load(run.tokenizer)
    context = model.config.context

    def judge(cases: Sequence[Case], texts: Sequence[str]) -> list[float]:
        sequences = []
        for case, text in zip(cases, texts, strict=True):
            if isinstance(case.prompt, str):
                raise InputError("a reward model scores answers in conversations: use it with --data stories-instruct")
            ids, _ = render(tokenizer, [*case.prompt, Message("assistant", text)])
            sequences.append([*ids[:-1][: context - 1], ids[-1]])
        return model.score(sequences).tolist()

    return judge
