"""Conversations to train on: built in, local or from the Hub; encoded, cut to the context, ready to be packed."""

import dataclasses
import hashlib
from array import array
from collections.abc import Iterable, Iterator
from functools import cached_property, partial
from itertools import islice

import numpy as np

from engine.chat_template import END, Message, render
from engine.config import DataConfig
from engine.errors import InputError
from engine.tokenizer import Tokenizer
from train.data.files import Row
from train.data.instruct_formats import Conversation, read_conversations, recognise, require_answer
from train.data.loader import IGNORE_INDEX
from train.data.shards import Progress, is_prepared
from train.data.sources import HUB_SHORT_NAMES, SPLITS, Source, open_source
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


def open_conversations(data: DataConfig) -> Source | None:
    """The conversations that `data` names; None where it names documents. Raises InputError where it names nothing.

    Of a file or Hub data set that is not known by name, the first row decides, unless columns are named.
    """
    name, named = data.source, data.prompt_column or data.messages_column
    if name in (STORIES_INSTRUCT, STORIES_BRIEF):
        return StoryRequests(name, limit=data.documents)
    if not named and (data.column or name == "stories" or name in HUB_SHORT_NAMES or is_prepared(name)):
        return None
    pick = partial(read_conversations, data=data, lenient=name in HUB_SETS)
    source = open_source(HUB_SETS.get(name, name), holdout=data.holdout, limit=data.documents, pick=pick)
    if named or name in HUB_SETS:
        return source
    first = next(dataclasses.replace(source, pick=_bare_rows).documents("train"))
    return source if recognise(first, data) else None


def _bare_rows(rows: Iterable[Row]) -> Iterator[object]:
    return (row for _, row in rows)


@dataclasses.dataclass
class StoryRequests(Source):
    """The built-in instructions: each a request for a story, and the story; or for a brief story."""

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


class Conversations:
    """Encoded conversations: what a loader packs (train.data.loader.PieceSource). Nothing else sees the text again.

    `cut` counts those that lost their last turns to fit into the context, `dropped` those left out because not even
    their first answer ends within it, `unanswered` those in which the source found nothing to learn.
    """

    def __init__(self, tokenizer: Tokenizer, context: int) -> None:
        self.tokenizer, self.context = tokenizer, context
        self.cut = self.dropped = self.unanswered = self.bytes = 0
        self._inputs, self._targets, self._starts = array("i"), array("i"), array("q", [0])

    def add(self, messages: Conversation, where: str) -> None:
        """Encode one more. Raises InputError, with `where` it stands, if there is nothing in it to learn."""
        require_answer(messages, where)
        ids, learn = render(self.tokenizer, messages)
        end = self.tokenizer.special[END]
        ends = [at for at, token in enumerate(ids) if token == end]
        fitting = [n for n, at in enumerate(ends) if messages[n].role == "assistant" and at <= self.context]
        if not fitting:
            self.dropped += 1
            return
        last = ends[fitting[-1]]
        self.cut += last < max(at for at, message in zip(ends, messages, strict=True) if message.role == "assistant")
        self._inputs.extend(ids[:last])
        targets = zip(ids[1 : last + 1], learn[1 : last + 1], strict=True)
        self._targets.extend(token if learnt else IGNORE_INDEX for token, learnt in targets)
        self._starts.append(len(self._inputs))
        self.bytes += int(self.tokenizer.byte_lengths[ids[:last]].sum())

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
        lost = f"; {self.cut:,} cut at a turn" if self.cut else ""
        lost += f"; {self.dropped:,} left out, longer than the context" if self.dropped else ""
        lost += f"; {self.unanswered:,} left out, without an answer" if self.unanswered else ""
        return f"{len(self):,} conversations, {self.tokens:,} tokens, {self.learnt:,} of them to learn{lost}"


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
    encoded = Conversations(tokenizer, context)
    for number, messages in enumerate(source.documents(split)):
        encoded.add(messages, f"conversation {number} of {source.name} ({split})")
        if number % 100 == 0:
            progress(len(encoded), encoded.tokens, encoded.bytes)
        if max_tokens is not None and encoded.tokens >= max_tokens:
            break
    encoded.unanswered = source.skipped
    if not len(encoded):
        raise InputError(
            f"no conversation of {source.name} ({split}) fits into the context of {context} tokens: "
            f"{encoded.dropped:,} are longer; choose shorter ones, or a model with a longer context"
        )
    return encoded
