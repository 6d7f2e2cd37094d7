"""Documents and conversations as token ids, which a loader packs. Those of a whole split are held in memory.

Encoded is the base class: it holds the ids, and counts and reports what was left out. A subclass defines how one
document of its kind is encoded (`add`), and how all of them are described. Only `add` sees the text.
"""

import dataclasses
import hashlib
from array import array
from functools import cached_property
from itertools import pairwise
from typing import Any, Self

import numpy as np

from engine.chat_template import TemplateError, render
from engine.config import Recipe
from engine.errors import InputError
from engine.progress import listener
from engine.tokenizer import Tokenizer
from train.data.formats import Conversation, has_answer
from train.data.loader import IGNORE_INDEX
from train.data.splits import Source, hash_of, prompt_key
from train.tracking import Console


class Encoded:
    """Encoded documents, a train.data.loader.TokenSource that can also describe itself to a person.

    `cut` counts the documents that were shortened to fit into the context, `dropped` those that cannot fit and were
    left out. `source` has read them, and knows what it skipped.
    """

    what = "document"

    def __init__(self, tokenizer: Tokenizer, context: int, source: Source | None = None) -> None:
        self.tokenizer, self.context, self.source = tokenizer, context, source
        self.cut = self.dropped = self.bytes = self.systems = 0
        self.prompts: set[int] = set()  # hashes of the keys that must not be both trained on and held out
        self._inputs, self._targets, self._starts = array("i"), array("i"), array("q", [0])

    def add(self, document: Any, where: str) -> None:
        """Encode one more document. Raises InputError, with file and line (`where`), if nothing in it can be learnt."""
        raise NotImplementedError

    def read_split(self, split: str, max_tokens: int | None = None) -> Self:
        """Encode a split of the source, up to the document that reaches max_tokens. Raises InputError if none fits."""
        assert self.source is not None
        self.source = source = dataclasses.replace(self.source)  # a copy, which counts what this split skips
        name = f"{source.name} ({split})"
        with listener.get()(f"tokenizing {split}", max_tokens, "tokens") as told:
            for number, document in enumerate(source.documents(split)):
                where = f"{self.what} {number} of {name}"
                try:
                    self.add(document, where)
                except TemplateError as error:
                    raise InputError(f"{where}: {error}") from None
                told(self.tokens)
                if max_tokens is not None and self.tokens >= max_tokens:
                    break
        if not len(self):
            raise InputError(
                f"no {self.what} of {name} is left for a context of {self.context} tokens: {self.left_out()}; choose "
                "shorter ones, or a longer context (--set model.context=N)"
            )
        return self

    @classmethod
    def read_splits(cls, recipe: Recipe, tokenizer: Tokenizer, source: Source, console: Console) -> tuple[Self, Self]:
        """Return the training and the validation split of a recipe, up to its limits, and say what is being read."""
        source.say = console.say
        console.say(source.describe())
        limits = {"train": recipe.data.tokens, "validation": recipe.data.final_evaluation_tokens}
        train, validation = (
            cls(tokenizer, recipe.model.context, source).read_split(split, limit) for split, limit in limits.items()
        )
        return train, validation

    def _append(self, inputs: list[int], targets: list[int]) -> None:
        self._inputs.extend(inputs)
        self._targets.extend(targets)
        self._starts.append(len(self._inputs))
        self.bytes += int(self.tokenizer.byte_lengths[inputs].sum())

    def __len__(self) -> int:
        return len(self._starts) - 1

    @property
    def tokens(self) -> int:
        return len(self._inputs)

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(np.frombuffer(self._starts, np.int64))

    @cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256(self._inputs.tobytes() + self._targets.tobytes() + self._starts.tobytes()).hexdigest()

    def read(self, document: int, offset: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        start = self._starts[document] + offset
        part = slice(start, start + length)
        return np.array(self._inputs[part]), np.array(self._targets[part])

    def whole(self, document: int) -> tuple[np.ndarray, np.ndarray]:
        """Return all inputs and targets of a document."""
        return self.read(document, 0, self._starts[document + 1] - self._starts[document])

    def details(self) -> str:
        """Say what the documents hold, in words that follow their number."""
        return f": {self.tokens:,} tokens"

    def lost(self) -> dict[str, int]:
        """Return how many documents were lost, or lost a part, by the reason."""
        return {"left out, longer than the context": self.dropped}

    def left_out(self) -> str:
        """Say what was lost, and what the source skipped."""
        lost = [f"{count:,} {what}" for what, count in self.lost().items() if count]
        return "; ".join(filter(None, [*lost, self.source.describe_skipped() if self.source else ""]))

    def describe(self) -> str:
        """Say in one line what was understood of the data, and what of it is learnt."""
        rows = f" of {self.source.rows:,} rows" if self.source and self.source.rows else ""
        return "; ".join(filter(None, [f"{len(self):,} {self.what}s{rows}{self.details()}", self.left_out()]))

    def describe_beside(self, held_out: "Encoded") -> tuple[str, ...]:
        """Return lines to show before training: what is learnt, what is held out, and by which rule."""
        shared = len(self.prompts & held_out.prompts)
        warning = f"; {shared:,} of its {len(held_out.prompts):,} prompts are trained on as well" if shared else ""
        rule = held_out.source.held_out_by if held_out.source else ""
        return (
            f"train      {self.describe()}",
            f"validation {held_out.describe()}",
            f"held out   {rule}{warning}",
        )


class Documents(Encoded):
    """Encoded texts, whole: each learns all of its tokens, and that it ends."""

    def add(self, document: str, where: str = "") -> None:
        ids = self.tokenizer.encode(document)
        self._append([self.tokenizer.begin, *ids], [*ids, self.tokenizer.eod])


class Conversations(Encoded):
    """Encoded conversations: each learns what the assistant says. One that is too long loses its last turns.

    Dropped are those of which not even the first answer ends within the context.
    """

    what = "conversation"
    turns = answers = 0

    def add(self, document: Conversation, where: str) -> None:
        if not has_answer(document):
            raise InputError(f"{where}: the assistant says nothing, so nothing would be learnt; fix it or leave it out")
        ids, learn = render(self.tokenizer, document)
        ends = [at for at, (one, after) in enumerate(pairwise([*learn, False])) if one and not after]
        answers = [n for n, message in enumerate(document) if message.role == "assistant" and message.learn]
        fitting = [end for end in ends if end <= self.context]
        if not fitting:
            self.dropped += 1
            return
        last, lost = fitting[-1], len(ends) - len(fitting)
        self.cut += lost > 0
        self.answers += len(fitting)
        self.turns += sum(
            message.role != "system" for message in document[: answers[max(-1 - lost, -len(answers))] + 1]
        )
        self.systems += document[0].role == "system"
        self.prompts.add(hash_of(prompt_key(document)))
        targets = zip(ids[1 : last + 1], learn[1 : last + 1], strict=True)
        self._append(ids[:last], [token if learnt else IGNORE_INDEX for token, learnt in targets])

    @property
    def learnt(self) -> int:
        return int((np.frombuffer(self._targets, np.int32) != IGNORE_INDEX).sum())

    def prompt(self, number: int) -> list[int]:
        """Return the ids of a conversation up to where its first answer begins."""
        inputs, targets = self.whole(number)
        return inputs[: int(np.argmax(targets != IGNORE_INDEX)) + 1].tolist()

    def details(self) -> str:
        return (
            f": {self.turns:,} turns, {self.systems:,} system texts, {self.answers:,} answers learnt; "
            f"{self.tokens:,} tokens, {self.learnt:,} of them to learn"
        )

    def lost(self) -> dict[str, int]:
        return {"cut at a turn": self.cut, **super().lost()}
