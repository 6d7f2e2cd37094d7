"""Preferences: which of two answers to one prompt was liked better. Their sources, formats, token ids and batches.

chosen and rejected   texts beside a prompt: a text or turns in instruction, prompt, question, messages or conversations
                      a turn each, or lists of turns: what follows the prompt, or the whole conversation
                      texts with "\\n\\nHuman:" and "\\n\\nAssistant:", as in hh-rlhf
gold                  where there is one: true where the chosen answer is truly the better one, false, or null

The other columns that train.data.formats supports or refuses beside a question are supported or refused here, too.
"""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from operator import attrgetter
from random import Random
from typing import Any, ClassVar

import numpy as np
import torch

from engine.chat_template import Message, answer_prompt, answered, trim
from engine.config import DataConfig, Recipe
from engine.errors import InputError
from engine.runtime import Runtime
from engine.tokenizer import Tokenizer
from train.data.encoded import Encoded
from train.data.formats import Conversation, are_turns, asked, turns_of, unwanted
from train.data.hub import HubSource
from train.data.loader import IGNORE_INDEX, Batch, PackedLoader
from train.data.rows import MESSAGES, PROMPTS, Columns, Row, Skipped, cell, column_names, peek, text_of
from train.data.sources import HUB_PREFERENCES, WrittenSource, open_source
from train.data.splits import Source, hash_of, prompt_key
from train.data.stories import AskedFacts, StoryRequest, forms, score_story, story_requests, storybook
from train.stage import Amounts
from train.tracking import Console

STORIES_PREFERENCES = "stories-preferences"
SPEAKER = re.compile(r"\n\n(Human|Assistant):")
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

    @property
    def key(self) -> Sequence[str]:
        """Return the prompt's key: preferences of one prompt are on the same side of a split."""
        return prompt_key(self.prompt)

    def to_json_line(self) -> str:
        """Return the line of a file that read_preferences reads as this preference."""
        turns = [{"role": message.role, "content": message.content} for message in self.prompt]
        prompt = turns[0]["content"] if len(turns) == 1 else turns
        row = {"prompt": prompt, "chosen": self.chosen, "rejected": self.rejected, "gold": self.gold}
        return json.dumps(row, ensure_ascii=False) + "\n"


def prefer(prompt: Sequence[Message], answers: Sequence[str], scores: Sequence[float], rng: Random) -> Preference:
    """Let a noisy judge choose between two answers whose true scores are known, in points: one for each fact met."""
    difference = scores[0] - scores[1]
    first = (rng.random() < 1 / (1 + math.exp(-difference / NOISE))) != (rng.random() < FLIPPED)
    chosen, rejected = answers if first else answers[::-1]
    return Preference(tuple(prompt), chosen, rejected, (difference > 0) == first if difference else None)


def open_preferences(data: DataConfig) -> Source:
    """Open the preferences that `data` names. Raises InputError where it names nothing."""
    if data.source == STORIES_PREFERENCES:
        return StoryPreferences(data.source, limit=data.documents)
    name, pick = HUB_PREFERENCES.get(data.source, data.source), partial(read_preferences, data=data)
    options: dict[str, Any] = {"holdout": data.holdout, "limit": data.documents, "commit": data.revision}
    source = open_source(name, pick=pick, key=attrgetter("key"), **options)
    return dataclasses.replace(source, stage="prefs") if isinstance(source, HubSource) else source


def read_preferences(rows: Iterable[Row], data: DataConfig = DataConfig()) -> Iterator[Preference | Skipped]:  # noqa: B008
    """Read the preference that each row holds, in the columns that `data` names or in the usual ones."""
    head, rows = peek(rows)
    columns = Columns(head)
    of_turns = [name for name in MESSAGES if columns.holds(name, list)]
    prompt = data.prompt_column or columns.first(PROMPTS, str, list) or next(iter(of_turns), None)
    answers = [data.chosen_column or "chosen", data.rejected_column or "rejected"]
    for where, row in rows:
        if not isinstance(row, Mapping) or not row.keys() >= {*answers}:
            raise InputError(
                f"{where}: a preference has columns {' and '.join(answers)}; there are {column_names(row)}: name them "
                "with --chosen-column and --rejected-column"
            )
        gold = row.get("gold")
        if not (gold is None or isinstance(gold, bool)):
            raise InputError(f"{where}: gold is {gold!r}; it must be true, false or null")
        if data.prompt_column:
            cell(row, data.prompt_column, where)
        said = asked(row, prompt, where, partial(_turns, role="user", where=where))
        told = [_turns(row[name], "assistant", where) for name in answers]
        if said and said[-1].role == "assistant" and not said[-1].content:
            said.pop()  # "\n\nAssistant:", after which the answers begin, with a space
            told = [[Message(turn.role, turn.content.strip()) for turn in turns] for turns in told]
        skipped, both = unwanted(row, where), [_whole(said, turns) for turns in told]
        if any(row[name] is None for name in answers):
            skipped = skipped or Skipped(where, "without an answer")
        yield skipped or _preference(both, gold) or Skipped(where, "not two answers to one prompt")


def _turns(value: object, role: str, where: str) -> Conversation:
    """Read a cell as turns; a bare text is one by `role`, or several where it names its speakers."""
    if value is None:
        return []
    if isinstance(value, Mapping) or are_turns(value):
        return turns_of(value, where)
    text = text_of(value, where)
    if not SPEAKER.match(text):
        return [Message(role, text)]
    _, *parts = SPEAKER.split(text)
    roles = ("user" if speaker == "Human" else "assistant" for speaker in parts[::2])
    return [Message(role, said.strip()) for role, said in zip(roles, parts[1::2], strict=True)]


def _whole(said: Conversation, turns: Conversation) -> Conversation | None:
    """Join a prompt and what follows it, unless the turns begin with the prompt themselves.

    None where they begin with another one.
    """
    if not said or not turns or turns[0].role == "assistant":
        return said + turns
    system = [message for message in said if message.role == "system"]
    bare = [message for message in turns if message.role != "system"]
    own = [message for message in turns if message.role == "system"] or system
    for question, repeated in zip(said[len(system) :], bare, strict=False):
        if (question.role, question.content.strip()) != (repeated.role, repeated.content.strip()):
            return None
    return own + bare


def _preference(both: Sequence[Conversation | None], gold: bool | None) -> Preference | None:
    """Make a preference of two conversations; None where they differ in more than their last answers."""
    chosen, rejected = both
    if not chosen or not rejected or chosen[:-1] != rejected[:-1] or len(chosen) < 2:
        return None
    if {chosen[-1].role, rejected[-1].role} != {"assistant"} or chosen[-2].role != "user":
        return None
    return Preference(tuple(chosen[:-1]), chosen[-1].content, rejected[-1].content, gold)


@dataclasses.dataclass
class StoryPreferences(WrittenSource):
    """The built-in preferences: two answers to a request, as a noisy judge likes them."""

    held_out_by: str = "heroes of a kind and trait that no training request names together"
    what = "pairs of answers to requests for stories, judged"
    counts: ClassVar = {"train": 6_000, "validation": 500, "test": 500}

    def written(self, split: str, start: int) -> Iterator[Preference]:
        requests = story_requests(split, start)
        other = next(requests)
        for number, request in enumerate(requests, start):
            rng = Random(f"preference {split} {number}")
            answers = [write_answer(request, other, rng) for _ in range(2)]
            points = [score_story(request.facts, answer).points for answer in answers]
            yield prefer([Message("user", request.text)], answers, points, rng)
            other = request


def write_answer(request: StoryRequest, other: StoryRequest, rng: Random) -> str:
    """Write an answer to a request: the true one, or one that is worse in some way."""
    sentences, theirs = (re.split(r"(?<=[.!?]) ", each.story) for each in (request, other))
    match rng.choice(("true", "swapped", "swapped", "swapped", "other", "mixed", "cut", "repeated", "shuffled")):
        case "swapped":
            return swap_facts(request.story, request.facts, rng)
        case "other":
            return other.story
        case "mixed":
            return " ".join(sentences[: len(sentences) // 2] + theirs[len(theirs) // 2 :])
        case "cut":
            return request.story[: rng.randrange(len(request.story))]
        case "repeated":
            return " ".join(sentence for sentence in sentences[:8] for _ in range(2))
        case "shuffled":
            words = request.story.split()
            at = rng.randrange(len(words))
            return " ".join(words[:at] + rng.sample(words[at:], len(words) - at))
    return request.story


def swap_facts(story: str, facts: AskedFacts, rng: Random) -> str:
    """Make some of what was asked for something else."""
    book = storybook()
    kinds = [kind for rows in book.kinds.values() for row in rows for kind in row["kind"]]
    choices: dict[str | None, list[str]] = {
        facts.name: sorted({name for names in book.names.values() for name in names}),
        facts.kind: kinds,
        facts.trait: [trait for trait, _ in book.tempers],
        **dict.fromkeys(facts.words, sorted(book.forms)),
    }
    for word, instead in choices.items():
        if word and rng.random() < 0.5:
            said = "|".join(map(re.escape, sorted(forms(word), key=len, reverse=True)))
            story = re.sub(rf"\b(?:{said})\b", rng.choice(instead), story)
    return story


class Pairs(Encoded):
    """Encoded preferences: what a loader packs, a pair as one document, the chosen conversation first.

    Nothing is predicted, so the targets only mark where the chosen one ends. One that is too long loses its oldest
    turns. `same` counts the pairs left out because the answers do not differ.
    """

    what = "pair"

    def __init__(self, tokenizer: Tokenizer, context: int, source: Source | None = None) -> None:
        super().__init__(tokenizer, context, source)
        self.same = 0
        self.gold: list[bool | None] = []

    def add(self, document: Preference, where: str = "") -> None:
        """Encode one more, or count it as left out."""
        answers, prompt = (document.chosen, document.rejected), document.prompt
        if answers[0] == answers[1]:
            self.same += 1
            return
        chosen, rejected = self._render(prompt, answers)
        if max(len(chosen), len(rejected)) > self.context:
            # The prompt gets the room that the longer answer leaves; the two share it, and so are cut alike.
            room = self.context - max(len(chosen), len(rejected)) + len(answer_prompt(self.tokenizer, prompt))
            try:
                kept, _ = trim(self.tokenizer, prompt, room)
            except InputError:
                self.dropped += 1
                return
            chosen, rejected = self._render(kept, answers)
            self.cut += 1
        self._append(chosen + rejected, [IGNORE_INDEX] * (len(chosen) - 1) + [0] + [IGNORE_INDEX] * len(rejected))
        self.gold.append(document.gold)
        self.prompts.add(hash_of(document.key))
        self.systems += prompt[0].role == "system"

    def _render(self, prompt: Sequence[Message], answers: tuple[str, str]) -> list[list[int]]:
        return [answered(self.tokenizer, [*prompt, Message("assistant", answer)]) for answer in answers]

    @cached_property
    def fingerprint(self) -> str:
        starts, marks = np.frombuffer(self._starts, np.int64), np.frombuffer(self._targets, np.int32)
        bounds = np.sort(np.concatenate([starts, np.flatnonzero(marks == 0) + 1]))  # of two sequences a pair
        return hashlib.sha256(self._inputs.tobytes() + bounds.tobytes()).hexdigest()

    def pair(self, number: int) -> tuple[list[int], list[int]]:
        """Return the ids of the chosen and of the rejected conversation."""
        ids, marks = self.whole(number)
        middle = int(np.argmax(marks == 0)) + 1
        return ids[:middle].tolist(), ids[middle:].tolist()

    def prompt(self, number: int) -> list[int]:
        """Return the ids after which the two answers begin."""
        ids, _ = self.pair(number)
        header = self.tokenizer.header
        return ids[: max(at for at in range(1, len(ids)) if ids[max(at - len(header), 0) : at] == header)]

    def amounts(self, held_out: "Pairs") -> Amounts:
        """Say how many pairs there are, and how many of them are learnt in a number of steps."""
        return Amounts(
            f"{len(self):,} pairs to train on, {len(held_out):,} pairs to validate",
            lambda steps, epochs: f"about {epochs * len(self):,.0f} pairs, {epochs:.2f} epochs",
        )

    def details(self) -> str:
        return f": {len(self.prompts):,} prompts, {self.systems:,} system texts; {self.tokens:,} tokens"

    def lost(self) -> dict[str, int]:
        return {"left out, without a difference": self.same, **super().lost(), "cut at a turn": self.cut}


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
    train, validation = Pairs.read_splits(recipe, tokenizer, open_preferences(recipe.data), console)
    batches = PairLoader(
        train, recipe.tokens_per_pass, 2 * context, seed=recipe.loop.seed, processes=runtime.processes, whole=True
    )
    return train, validation, batches
