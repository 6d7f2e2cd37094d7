"""Splits: which documents of files and Hub data sets are trained on, and which are held out.

Data brings its own splits if folders, or else files, are named after them, by the words that `datasets` knows. If it
brings no validation split, a fraction of its documents is held out; those with one prompt are all in the same split.
The built-in data decides for itself, in train/data/stories.
"""

import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from engine.chat_template import Message
from engine.errors import InputError
from train.data.formats import read_texts
from train.data.rows import Row, Skipped
from train.data.stories import SPLITS
from train.data.workers import in_chunks

SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
# The number of distinct prompts that are remembered, in some 15 MB. The split of a prompt that is first met later
# follows from its hash instead of its number, so that memory stays bounded.
REMEMBERED = 100_000
# This changes when other documents are held out than before, or other files make a split.
SPLIT_RULE = 2

# A key function returns what documents of different splits must not have in common, such as their prompt.
Key = Callable[[Any], Sequence[str]]
# A place is the position to which one process has read its documents, JSON-able; None is the beginning.
Place = dict[str, Any] | None
# A stream opens rows: those of each file, or all of a data set.
Stream = Callable[[], Iterable[Iterable[Row]]]
# A pick makes documents of rows, or says that it skipped them.
Pick = Callable[..., Iterator[Any]]


def text_key(text: object) -> Sequence[str]:
    """Return the key of a document of plain text: all of it."""
    return (str(text),)


def prompt_key(messages: Sequence[Message]) -> Sequence[str]:
    """Return the key of a conversation: its system text and its first question."""
    first = next((place for place, message in enumerate(messages) if message.role == "user"), len(messages) - 1)
    return [message.content.strip() for message in messages[: first + 1] if message.role != "assistant" or not first]


def hash_of(key: Sequence[str]) -> int:
    """Return 64 bits of a key, the same in every process."""
    text = "\0".join(key).encode(errors="replace")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def is_held_out(number: int, share: float) -> bool:
    """Return whether the document of this number is held out.

    Numbers are grouped in blocks of round(1/share). One number of each block is held out, at a pseudo-random position,
    a hash of the block's number. In block 0 it is always number 1, so that two documents are enough for both splits.
    The number alone decides, so that a stream of unknown length can be split while it is read.
    """
    size = max(2, round(1 / share))
    block, place = divmod(number, size)
    mixed = block * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
    return place == ((mixed ^ mixed >> 32) % size if block else 1)


def require_split(split: str) -> None:
    if split not in SPLITS:
        raise InputError(f"there is no split {split!r}; the splits are {', '.join(SPLITS)}")


def split_of_name(name: str) -> str | None:
    """Return the split that a word in a name means: tiny_val-00001 is validation, mytrain is none."""
    words = re.split(r"[-._ 0-9]+", name.lower())
    return next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), None)


def files_by_split(files: Sequence[Path], root: Path) -> tuple[dict[str, list[Path]], str]:
    """Return the files of each split, "train" always among them, and the rule: "folder", "file", or "" without splits.

    The names of folders below `root` decide if they name a split and leave some files to train on; else the names of
    files decide in the same way; else all files are trained on. A file that is named after no split is trained on.
    """

    def of_folders(file: Path) -> str | None:
        return next(filter(None, map(split_of_name, file.relative_to(root).parts[:-1])), None)

    for rule, named in (("folder", of_folders), ("file", lambda file: split_of_name(file.stem))):
        splits: dict[str, list[Path]] = {}
        for file in files:
            splits.setdefault(named(file) or "train", []).append(file)
        if "train" in splits and len(splits) > 1:
            return splits, rule
    return {"train": list(files)}, ""


def say_aside(message: str) -> None:
    print(message, file=sys.stderr)


@dataclass
class Source:
    """A named stream of documents, in splits. It opens nothing before documents are asked for.

    `pick` makes documents of rows. If the data brings no validation split, the fraction `holdout` of the documents is
    held out, those with one `key` together. At most `limit` documents are taken of each split that the data brings.
    `rows` counts the rows read in the latest pass; `skipped` counts those left out, by reason, each with file and line
    of the first. `held_out_by` says what decides which documents are held out. `commit` is that of a set of the Hub: a
    branch or tag too, or None for the newest. `say` tells a person of what the source waits for, until it is
    `abandoned`: then reading it raises UnfinishedError instead of waiting.
    """

    name: str
    column: str | None = None
    holdout: float = 0.02
    limit: int | None = None
    pick: Pick = read_texts
    key: Key = text_key
    rows: int = 0
    skipped: dict[str, tuple[int, str]] = field(default_factory=dict)
    held_out_by: str = ""
    commit: str | None = None
    say: Callable[[str], None] = say_aside
    abandoned: bool = False

    def describe(self) -> str:
        """Describe the source in one line."""
        raise NotImplementedError

    def streams(self) -> dict[str, Stream]:
        """Return the splits that the data itself comes with, "train" always."""
        raise NotImplementedError

    def identity(self) -> list[Any]:
        """Return what else decides which documents come out. It needs no network, and contains no absolute path."""
        raise NotImplementedError

    def split_rule(self) -> str:
        """Say how the data's own splits were recognised, in words that end a sentence."""
        return ""

    def fingerprint(self) -> str:
        """Return the SHA-256 of all that decides which documents come out."""
        parts = [SPLIT_RULE, type(self).__name__, self.column, self.holdout, self.limit, *self.identity()]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def documents(self, split: str, start: int = 0) -> Iterator[Any]:
        """Read the documents of a split from number `start` on. Raises InputError where the split has none."""
        documents = islice(self._split(split), start, None)
        first = list(islice(documents, 1))
        if not first and start == 0:
            bare = "it is empty" if split == "train" else "it has fewer than two documents"
            why = self.describe_skipped() or bare
            raise InputError(f"{self.name} has no text for the {split} split: {why}; choose other --data")
        return chain(first, documents)

    def chunks(self, split: str, start: int = 0) -> Iterator[Sequence[str]]:
        """Read the same documents, which must be texts, in chunks for the processes that encode them."""
        return in_chunks(self.documents(split, start))

    def share(self, rank: int, count: int, place: Place, size: int) -> Iterator[tuple[Place, list[Any]]]:
        """Yield the documents to train on of process `rank` of `count`, in chunks, and the place before each chunk.

        Every document, held-out and skipped ones too, belongs to one process. Reading begins at `place`.
        """
        read = place["read"] if place else 0
        documents = self.every(rank + read * count, count)
        while chunk := list(islice(documents, size)):
            yield place, chunk
            read += len(chunk)
            place = {"read": read}

    def every(self, start: int, step: int) -> Iterator[Any]:
        """Read every `step`-th document to train on, held-out and skipped ones included."""
        return islice(self.read(self.streams()["train"]), start, self.limit, step)

    def describe_read(self, documents: int) -> str:
        """Say how many documents came of how many rows in the latest pass, and what it left out."""
        rows = f" of {self.rows:,} rows read" if self.rows else ""
        return "; ".join(filter(None, [f"{documents:,} documents{rows}", self.describe_skipped()]))

    def describe_skipped(self) -> str:
        """Say what the latest pass left out, and why; "" where that was nothing."""
        return "; ".join(f"{count:,} left out, {why} (first: {at})" for why, (count, at) in self.skipped.items())

    def read(self, stream: Stream) -> Iterator[Any]:
        """Yield what is made of the rows of a stream, which are counted: documents, and what is skipped."""
        for rows in stream():
            yield from self.pick(self._counted(rows))

    def _counted(self, rows: Iterable[Row]) -> Iterator[Row]:
        for row in rows:
            self.rows += 1
            yield row

    def _split(self, split: str) -> Iterator[Any]:
        require_split(split)
        streams = self.streams()
        brings, texts = "validation" in streams, self.key is text_key
        rule = "documents, equal ones on one side" if texts else "prompts, with all answers to them"
        own = f"the data's own validation split{self.split_rule()}"
        self.held_out_by = own if brings else f"{self._held_out_share()} of the {rule}"
        # Without a validation split of its own, some of the training split is held out, so neither is read as it is.
        if split in streams and (brings or split != "train"):
            return self._present(streams[split])
        if split == "test":
            raise InputError(f"{self.name} has no test split; it has train and validation")
        return self._side(self._present(streams["train"]), split == "validation")

    def _held_out_share(self) -> str:
        return f"one in {max(2, round(1 / self.holdout))}"

    def _present(self, stream: Stream) -> Iterator[Any]:
        """Yield the documents of a stream, from its beginning. Skipped rows are counted."""
        self.rows, self.skipped = 0, {}
        for document in islice(self.read(stream), self.limit):
            if isinstance(document, Skipped):
                count, first = self.skipped.get(document.why, (0, document.where))
                self.skipped[document.why] = (count + 1, first)
            else:
                yield document

    def _side(self, documents: Iterator[Any], held_out: bool) -> Iterator[Any]:
        """Yield the documents that are held out, or the others. Documents with one key are always on the same side.

        Distinct keys are numbered in the order in which they are first met, and is_held_out decides by that number.
        """
        first = list(islice(documents, 1))
        for document in documents:
            first.append(document)
            if hash_of(self.key(document)) != hash_of(self.key(first[0])):
                break
        else:
            # Nothing tells the documents apart. Some are held out all the same, and it is said.
            same = "are equal" if self.key is text_key else "have one prompt"
            self.held_out_by = f"{self._held_out_share()} of the documents by their number: all {same}"
            yield from (each for number, each in enumerate(first) if is_held_out(number, self.holdout) == held_out)
            return
        met: dict[int, bool] = {}
        for document in chain(first, documents):
            digest = hash_of(self.key(document))
            if digest not in met and len(met) < REMEMBERED:
                met[digest] = is_held_out(len(met), self.holdout)
            if met.get(digest, digest < self.holdout * 2**64) == held_out:
                yield document
