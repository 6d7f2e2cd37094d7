"""Pairs: preferences as token ids, the pairs of a split held in memory, and the batches that a stage learns from."""

import dataclasses
import hashlib
from array import array
from collections.abc import Sequence
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch

from engine.chat_template import Message, render, trim
from engine.config import Recipe
from engine.errors import InputError
from engine.runtime import Runtime
from engine.tokenizer import Tokenizer
from rlhf.preferences import Preference, open_preferences
from train.data.conversations import Encoded
from train.data.loader import IGNORE_INDEX, Batch, PackedLoader
from train.data.shards import Progress
from train.data.sources import Source
from train.data.splits import hash_of, prompt_key
from train.stage import Amounts, Console


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
        """Encode one more, or count it as left out."""
        answers = (preference.chosen, preference.rejected)
        if answers[0] == answers[1]:
            self.same += 1
            return
        sequences = self._render(preference.prompt, answers)
        if max(map(len, sequences)) > self.context:
            # What the longer answer and the tokens around it leave; the two share a prompt, and so are cut alike.
            room = self.context - 1 - max(len(ids) for ids in self.tokenizer.encode_batch([*answers]))
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
        chosen, rejected = self.pair(document)
        marks = np.full(len(chosen) + len(rejected), IGNORE_INDEX)
        marks[len(chosen) - 1] = 0
        part = slice(offset, offset + length)
        return np.array(chosen + rejected)[part], marks[part]

    def pair(self, number: int) -> tuple[list[int], list[int]]:
        """Return the ids of the chosen and of the rejected conversation."""
        first, middle, last = self._starts[2 * number : 2 * number + 3]
        return self._ids[first:middle].tolist(), self._ids[middle:last].tolist()

    def prompt(self, number: int) -> list[int]:
        """Return the ids after which the two answers begin."""
        ids, _ = self.pair(number)
        begin = self.tokenizer.special["<|assistant|>"]
        return ids[: len(ids) - ids[::-1].index(begin)]

    def amounts(self, held_out: "Pairs") -> Amounts:
        """Say how many pairs there are, and how many of them so many steps learn."""
        return Amounts(
            f"{len(self):,} pairs to train on, {len(held_out):,} pairs to validate",
            lambda steps, epochs: f"about {epochs * len(self):,.0f} pairs, {epochs:.2f} epochs",
        )

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
    """Encode the pairs of a split, up to the one that reaches max_tokens. Raises InputError where none is left."""
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


@dataclasses.dataclass(frozen=True)
class PairBatch(Batch):
    """Packed pairs: sequences 2k and 2k + 1 are chosen and rejected. One left over at the end is padding."""

    group: ClassVar[int] = 2

    @classmethod
    def of(cls, batch: Batch) -> "PairBatch":
        """Cut pairs that are packed as one sequence each where a mark says that the chosen conversation ends."""
        middles = (batch.targets != IGNORE_INDEX).nonzero()[:, 0] + 1
        bounds = torch.cat((batch.cu_seqlens, middles.int())).sort().values
        return cls(batch.tokens, batch.targets, bounds, batch.max_seqlen)

    @property
    def pairs(self) -> int:
        return (len(self.cu_seqlens) - 1) // 2


class PairLoader(PackedLoader):
    """Batches of whole pairs."""

    def _read(self, plan: list[tuple[int, int, int]]) -> PairBatch:
        return PairBatch.of(super()._read(plan))


def read_pairs(
    recipe: Recipe, tokenizer: Tokenizer, runtime: Runtime, console: Console
) -> tuple[Pairs, Pairs, PairLoader]:
    """Read the pairs to train on and those held out, and make the batches of the former.

    Raises InputError where a pass may not hold a pair.
    """
    context = recipe.model.context
    if recipe.tokens_per_pass < 2 * context:
        raise InputError("a pair takes up to two rows: --batch and loop.micro_batch must be 2 or more")
    source = open_preferences(recipe.data)
    console.say(source.describe())
    limits = {"train": recipe.data.tokens, "validation": recipe.data.final_evaluation_tokens}
    train, validation = (
        encode_preferences(source, split, tokenizer, context, max_tokens=most, progress=console.preparing(split))
        for split, most in limits.items()
    )
    batches = PairLoader(
        train, recipe.tokens_per_pass, 2 * context, seed=recipe.loop.seed, processes=runtime.processes, whole=True
    )
    return train, validation, batches
