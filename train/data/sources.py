"""One way to name text (built-in stories, Hugging Face data sets, local files): each name is a stream of documents."""

import contextlib
import glob
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, Protocol

from engine.errors import InputError
from train.data import encoding
from train.data.files import CUT_CHARACTERS, EXTENSIONS, find_files, read_rows, sample_hash
from train.data.rows import PEEKED, Row, Skipped, pick_texts
from train.data.splits import SPLIT_WORDS, HoldOut, Key, files_by_split, hash_of, is_held_out, text_key
from train.data.stories import SPLITS, stories, write_story

HUB_SHORT_NAMES = {
    "tinystories": ("roneneldan/TinyStories", "text"),
    "dsir-pile": ("stanford-crfm/DSIR-filtered-pile-50M", "contents"),
}
PROBE_SECONDS = 8
# There are stories without end; so many are enough to say that a model has not seen them twice, and fit on any disk.
STORIES = {"train": 1_000_000, "validation": 5_000, "test": 5_000}
STORY_CHARACTERS = 800  # more or less

# Changes when other documents are held out than before, or other files make a split.
SPLIT_RULE = 2

Streams = dict[str, Callable[[], Iterable[Any]]]
# Makes of rows documents, or says that it skipped them.
Pick = Callable[..., Iterator[Any]]


class Stream(Protocol):
    """Documents, and `Skipped` rows, that are read once, and the place that has been reached in them (JSON-able)."""

    def __iter__(self) -> Iterator[Any]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class HubUnreachable(InputError):  # noqa: N818
    """The Hugging Face hub did not answer. The data set itself may be fine: a command may fall back to other data."""


def open_source(
    name: str,
    *,
    column: str | None = None,
    holdout: float = 0.02,
    limit: int | None = None,
    pick: Pick | None = None,
    key: Key = text_key,
) -> "Source":
    """The source of that name: stories, tinystories, dsir-pile, owner/dataset[:config], or a file, folder or glob.

    `holdout` is the share of documents held out where the data brings no validation split, those with one `key`
    together; `limit` the number taken of each split that it brings. Documents are the texts of a column, unless `pick`
    makes something else of the rows.
    Raises InputError where the name means nothing; the hub is asked when documents are.
    """
    if not 0 < holdout <= 0.5:
        raise InputError(f"the held-out share must be over 0 and at most 0.5, not {holdout}")
    if limit is not None and limit < 1:
        raise InputError(f"a limit of {limit} documents leaves nothing to read")
    if name == "stories":
        return StoriesSource(name, column, holdout, limit)
    if name in HUB_SHORT_NAMES:
        path, usual_column = HUB_SHORT_NAMES[name]
        column = column or usual_column
        return HubSource(name, column, holdout, limit, pick or partial(pick_texts, column=column), key, path=path)
    pick = pick or partial(pick_texts, column=column)
    local = Path(name).expanduser()
    if local.exists() or glob.has_magic(name) or local.suffix.lower() in EXTENSIONS or name.startswith((".", "/", "~")):
        files, root = find_files(name)
        return FileSource(name, column, holdout, limit, pick, key, files=files, root=root)
    if hub := re.fullmatch(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?", name):
        return HubSource(name, column, holdout, limit, pick, key, path=hub[1], config=hub[2])
    raise InputError(
        f"no data is called {name!r}, and there is no such file; use stories, tinystories, dsir-pile (to finetune "
        "also stories-instruct, dolly and others: gpt finetune --help), a Hugging Face data set as owner/name, or a "
        f"file, folder or glob of {' '.join(EXTENSIONS)}"
    )


@dataclass
class Source:
    """A named stream of documents, in splits. Picklable; opens nothing before documents are asked for.

    Of the latest pass: `rows` counts those that were read, `skipped` those that were left out, by reason, with where
    the first of each stood; `held_out_by` says what decides which documents are held out.
    """

    name: str
    column: str | None = None
    holdout: float = 0.02
    limit: int | None = None
    pick: Pick = pick_texts
    key: Key = text_key
    rows: int = 0
    skipped: dict[str, tuple[int, str]] = field(default_factory=dict)
    held_out_by: str = ""

    def describe(self) -> str:
        """One line for a person."""
        raise NotImplementedError

    def streams(self) -> Streams:
        """The splits that the data itself comes with, "train" always, each as a function that opens it."""
        raise NotImplementedError

    def identity(self) -> list[Any]:
        """What, beside the options, decides which documents come out. Needs no network, and no place on a disk."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """SHA-256 of all that decides which documents come out."""
        parts = [SPLIT_RULE, type(self).__name__, self.column, self.holdout, self.limit, *self.identity()]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def check(self) -> None:
        """Raise what is wrong with this source, if anything, by reading its first document."""
        self.documents("train")

    def documents(self, split: str, start: int = 0) -> Iterator[Any]:
        """The non-empty documents of a split from number `start` on. Raises InputError where the split has none."""
        documents = islice(self._split(split), start, None)
        first = list(islice(documents, 1))
        if not first and start == 0:
            bare = "it is empty" if split == "train" else "it has fewer than two documents"
            why = self.describe_skipped() or bare
            raise InputError(f"{self.name} has no text for the {split} split: {why}; choose other --data")
        return chain(first, documents)

    def peek(self) -> list[object]:
        """The first rows to train on, as they are."""
        bare = replace(self, pick=lambda rows, head=None: (row for _, row in rows))
        return list(islice(bare.streams()["train"](), PEEKED))

    def describe_read(self, documents: int) -> str:
        """How many documents came of how many rows in the latest pass, and what it left out, for a person."""
        rows = f" of {self.rows:,} rows read" if self.rows else ""
        return "; ".join(filter(None, [f"{documents:,} documents{rows}", self.describe_skipped()]))

    def describe_skipped(self) -> str:
        """What the latest pass left out, and why: for a person. "" where that was nothing."""
        return "; ".join(f"{count:,} left out, {why} (first: {at})" for why, (count, at) in self.skipped.items())

    def chunks(self, split: str, start: int = 0) -> Iterator[Sequence[str]]:
        """The same documents, where they are texts, as they are dealt to the processes that encode them."""
        return encoding.in_chunks(self.documents(split, start))

    def share(self, rank: int, world_size: int) -> Stream:
        """One of `world_size` shares of the documents to train on: each is in one. Held-out ones are among them."""
        return CountedStream(self._every, rank, world_size)

    def _every(self, start: int, step: int) -> Iterator[Any]:
        return islice(self.streams()["train"](), start, self.limit, step)

    def _split(self, split: str) -> Iterator[Any]:
        if split not in SPLITS:
            raise InputError(f"there is no split {split!r}; the splits are {', '.join(SPLITS)}")
        streams = self.streams()
        brings = "validation" in streams
        if brings:
            self.held_out_by = f"the data's own validation split{self.split_rule()}"
        else:
            share = f"one in {max(2, round(1 / self.holdout))}"
            by_text = f"{share} of the documents, equal ones on one side"
            self.held_out_by = by_text if self.key is text_key else f"{share} of the prompts, with all answers to them"
        if brings if split == "train" else split in streams:
            return self._present(streams[split])
        if split == "test":
            raise InputError(f"{self.name} has no test split; it has train and validation")
        return self._side(self._present(streams["train"]), split == "validation")

    def _side(self, documents: Iterator[Any], held_out: bool) -> Iterator[Any]:
        """Those of the documents that are held out, or the others."""
        first: list[Any] = []
        keys: set[int] = set()
        for document in documents:
            first.append(document)
            keys.add(hash_of(self.key(document)))
            if len(keys) > 1:
                break
        by_key = HoldOut(self.holdout, self.key) if len(keys) > 1 else None
        if by_key is None:
            # Nothing to tell them apart by: held out all the same, and said.
            same = "are equal" if self.key is text_key else "have one prompt"
            self.held_out_by = f"one in {max(2, round(1 / self.holdout))} of the documents by their number: all {same}"
        for number, document in enumerate(chain(first, documents)):
            if held_out == (by_key(document) if by_key else is_held_out(number, self.holdout)):
                yield document

    def split_rule(self) -> str:
        """What the data's own splits were told apart by, in words to go on with."""
        return ""

    def _counted(self, rows: Iterable[Row]) -> Iterator[Row]:
        for row in rows:
            self.rows += 1
            yield row

    def _present(self, stream: Callable[[], Iterable[Any]]) -> Iterator[Any]:
        self.rows, self.skipped = 0, {}
        for document in islice(stream(), self.limit):
            if isinstance(document, Skipped):
                count, first = self.skipped.get(document.why, (0, document.where))
                self.skipped[document.why] = (count + 1, first)
            else:
                yield document


@dataclass
class CountedStream:
    """Every `step`-th document, from number `first` on. The place is their count."""

    every: Callable[[int, int], Iterable[Any]]
    first: int
    step: int
    read: int = 0

    def __iter__(self) -> Iterator[Any]:
        for document in self.every(self.first + self.read * self.step, self.step):
            self.read += 1
            yield document

    def state_dict(self) -> dict[str, Any]:
        return {"read": self.read}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.read = state["read"]


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
class StoriesSource(Source):
    """The stories that the program writes itself."""

    held_out_by: str = "stories that are written for validation alone"

    def describe(self) -> str:
        return "stories: written by the program itself"

    def identity(self) -> list[Any]:
        # A changed writer shows in its first stories.
        return [STORIES, *(story.text for story in stories("train", 0, 16))]

    def documents(self, split: str, start: int = 0) -> Iterator[str]:
        if split not in SPLITS:
            raise InputError(f"there is no split {split!r}; the splits are {', '.join(SPLITS)}")
        return iter(StoryRange(split, range(start, self._count(split))))

    def chunks(self, split: str, start: int = 0) -> Iterator[Sequence[str]]:
        size = max(1, encoding.CHUNK_CHARACTERS // STORY_CHARACTERS)
        numbers = range(start, self._count(split))
        return (StoryRange(split, numbers[at : at + size]) for at in range(0, len(numbers), size))

    def _every(self, start: int, step: int) -> Iterator[str]:
        return iter(StoryRange("train", range(start, self._count("train"), step)))

    def _count(self, split: str) -> int:
        return self.limit or STORIES[split]


@dataclass
class FileSource(Source):
    """Local files, sorted, in splits by the names of folders or files: train.data.splits.files_by_split."""

    files: tuple[Path, ...] = ()
    root: Path = Path()

    def describe(self) -> str:
        megabytes = sum(file.stat().st_size for file in self.files) / 1e6
        return f"{self.name}: {len(self.files):,} file{'s' * (len(self.files) > 1)}, {megabytes:,.1f} MB"

    def identity(self) -> list[Any]:
        names = (str(file.relative_to(self.root)) for file in self.files)
        sizes = ([file.stat().st_size, sample_hash(file)] for file in self.files)
        return [CUT_CHARACTERS, *([name, *rest] for name, rest in zip(names, sizes, strict=True))]

    def streams(self) -> Streams:
        splits, _ = files_by_split(self.files, self.root)
        return {split: partial(self._read, files) for split, files in splits.items()}

    def split_rule(self) -> str:
        splits, rule = files_by_split(self.files, self.root)
        names = sorted({str(file.relative_to(self.root)) for file in splits.get("validation", ())})
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        return f", by the name of the {rule}: {names[0]}{more}" if names else ""

    def _read(self, files: list[Path]) -> Iterator[Any]:
        # A lone short text is cut finer: it, too, has to give a document to hold out.
        alone = max(64, self.files[0].stat().st_size // 8) if len(self.files) == 1 else CUT_CHARACTERS
        rows = (self._counted(read_rows(file, min(CUT_CHARACTERS, alone))) for file in files)
        return chain.from_iterable(map(self.pick, rows))


@dataclass
class HubSource(Source):
    """A data set of the Hugging Face hub, streamed."""

    path: str = ""
    config: str | None = None
    # Of a data set with splits for several stages, as ultrafeedback has: train_sft, train_prefs.
    stage: str = "sft"

    def describe(self) -> str:
        return f"{self.name}: {self.path} from the Hugging Face hub, streamed"

    def identity(self) -> list[Any]:
        return [self.path, self.config]

    def share(self, rank: int, world_size: int) -> Stream:
        if self.limit is not None:
            # The first so many documents of all, whichever file they are in: only counting finds them.
            return super().share(rank, world_size)
        rows = self._splits()["train"]
        from datasets import Dataset
        from datasets.distributed import split_dataset_by_node

        if isinstance(rows, Dataset):
            rows = rows.to_iterable_dataset()
        # Looked at apart: the place in a stream of rows is that of the last one that was read.
        head = [] if self.column else list(rows.take(PEEKED))
        return HubStream(self, split_dataset_by_node(rows, rank, world_size), head)

    def streams(self) -> Streams:
        return {split: partial(self.read, rows) for split, rows in self._splits().items()}

    def _splits(self) -> dict[str, Any]:
        try:
            import datasets
            from huggingface_hub import constants
        except ImportError:
            raise HubUnreachable(
                f"{self.name}: the datasets package is missing; pip install datasets, or use built-in data (stories, "
                "stories-instruct) or a file"
            ) from None
        # Offline, only a copy that was downloaded whole will do, and such copies are not streamed.
        offline = constants.HF_HUB_OFFLINE
        if not offline:
            _probe_hub(self.name)
        with self._plain_errors():
            splits = datasets.load_dataset(self.path, self.config, streaming=not offline)
        found: dict[str, Any] = {}
        for name, rows in splits.items():
            bare = name.removesuffix(f"_{self.stage}")
            found.setdefault(SPLIT_WORDS.get(bare, bare), rows)
        if len(found) == 1:
            return {"train": next(iter(found.values()))}
        if "train" not in found:
            raise InputError(f"{self.name} has no training split, only {', '.join(found)}; choose other --data")
        return found

    def read(self, rows: Iterable[Any], head: Sequence[object] | None = None) -> Iterator[Any]:
        """The documents in rows of this data set, which begins with `head`, and what is skipped."""
        numbered = self._counted((f"{self.name}, row {at}", row) for at, row in enumerate(rows, 1))
        with self._plain_errors():
            yield from self.pick(numbered) if head is None else self.pick(numbered, head)

    @contextlib.contextmanager
    def _plain_errors(self) -> Iterator[None]:
        """Turn what the hub's many layers raise into one message that can be acted on."""
        try:
            yield
        except InputError:
            raise
        except Exception as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            if isinstance(error, FileNotFoundError):
                raise InputError(
                    f"{self.path}: no such data set on the hub, or not for you, and no such file ({reason})"
                ) from error
            if "BuilderConfig" in reason or "Config name" in reason:
                asked = f"has no config {self.config!r}" if self.config else "comes in several configs"
                names = re.search(r"\[.*\]", str(error))
                raise InputError(
                    f"{self.path} {asked}: choose one of {names and names[0]} as {self.path}:CONFIG"
                ) from error
            layers = {base.__module__.partition(".")[0] for base in type(error).__mro__}
            if isinstance(error, OSError) or layers & {"httpx", "httpx2", "requests", "aiohttp", "urllib3"}:
                raise _unreachable(self.name, reason) from error
            raise InputError(f"{self.path} cannot be read ({reason}); choose other --data") from error


@dataclass
class HubStream:
    """Rows of a data set that keeps its own place (datasets.IterableDataset), as documents."""

    source: HubSource
    rows: Any
    head: Sequence[object]

    def __iter__(self) -> Iterator[Any]:
        return self.source.read(self.rows, self.head)

    def state_dict(self) -> dict[str, Any]:
        return dict(self.rows.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows.load_state_dict(state)


def _unreachable(name: str, reason: str) -> HubUnreachable:
    from huggingface_hub import constants

    return HubUnreachable(
        f"{name}: the Hugging Face hub at {constants.ENDPOINT} cannot be reached ({reason}); check the network, "
        "HF_ENDPOINT and HF_HUB_OFFLINE, or use built-in data (stories, stories-instruct) or a local file"
    )


def _probe_hub(name: str) -> None:
    """Raise HubUnreachable where the hub does not answer."""
    if failure := hub_failure(PROBE_SECONDS):
        raise _unreachable(name, failure)


def hub_failure(seconds: float) -> str | None:
    """Why the hub does not answer, so soon: its own client goes on trying for half a minute, or for more."""
    from huggingface_hub import constants, get_session

    failure = [f"no answer in {seconds} s"]

    def ask() -> None:
        try:
            get_session().head(constants.ENDPOINT, timeout=seconds)
            failure.clear()
        except Exception as error:
            failure[0] = str(error) or type(error).__name__

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return failure[0] if failure else None
