"""Preferences: which of two answers to the same prompt was liked better. Built in, local or from the Hub; encoded."""

import dataclasses
import hashlib
import math
from array import array
from collections.abc import Sequence
from functools import cached_property
from random import Random

import numpy as np

from engine.chat_template import Message, render, trim
from engine.errors import InputError
from engine.tokenizer import Tokenizer
from train.data.conversations import Encoded
from train.data.loader import IGNORE_INDEX
from train.data.shards import Progress
from train.data.sources import Source
from train.data.splits import hash_of, prompt_key

# How surely the judge tells a better answer (a coin with sigma(difference / NOISE)), and how often it errs on top.
NOISE = 0.5
FLIPPED = 0.05


@dataclasses.dataclass(frozen=True)
class Preference:
    """Two answers to a conversation that ends with its question. `gold`: is the chosen one truly better, if known?"""

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    gold: bool | None = None


def judge(prompt: Sequence[Message], answers: tuple[str, str], scores: tuple[float, float], rng: Random) -> Preference:
    """What a noisy judge says of two answers whose true scores are known, in points: one more fact met is one more."""
    difference = scores[0] - scores[1]
    first = (rng.random() < 1 / (1 + math.exp(-difference / NOISE))) != (rng.random() < FLIPPED)
    chosen, rejected = answers if first else answers[::-1]
    return Preference(tuple(prompt), chosen, rejected, (difference > 0) == first if difference else None)


class Pairs(Encoded):
    """Encoded preferences: what a loader packs, a pair as one document, the chosen conversation first.

    Nothing is predicted, so the targets only mark where the chosen one ends. `same` counts the pairs left out because
    the answers do not differ, `dropped` those too long for the context, `cut` those that lost their oldest turns to
    fit. `source` has read them, and knows what it skipped.
    """

    def __init__(self, tokenizer: Tokenizer, context: int, source: Source | None = None) -> None:
        super().__init__(tokenizer, context, source)
        self.same = self.dropped = self.cut = self.bytes = self.systems = 0
        self.gold: list[bool | None] = []
        self._ids, self._starts = array("i"), array("q", [0])  # two sequences a pair

    def add(self, preference: Preference) -> None:
        answers = (preference.chosen, preference.rejected)
        if answers[0] == answers[1]:
            self.same += 1
            return
        sequences = self._render(preference.prompt, answers)
        if max(map(len, sequences)) > self.context:
            # What the longer answer and its two pieces leave; the two share a prompt, and so are cut alike.
            room = self.context - 1 - max(len(ids) for ids in self.tokenizer.encode_batch(list(answers)))
            try:
                prompt, _ = trim(self.tokenizer, preference.prompt, room)
            except InputError:
                self.dropped += 1
                return
            sequences = self._render(prompt, answers)
            self.cut += 1
        for ids in sequences:
            self._ids.extend(ids)
            self._starts.append(len(self._ids))
            self.bytes += int(self.tokenizer.byte_lengths[ids].sum())
        self.gold.append(preference.gold)
        self.prompts.add(hash_of(prompt_key(preference.prompt)))
        self.systems += preference.prompt[0].role == "system"

    def _render(self, prompt: Sequence[Message], answers: tuple[str, str]) -> list[list[int]]:
        return [render(self.tokenizer, [*prompt, Message("assistant", answer)])[0] for answer in answers]

    def __len__(self) -> int:
        return len(self.gold)

    @property
    def tokens(self) -> int:
        return len(self._ids)

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(np.frombuffer(self._starts, np.int64)[::2])

    @cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256(self._ids.tobytes() + self._starts.tobytes()).hexdigest()

    def read(self, document: int, offset: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        start = self._starts[2 * document]
        ids = np.array(self._ids[start : self._starts[2 * document + 2]])
        marks = np.full(len(ids), IGNORE_INDEX)
        marks[self._starts[2 * document + 1] - start - 1] = 0
        part = slice(offset, offset + length)
        return ids[part], marks[part]

    def pair(self, number: int) -> tuple[list[int], list[int]]:
        """The ids of the chosen and of the rejected conversation."""
        first, middle, last = self._starts[2 * number : 2 * number + 3]
        return self._ids[first:middle].tolist(), self._ids[middle:last].tolist()

    def prompt(self, number: int) -> list[int]:
        """The ids after which the two answers begin."""
        ids, _ = self.pair(number)
        begin = self.tokenizer.special["<|assistant|>"]
        return ids[: len(ids) - ids[::-1].index(begin)]

    def describe(self) -> str:
        lost = {
            "left out, without a difference": self.same,
            "left out, longer than the context": self.dropped,
            "cut at a turn": self.cut,
        }
        return "; ".join(
            [
                f"{len(self):,} pairs{self.of_rows()}: {len(self.prompts):,} prompts, {self.systems:,} system "
                f"texts; {self.tokens:,} tokens",
                *(f"{count:,} {what}" for what, count in lost.items() if count),
                *self.skipped(),
            ]
        )


def encode_preferences(
    source: Source,
    split: str,
    tokenizer: Tokenizer,
    context: int,
    *,
    max_tokens: int | None = None,
    progress: Progress = lambda documents, tokens, text_bytes: None,
) -> Pairs:
    """The pairs of a split, encoded, up to the one that reaches max_tokens. Raises InputError where none is left."""
    source = dataclasses.replace(source)  # its own, to count what this split skips
    pairs = Pairs(tokenizer, context, source)
    for number, preference in enumerate(source.documents(split)):
        pairs.add(preference)
        if number % 100 == 0:
            progress(len(pairs), pairs.tokens, pairs.bytes)
        if max_tokens is not None and pairs.tokens >= max_tokens:
            break
    if not len(pairs):
        raise InputError(
            f"no pair of {source.name} ({split}) is left for a context of {context} tokens: {pairs.describe()}; choose "
            "other --data, or a longer context (--set model.context=N)"
        )
    return pairs
