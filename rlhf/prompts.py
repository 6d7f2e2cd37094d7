"""The prompts that a policy answers: conversations up to their first answer, with what a story must say."""

import numpy as np

from engine.errors import InputError
from engine.tokenizer import Tokenizer
from rlhf.rewards import Prompt
from train.data.conversations import Conversations, StoryRequests
from train.data.permutation import Permutation
from train.data.sources import Source
from train.data.stories import AskedFacts


class Prompts(Conversations):
    """Encoded conversations of which the first answer is left to the policy."""

    def __init__(self, tokenizer: Tokenizer, context: int) -> None:
        super().__init__(tokenizer, context)
        self.facts: list[AskedFacts | None] = []

    def __getitem__(self, number: int) -> Prompt:
        return Prompt(tuple(self.prompt(number)), self.facts[number])

    def deal(self, first: int, count: int, seed: int) -> list[Prompt]:
        """The prompts of these places in an endless shuffled order, in which an epoch deals each once."""
        dealt = []
        for place in range(first, first + count):
            epoch, position = divmod(place, len(self))
            dealt.append(self[int(Permutation(len(self), seed, epoch)(np.array([position]))[0])])
        return dealt


def encode_prompts(source: Source, split: str, tokenizer: Tokenizer, context: int, most: int) -> Prompts:
    """The first `most` conversations of a split that fit, and the facts where they are the built-in requests."""
    prompts = Prompts(tokenizer, context)
    told = source.requests(split) if isinstance(source, StoryRequests) else None
    for number, messages in enumerate(source.documents(split)):
        facts = next(told).facts if told else None
        prompts.add(messages, f"conversation {number} of {source.name} ({split})")
        prompts.facts += [facts] * (len(prompts) - len(prompts.facts))
        if len(prompts) == most:
            break
    if not len(prompts):
        raise InputError(f"no conversation of {source.name} ({split}) fits into the context of {context} tokens")
    return prompts
