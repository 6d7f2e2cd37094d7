"""The names of data: the built-in stories, Hugging Face data sets and local files each become a source of documents.

A name is either one of texts (open_source) or one of conversations (open_conversations); both know the same files.
Below them are the sources of files, of what the program writes, and of the hub's data sets.
"""

import contextlib
import dataclasses
import glob
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, ClassVar

from engine.chat_template import Message
from engine.config import DataConfig
from engine.errors import InputError, meant
from engine.hub import HUB_NAME, HubUnreachable
from train.data import workers
from train.data.formats import Conversation, read_conversations, read_texts, recognise
from train.data.hub import HubSource
from train.data.rows import CUT_CHARACTERS, EXTENSIONS, Row, find_files, peek, read_rows, sample_hash
from train.data.shards import is_prepared
from train.data.splits import (
    Key,
    Pick,
    Source,
    Stream,
    files_by_split,
    prompt_key,
    require_split,
    text_key,
)
from train.data.stories import AskedFacts, StoryRequest, stories, story_conversations, story_requests, write_story

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
HUB_PREFERENCES = {
    "hh-rlhf": "Anthropic/hh-rlhf",
    "ultrafeedback_binarized": "HuggingFaceH4/ultrafeedback_binarized",
}
STORIES, STORIES_INSTRUCT = "stories", "stories-instruct"
STORIES_BRIEF, STORIES_CHAT = f"{STORIES_INSTRUCT}:brief", f"{STORIES_INSTRUCT}:chat"
STORY_CHARACTERS = 800  # about the length of a story


def open_source(
    name: str,
    *,
    column: str | None = None,
    holdout: float = 0.02,
    limit: int | None = None,
    pick: Pick | None = None,
    key: Key = text_key,
    commit: str | None = None,
) -> Source:
    """Open the source of that name: stories, tinystories, dsir-pile, owner/dataset[:config], or a file, folder or glob.

    `holdout` is the fraction of documents held out if the data brings no validation split, those with one `key`
    together; `limit` is the number taken of each split that it brings. Documents are the texts of a column, unless
    `pick` makes something else of the rows. A set of the Hub is read as it was at `commit`; None means as it is now.
    Raises InputError if the name means nothing. The Hub is asked only when documents are read.
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
    local = Path(os.path.expanduser(name))  # noqa: PTH111 (Path's fails for an unknown user)
    is_path = glob.has_magic(name) or local.suffix.lower() in EXTENSIONS or name.startswith((".", "/", "~"))
    if name not in HUB_TEXTS and (is_path or local.exists()):
        files, root = find_files(name)
        return FileSource(*options, files=files, root=root)
    if hub := re.fullmatch(rf"({HUB_NAME})(?::([\w.-]+))?", path):
        return HubSource(*options, path=hub[1], config=hub[2], commit=commit)
    raise InputError(
        f"no data is called {name!r}, and there is no such file; use stories, tinystories, dsir-pile (to finetune "
        "also stories-instruct, dolly and others: gpt finetune --help), a Hugging Face data set as owner/name, or a "
        f"file, folder or glob of {' '.join(EXTENSIONS)}"
        + meant(name, (STORIES, STORIES_INSTRUCT, STORIES_BRIEF, STORIES_CHAT, *HUB_TEXTS, *HUB_CONVERSATIONS))
    )


def pinned(data: DataConfig) -> DataConfig:
    """Return the data with the commit that its set of the Hub has now: all that is read of it later is of that commit.

    Data without a commit, and sets of a Hub that cannot be reached, come back as they are if there is a fallback.
    Raises InputError where the Hub has no such set, where this user may not read it, or where other data is to have a
    revision.
    """
    name, source = (HUB_CONVERSATIONS | HUB_PREFERENCES).get(data.source, data.source), None
    with contextlib.suppress(InputError):  # a name of something else, or of nothing, which whoever opens it says
        source = open_source(name, commit=data.revision)
    if not isinstance(source, HubSource):
        if data.revision is not None:
            raise InputError(f"data.revision is for data sets of the Hub, which {data.source} is not; leave it out")
        return data
    try:
        return dataclasses.replace(data, revision=source.newest())
    except HubUnreachable:
        if data.fallback is None:
            raise
        return data


def open_conversations(data: DataConfig, *, answers: bool = True) -> Source | None:
    """Open the conversations that `data` names, or without `answers` the prompts; return None if it names documents.

    Files, and data sets that are not in the tables above, may hold either: the columns that `data` names decide, or
    else those of the first rows. Raises InputError if `data` names nothing, or something that is no text to learn.
    """
    name, named = data.source, data.prompt_column or data.messages_column
    if answers and (data.prompt_column is None) != (data.response_column is None):
        raise InputError("name --prompt-column and --response-column together, or --messages-column alone")
    if name in (STORIES_INSTRUCT, STORIES_BRIEF, STORIES_CHAT):
        return StoryRequests(name, limit=data.documents)
    if not named and (data.column or name == STORIES or name in HUB_TEXTS or is_prepared(name)):
        return None
    pick = partial(read_conversations, data=data, answers=answers)
    name = HUB_CONVERSATIONS.get(name, name)
    options: dict[str, Any] = {"holdout": data.holdout, "limit": data.documents, "commit": data.revision}
    source = open_source(name, pick=pick, key=prompt_key, **options)
    if named or data.source in HUB_CONVERSATIONS:
        return source
    head, _ = peek(chain.from_iterable(source.streams()["train"]()))
    return source if recognise(head, data, answers=answers) else None


@dataclass
class FileSource(Source):
    """Local files, sorted, in splits by the names of folders or files: files_by_split."""

    files: tuple[Path, ...] = ()
    root: Path = Path()

    def describe(self) -> str:
        megabytes = sum(file.stat().st_size for file in self.files) / 1e6
        return f"{self.name}: {len(self.files):,} file{'s' * (len(self.files) > 1)}, {megabytes:,.1f} MB"

    def identity(self) -> list[Any]:
        files = ([str(file.relative_to(self.root)), file.stat().st_size, sample_hash(file)] for file in self.files)
        return [CUT_CHARACTERS, *files]

    def streams(self) -> dict[str, Stream]:
        splits, _ = files_by_split(self.files, self.root)
        return {split: partial(self._open, files) for split, files in splits.items()}

    def split_rule(self) -> str:
        splits, rule = files_by_split(self.files, self.root)
        names = sorted({str(file.relative_to(self.root)) for file in splits.get("validation", ())})
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        return f", by the name of the {rule}: {names[0]}{more}" if names else ""

    def _open(self, files: list[Path]) -> Iterator[Iterator[Row]]:
        # A single short text is cut into smaller documents, so that at least one can be held out.
        alone = max(64, self.files[0].stat().st_size // 8) if len(self.files) == 1 else CUT_CHARACTERS
        return (read_rows(file, min(CUT_CHARACTERS, alone)) for file in files)


@dataclass
class WrittenSource(Source):
    """Documents that the program writes itself, separately for each split. A subclass says which, and how many."""

    what: ClassVar[str] = ""
    # The number of documents read of each split, unless a limit is given: the program could write without end.
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
    """The built-in instructions: each a request for a story, and the story; or for brief stories, one after another."""

    held_out_by: str = "heroes of a kind and trait that no training request names together"
    what = "requests for stories, written"
    counts: ClassVar = {"train": 20_000, "validation": 500, "test": 500}

    def requests(self, split: str, start: int = 0) -> Iterator[list[StoryRequest]]:
        """Return the requests of each conversation."""
        if self.name == STORIES_CHAT:
            found = story_conversations(split, start)
        else:
            found = ([request] for request in story_requests(split, start, brief=self.name == STORIES_BRIEF))
        return islice(found, len(self.numbers(split, start)))

    def written(self, split: str, start: int) -> Iterator[Conversation]:
        return map(_told, self.requests(split, start))

    def prompts(self, split: str) -> Iterator[tuple[Conversation, AskedFacts]]:
        """Yield the prompt that is made of each conversation, up to its last request, and the facts then asked.

        Conversations have one to four requests, each number as often: so have prompts.
        """
        for *before, last in self.requests(split):
            yield [*_told(before), Message("user", last.text)], last.facts


def _told(requests: Sequence[StoryRequest]) -> Conversation:
    roles = (("user", "text"), ("assistant", "story"))
    return [Message(role, getattr(request, what)) for request in requests for role, what in roles]
