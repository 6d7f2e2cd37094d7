"""The prompts that a policy answers: conversations up to an answer, with what a story must say."""

import dataclasses
from collections.abc import Iterable
from itertools import repeat

import numpy as np

from engine.chat_template import answer_prompt
from engine.config import DataConfig, Recipe
from engine.errors import InputError
from engine.tokenizer import Tokenizer
from train.data.encoded import Encoded
from train.data.formats import Conversation, prompt_of
from train.data.loader import IGNORE_INDEX, Permutation
from train.data.sources import STORIES_INSTRUCT, StoryRequests, open_conversations
from train.data.splits import Source, hash_of, prompt_key
from train.data.stories import AskedFacts


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt is token ids, and what a story must say where the prompt asks for a built-in one."""

    ids: tuple[int, ...]
    facts: AskedFacts | None = None


class Prompts(Encoded):
    """Encoded conversations whose answer is left to the policy: they need none of their own."""

    what = "prompt"

    def __init__(self, tokenizer: Tokenizer, context: int, source: Source | None = None) -> None:
        super().__init__(tokenizer, context, source)
        self.facts: list[AskedFacts | None] = []
        self.asked: list[Conversation] = []  # the messages before the answer

    def add(self, document: Conversation, where: str = "", facts: AskedFacts | None = None) -> None:
        """Encode one more, or count it as dropped where it leaves no room for an answer."""
        asked = prompt_of(document)
        ids = answer_prompt(self.tokenizer, asked)
        if len(ids) >= self.context:
            self.dropped += 1
            return
        self._append(ids, [IGNORE_INDEX] * len(ids))
        self.systems += asked[0].role == "system"
        self.prompts.add(hash_of(prompt_key(asked)))
        self.facts.append(facts)
        self.asked.append(asked)

    def details(self) -> str:
        return f", {self.systems:,} with a system text"

    def __getitem__(self, number: int) -> Prompt:
        inputs, _ = self.whole(number)
        return Prompt(tuple(inputs.tolist()), self.facts[number])

    def first(self, count: int) -> list[Prompt]:
        return [self[number] for number in range(min(count, len(self)))]

    def deal(self, first: int, count: int, seed: int) -> list[Prompt]:
        """Return the prompts at these positions of an endless shuffled order, with every prompt once in each epoch."""
        dealt = []
        for position in range(first, first + count):
            epoch, within = divmod(position, len(self))
            dealt.append(self[int(Permutation(len(self), seed, epoch)(np.array([within]))[0])])
        return dealt


def open_prompts(data: DataConfig) -> Source:
    """Open the prompts that `data` names, answered or not. Raises InputError where it names documents, or nothing."""
    source = open_conversations(data, answers=False)
    if source is None:
        raise InputError(f"{data.source} holds documents; prompts come from conversations, such as {STORIES_INSTRUCT}")
    return source


def prompts_of(recipe: Recipe) -> DataConfig | None:
    """Return the conversations that a run was finetuned on, for their prompts; None where it was on something else."""
    try:
        found = open_conversations(recipe.data) is not None
    except InputError:  # preferences
        found = False
    return dataclasses.replace(recipe.data, tokens=None) if found else None


def encode_prompts(source: Source, split: str, tokenizer: Tokenizer, context: int, most: int) -> Prompts:
    """Encode the first `most` prompts of a split that fit, with the facts where they are the built-in requests."""
    source = dataclasses.replace(source)  # its own, to count what this split skips
    prompts = Prompts(tokenizer, context, source)
    asked: Iterable[tuple[Conversation, AskedFacts | None]] = zip(source.documents(split), repeat(None), strict=False)
    if isinstance(source, StoryRequests):
        asked = source.prompts(split)
    for messages, facts in asked:
        prompts.add(messages, facts=facts)
        if len(prompts) == most:
            break
    if not len(prompts):
        raise InputError(f"no prompt of {source.name} ({split}) fits into the context of {context} tokens")
    return prompts
