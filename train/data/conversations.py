"""Conversations to train on: built in, local or from the Hub; encoded, cut to the context, ready to be packed."""

import dataclasses
import hashlib
from array import array
from collections.abc import Iterator
from functools import cached_property, partial
from itertools import islice

import numpy as np

from engine.chat_template import END, Message, render
from engine.config import DataConfig
from engine.errors import InputError
from engine.tokenizer import Tokenizer
from train.data.instruct_formats import Conversation, read_conversations, recognise, require_answer
from train.data.loader import IGNORE_INDEX
from train.data.shards import Progress, is_prepared
from train.data.sources import HUB_SHORT_NAMES, SPLITS, Source, open_source
from train.data.splits import hash_of, prompt_key
from train.data.story_requests import StoryRequest, story_requests

STORIES_INSTRUCT, STORIES_BRIEF = "stories-instruct", "stories-instruct:brief"
# There are requests without end; so many are more than a small model needs.
STORY_REQUESTS = {"train": 20_000, "validation": 500, "test": 500}
HUB_SETS = {
    "dolly": "databricks/databricks-dolly-15k",
    "alpaca": "tatsu-lab/alpaca",
    "oasst1": "OpenAssistant/oasst1",
    "smoltalk": "HuggingFaceTB/smoltalk:all",
    "smol-smoltalk": "HuggingFaceTB/smol-smoltalk",
    "ultrafeedback": "HuggingFaceH4/ultrafeedback_binarized",
    "tinystories-instruct": "roneneldan/TinyStoriesInstruct",
}


def open_conversations(data: DataConfig, *, answers: bool = True) -> Source | None:
    """The conversations that `data` names, or without `answers` the prompts; None where it names documents.

    Of a file or Hub data set that is not known by name, the columns of the first rows decide, unless they are named.
    Raises InputError where `data` names nothing, or something else that is no text to learn.
    """
    name, named = data.source, data.prompt_column or data.messages_column
    if answers and (data.prompt_column is None) != (data.response_column is None):
        raise InputError("name --prompt-column and --response-column together, or --messages-column alone")
    if name in (STORIES_INSTRUCT, STORIES_BRIEF):
        return StoryRequests(name, limit=data.documents)
    if not named and (data.column or name == "stories" or name in HUB_SHORT_NAMES or is_prepared(name)):
        return None
    pick = partial(read_conversations, data=data, answers=answers)
    name = HUB_SETS.get(name, name)
    source = open_source(name, holdout=data.holdout, limit=data.documents, pick=pick, key=prompt_key)
    if named or data.source in HUB_SETS:
        return source
    return source if recognise(source.peek(), data, answers=answers) else None


@dataclasses.dataclass
class StoryRequests(Source):
    """The built-in instructions: each a request for a story, and the story; or for a brief story."""

    held_out_by: str = "heroes of a kind and trait that no training request names together"

    def describe(self) -> str:
        return f"{self.name}: requests for stories, written by the program itself"

    def requests(self, split: str, start: int = 0) -> Iterator[StoryRequest]:
        if split not in SPLITS:
            raise InputError(f"there is no split {split!r}; the splits are {', '.join(SPLITS)}")
        requests = story_requests(split, start, brief=self.name == STORIES_BRIEF)
        return islice(requests, max(0, (self.limit or STORY_REQUESTS[split]) - start))

    def documents(self, split: str, start: int = 0) -> Iterator[Conversation]:
        for request in self.requests(split, start):
            yield [Message("user", request.text), Message("assistant", request.story)]


class Encoded:
    """What a split was made into, beside the source that has read it, for a person to see what was understood."""

    def __init__(self, tokenizer: Tokenizer, context: int, source: Source | None) -> None:
        self.tokenizer, self.context, self.source = tokenizer, context, source
        self.prompts: set[int] = set()  # hashes of what must not be on both sides of a split

    def of_rows(self) -> str:
        """How many rows were read, where there are rows."""
        return f" of {self.source.rows:,} rows" if self.source and self.source.rows else ""

    def skipped(self) -> list[str]:
        """What the source skipped, and why, where it skipped anything."""
        return [self.source.describe_skipped()] if self.source and self.source.skipped else []

    def describe(self) -> str:
        """What was understood of the data, and what of it is learnt, in one line."""
        raise NotImplementedError

    def describe_beside(self, held_out: "Encoded") -> tuple[str, ...]:
        """Lines for a person before training: what is learnt, what is held out, and by which rule."""
        shared = len(self.prompts & held_out.prompts)
        warning = f"; {shared:,} of its {len(held_out.prompts):,} prompts are trained on as well" if shared else ""
        rule = held_out.source.held_out_by if held_out.source else ""
        return (
            f"train      {self.describe()}",
            f"validation {held_out.describe()}",
            f"held out   {rule}{warning}",
        )


class Conversations(Encoded):
    """Encoded conversations: what a loader packs (train.data.loader.PieceSource). Nothing else sees the text again.

    `cut` counts those that lost their last turns to fit into the context, `dropped` those left out because not even
    their first answer ends within it. `source` has read them, and knows what it skipped.
    """

    def __init__(self, tokenizer: Tokenizer, context: int, source: Source | None = None) -> None:
        super().__init__(tokenizer, context, source)
        self.cut = self.dropped = self.bytes = self.turns = self.systems = self.answers = 0
        self._inputs, self._targets, self._starts = array("i"), array("i"), array("q", [0])

    def add(self, messages: Conversation, where: str) -> None:
        """Encode one more. Raises InputError, with `where` it stands, if there is nothing in it to learn."""
        require_answer(messages, where)
        ids, learn = render(self.tokenizer, messages)
        end = self.tokenizer.special[END]
        ends = [at for at, token in enumerate(ids) if token == end]
        answers = [n for n, message in enumerate(messages) if message.role == "assistant" and message.learn]
        fitting = [n for n in answers if ends[n] <= self.context]
        if not fitting:
            self.dropped += 1
            return
        last = ends[fitting[-1]]
        self.cut += len(fitting) < len(answers)
        self.answers += len(fitting)
        self.turns += sum(message.role != "system" for message in messages[: fitting[-1] + 1])
        self.systems += messages[0].role == "system"
        self.prompts.add(hash_of(prompt_key(messages)))
        targets = zip(ids[1 : last + 1], learn[1 : last + 1], strict=True)
        self._append(ids[:last], [token if learnt else IGNORE_INDEX for token, learnt in targets])

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
    def learnt(self) -> int:
        return int((np.frombuffer(self._targets, np.int32) != IGNORE_INDEX).sum())

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

    def prompt(self, number: int) -> list[int]:
        """The ids of a conversation up to where its first answer begins."""
        inputs, targets = self.read(number, 0, int(self.lengths[number]))
        return inputs[: int(np.argmax(targets != IGNORE_INDEX)) + 1].tolist()

    def describe(self) -> str:
        lost = {
            "cut at a turn": self.cut,
            "left out, longer than the context": self.dropped,
        }
        return "; ".join(
            [
                f"{len(self):,} conversations{self.of_rows()}: {self.turns:,} turns, {self.systems:,} system "
                f"texts, {self.answers:,} answers learnt; {self.tokens:,} tokens, {self.learnt:,} of them to learn",
                *(f"{count:,} {what}" for what, count in lost.items() if count),
                *self.skipped(),
            ]
        )


def encode_conversations(
    source: Source,
    split: str,
    tokenizer: Tokenizer,
    context: int,
    *,
    max_tokens: int | None = None,
    progress: Progress = lambda documents, tokens, text_bytes: None,
) -> Conversations:
    """The conversations of a split, encoded, up to the one that reaches max_tokens."""
    source = dataclasses.replace(source)  # its own, to count what this split skips
    encoded = Conversations(tokenizer, context, source)
    for number, messages in enumerate(source.documents(split)):
        encoded.add(messages, f"conversation {number} of {source.name} ({split})")
        if number % 100 == 0:
            progress(len(encoded), encoded.tokens, encoded.bytes)
        if max_tokens is not None and encoded.tokens >= max_tokens:
            break
    if not len(encoded):
        raise InputError(
            f"no conversation of {source.name} ({split}) fits into the context of {context} tokens: "
            f"{encoded.dropped:,} are longer; choose shorter ones, or a model with a longer context"
        )
    return encoded
