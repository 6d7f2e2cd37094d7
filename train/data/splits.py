"""What a split is. The one place that decides what is trained on and what is held out, for files, folders and the Hub.

Data brings its own splits where folders, or else files, are named after them, by the words that `datasets` knows. Where
it brings no validation split, a share of its documents is held out: what shares a prompt stands on one side.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePath
from typing import Any

from engine.chat_template import Message
from train.data.stories import SPLITS

SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
assert set(SPLIT_WORDS.values()) == set(SPLITS)
# Prompts that are known again by heart, in some 15 MB; a hash decides about those that are first met later.
REMEMBERED = 100_000

# What documents have in common that must not be on both sides of a split.
Key = Callable[[Any], Sequence[str]]


def split_of_name(name: str) -> str | None:
    """The split that one of the words in a name stands for: tiny_val-00001 is validation, mytrain is nothing."""
    words = re.split(r"[-._ 0-9]+", name.lower())
    return next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), None)


def files_by_split(files: Iterable[Path], root: Path) -> tuple[dict[str, list[Path]], str]:
    """The files of each split, "train" always among them, in order, and by what they were told apart: "" is by nothing.

    By the names of folders below `root` where any is named after a split, else by the names of files. What is named
    after none is trained on; so is all of it where nothing would be left to train on.
    """

    def of_folders(file: Path) -> str | None:
        return next(filter(None, map(split_of_name, file.relative_to(root).parts[:-1])), None)

    files = list(files)
    for rule, named in (("folder", of_folders), ("file", lambda file: split_of_name(file.stem))):
        splits: dict[str, list[Path]] = {}
        for file in files:
            splits.setdefault(named(file) or "train", []).append(file)
        if "train" in splits and len(splits) > 1:
            return splits, rule
    return {"train": files}, ""


def is_hidden(file: Path, root: Path) -> bool:
    """Whether an editor or a system keeps this for itself: .ipynb_checkpoints, .git, __MACOSX and what is in them."""
    return any(part.startswith((".", "__")) for part in PurePath(file).relative_to(root).parts)


def text_key(text: object) -> Sequence[str]:
    """Of a document of plain text: all of it."""
    return (str(text),)


def prompt_key(messages: Sequence[Message]) -> Sequence[str]:
    """Of a conversation: its system text and its first question."""
    first = next((place for place, message in enumerate(messages) if message.role == "user"), len(messages) - 1)
    return [message.content.strip() for message in messages[: first + 1] if message.role != "assistant" or not first]


def hash_of(key: Sequence[str]) -> int:
    """64 bits of a key, the same in every process."""
    text = "\0".join(key).encode(errors="replace")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def is_held_out(number: int, share: float) -> bool:
    """Whether the thing of this number is held out: one of every round(1/share) in a row, at a place mixed from the
    block's number.

    Decided by the number alone, so that a stream of unknown length is split while it is read. The first block gives its
    second, so that even two make a training and a validation split.
    """
    size = max(2, round(1 / share))
    block, place = divmod(number, size)
    mixed = block * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
    return place == ((mixed ^ mixed >> 32) % size if block else 1)


class HoldOut:
    """Decides, in one pass over documents, which are held out. Equal keys stand on one side; a pass repeats itself."""

    def __init__(self, share: float, key: Key) -> None:
        self.share, self.key = share, key
        self.met: dict[int, bool] = {}

    def __call__(self, document: object) -> bool:
        digest = hash_of(self.key(document))
        if digest not in self.met:
            if len(self.met) == REMEMBERED:
                return digest < self.share * 2**64
            self.met[digest] = is_held_out(len(self.met), self.share)
        return self.met[digest]
