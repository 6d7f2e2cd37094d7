"""The names of data: the built-in stories, Hugging Face data sets and local files each become a source of documents.

A name is either one of texts (open_source) or one of conversations (open_conversations); both know the same files.
"""

import glob
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from engine.chat_template import Message
from engine.config import DataConfig
from engine.errors import InputError
from train.data import workers
from train.data.files import EXTENSIONS, FileSource, find_files
from train.data.formats import Conversation, read_conversations, read_texts, recognise
from train.data.hub import HubSource
from train.data.shards import is_prepared
from train.data.splits import Key, Pick, Source, prompt_key, require_split, text_key
from train.data.stories import StoryRequest, stories, story_requests, write_story

HUB_TEXTS = {
    "tinystories": ("roneneldan/TinyStories", "text"),
    "dsir-pile": ("stanford-crfm/DSIR-filtered-pile-50M", "contents"),
}
HUB_CONVERSATIONS = {
    "dolly": "databricks/databricks-dolly-15k",
    "alpaca": "tatsu-lab/alpaca",
    "oasst1": "OpenAssistant/oasst1",
    "smoltalk": "HuggingFaceTB/smoltalk:all",
    "smol-smoltalk": "HuggingFaceTB/smol-smoltalk",
    "ultrafeedback": "HuggingFaceH4/ultrafeedback_binarized",
    "tinystories-instruct": "roneneldan/TinyStoriesInstruct",
}
STORIES, STORIES_INSTRUCT, STORIES_BRIEF = "stories", "stories-instruct", "stories-instruct:brief"
STORY_CHARACTERS = 800  # in a story, more or less


def open_source(
    name: str,
    *,
    column: str | None = None,
    holdout: float = 0.02,
    limit: int | None = None,
    pick: Pick | None = None,
    key: Key = text_key,
) -> Source:
    """Open the source of that name: stories, tinystories, dsir-pile, owner/dataset[:config], or a file, folder or glob.

    `holdout` is the share of documents held out where the data brings no validation split, those with one `key`
    together; `limit` the number taken of each split that it brings. Documents are the texts of a column, unless `pick`
    makes something else of the rows.
    Raises InputError where the name means nothing; the hub is asked when documents are.
    """
    if not 0 < holdout <= 0.5:
        raise InputError(f"the held-out share must be over 0 and at most 0.5, not {holdout}")
    if limit is not None and limit < 1:
        raise InputError(f"a limit of {limit} documents leaves nothing to read")
    if name == STORIES:
        return StoriesSource(name, column, holdout, limit)
    path, usual_column = HUB_TEXTS.get(name, (name, None))
    column = column or usual_column
    options = (name, column, holdout, limit, pick or partial(read_texts, column=column), key)
    local = Path(name).expanduser()
    is_path = glob.has_magic(name) or local.suffix.lower() in EXTENSIONS or name.startswith((".", "/", "~"))
    if name not in HUB_TEXTS and (is_path or local.exists()):
        files, root = find_files(name)
        return FileSource(*options, files=files, root=root)
    if hub := re.fullmatch(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?", path):
        return HubSource(*options, path=hub[1], config=hub[2])
    raise InputError(
        f"no data is called {name!r}, and there is no such file; use stories, tinystories, dsir-pile (to finetune "
        "also stories-instruct, dolly and others: gpt finetune --help), a Hugging Face data set as owner/name, or a "
        f"file, folder or glob of {' '.join(EXTENSIONS)}"
    )


def open_conversations(data: DataConfig, *, answers: bool = True) -> Source | None:
    """Open the conversations that `data` names, or without `answers` the prompts; None where it names documents.

    Where a file or Hub data set is not known by name, the columns of its first rows decide, unless they are named.
    Raises InputError where `data` names nothing, or something else that is no text to learn.
    """
    name, named = data.source, data.prompt_column or data.messages_column
    if answers and (data.prompt_column is None) != (data.response_column is None):
        raise InputError("name --prompt-column and --response-column together, or --messages-column alone")
    if name in (STORIES_INSTRUCT, STORIES_BRIEF):
        return StoryRequests(name, limit=data.documents)
    if not named and (data.column or name == STORIES or name in HUB_TEXTS or is_prepared(name)):
        return None
    pick = partial(read_conversations, data=data, answers=answers)
    name = HUB_CONVERSATIONS.get(name, name)
    source = open_source(name, holdout=data.holdout, limit=data.documents, pick=pick, key=prompt_key)
    if named or data.source in HUB_CONVERSATIONS:
        return source
    return source if recognise(source.peek(), data, answers=answers) else None


@dataclass
class WrittenSource(Source):
    """Documents that the program writes itself, for each split on its own: a subclass says which, and how many."""

    what: ClassVar[str] = ""
    # There are documents without end; so many are read of each split, unless a limit is given.
    counts: ClassVar[dict[str, int]] = {}

    def describe(self) -> str:
        return f"{self.name}: {self.what} by the program itself"

    def written(self, split: str, start: int) -> Iterator[Any]:
        """Write the documents of a split from number `start` on, without end."""
        raise NotImplementedError

    def documents(self, split: str, start: int = 0) -> Iterator[Any]:
        return islice(self.written(split, start), len(self.numbers(split, start)))

    def numbers(self, split: str, start: int = 0, step: int = 1) -> range:
        """Return the numbers of the documents that are read."""
        require_split(split)
        return range(start, self.limit or self.counts[split], step)


@dataclass
class StoriesSource(WrittenSource):
    """The built-in stories."""

    held_out_by: str = "stories that are written for validation alone"
    what = "written"
    # These are enough for a model to see no story twice, and few enough for any disk.
    counts: ClassVar = {"train": 1_000_000, "validation": 5_000, "test": 5_000}

    def identity(self) -> list[Any]:
        # A changed writer shows in its first stories.
        return [self.counts, *(story.text for story in stories("train", 0, 16))]

    def written(self, split: str, start: int) -> Iterator[str]:
        return (story.text for story in stories(split, start))

    def chunks(self, split: str, start: int = 0) -> Iterator[Sequence[str]]:
        size, numbers = max(1, workers.CHUNK_CHARACTERS // STORY_CHARACTERS), self.numbers(split, start)
        return (StoryRange(split, numbers[at : at + size]) for at in range(0, len(numbers), size))

    def every(self, start: int, step: int) -> Iterator[str]:
        return iter(StoryRange("train", self.numbers("train", start, step)))


@dataclass(frozen=True)
class StoryRange(Sequence[str]):
    """Stories that are written when they are read: by the process that encodes them."""

    split: str
    numbers: range

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: Any) -> Any:
        return write_story(self.numbers[index], self.split).text


@dataclass
class StoryRequests(WrittenSource):
    """The built-in instructions: each a request for a story, and the story; or for a brief story."""

    held_out_by: str = "heroes of a kind and trait that no training request names together"
    what = "requests for stories, written"
    counts: ClassVar = {"train": 20_000, "validation": 500, "test": 500}

    def requests(self, split: str, start: int = 0) -> Iterator[StoryRequest]:
        requests = story_requests(split, start, brief=self.name == STORIES_BRIEF)
        return islice(requests, len(self.numbers(split, start)))

    def written(self, split: str, start: int) -> Iterator[Conversation]:
        for request in self.requests(split, start):
            yield [Message("user", request.text), Message("assistant", request.story)]
