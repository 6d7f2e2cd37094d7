"""The prompts that a policy answers: conversations up to their first answer, with what a story must say."""

import dataclasses

import numpy as np

from engine.config import DataConfig, Recipe
from engine.errors import InputError
from engine.tokenizer import Tokenizer
from rlhf.rewards import Prompt
from train.data.conversations import STORIES_INSTRUCT, Conversations, StoryRequests, open_conversations
from train.data.instruct_formats import Conversation
from train.data.permutation import Permutation
from train.data.sources import Source
from train.data.stories import AskedFacts


class Prompts(Conversations):
    """Encoded conversations of which the first answer is left to the policy."""

    def __init__(self, tokenizer: Tokenizer, context: int) -> None:
        super().__init__(tokenizer, context)
        self.facts: list[AskedFacts | None] = []
        self.asked: list[Conversation] = []  # the messages before the answer

    def __getitem__(self, number: int) -> Prompt:
        return Prompt(tuple(self.prompt(number)), self.facts[number])

    def first(self, count: int) -> list[Prompt]:
        return [self[number] for number in range(min(count, len(self)))]

    def deal(self, first: int, count: int, seed: int) -> list[Prompt]:
        """The prompts of these places in an endless shuffled order, in which an epoch deals each once."""
        dealt = []
        for place in range(first, first + count):
            epoch, position = divmod(place, len(self))
            dealt.append(self[int(Permutation(len(self), seed, epoch)(np.array([position]))[0])])
        return dealt


def open_prompts(data: DataConfig) -> Source:
    """The conversations that `data` names. Raises InputError where it names documents, or nothing."""
    source = open_conversations(data)
    if source is None:
        raise InputError(f"{data.source} holds documents; prompts come from conversations, such as {STORIES_INSTRUCT}")
    return source


def prompts_of(recipe: Recipe) -> DataConfig | None:
    """The conversations that a run was finetuned on, for their prompts; None where it was with something else."""
    try:
        found = open_conversations(recipe.data) is not None
    except InputError:  # preferences
        found = False
    return dataclasses.replace(recipe.data, tokens=None) if found else None


def encode_prompts(source: Source, split: str, tokenizer: Tokenizer, context: int, most: int) -> Prompts:
    """The first `most` conversations of a split that fit, and the facts where they are the built-in requests."""
    prompts = Prompts(tokenizer, context)
    told = source.requests(split) if isinstance(source, StoryRequests) else None
    for number, messages in enumerate(source.documents(split)):
        facts = next(told).facts if told else None
        prompts.add(messages, f"conversation {number} of {source.name} ({split})")
        if len(prompts) > len(prompts.facts):
            answer = next(place for place, message in enumerate(messages) if message.role == "assistant")
            prompts.facts.append(facts)
            prompts.asked.append(messages[:answer])
        if len(prompts) == most:
            break
    if not len(prompts):
        raise InputError(f"no conversation of {source.name} ({split}) fits into the context of {context} tokens")
    return prompts
