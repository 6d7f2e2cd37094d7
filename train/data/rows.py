"""Rows, whatever they were read from: what their columns are called, and what stands in a cell.

One policy for all readers. A cell that is empty makes its row `Skipped`, counted with the reason; what is malformed, or
means something that cannot be heeded, is refused with the place where it stands. Nothing is dropped without a word.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from engine.errors import InputError

TEXT_COLUMNS = ("text", "contents", "content", "story", "document")
MESSAGES = ("messages", "conversations", "conversation")
PROMPTS = ("instruction", "prompt", "question")
CONTEXTS = ("context", "input")
RESPONSES = ("response", "output", "completion", "answer")
ANSWERS = ("chosen", "rejected")
# So many rows say together what a file's columns hold: in the first one a cell may be empty.
PEEKED = 100

Row = tuple[str, object]  # where it stands, for messages, and what stands there


@dataclass(frozen=True)
class Skipped:
    """A row of which nothing is made: where it stands, and why, as in "3 left out, WHY"."""

    where: str
    why: str


class Columns:
    """What the columns of some rows are called, in order, and what they hold."""

    def __init__(self, rows: Iterable[object]) -> None:
        self.rows = [row for row in rows if isinstance(row, Mapping)]
        self.names = list(dict.fromkeys(chain.from_iterable(self.rows)))

    def values(self, name: str) -> list[Any]:
        """What stands in a column, empty cells left out."""
        try:
            return [row[name] for row in self.rows if row.get(name) is not None]
        except InputError:  # nobody can read it, so nobody can mean it
            return []

    def holds(self, name: str, *types: type) -> bool:
        """Whether anything stands in this column, and all of it is of these types."""
        values = self.values(name) if name in self.names else []
        return bool(values) and all(isinstance(value, types) for value in values)

    def first(self, names: Iterable[str], *types: type) -> str | None:
        """The first of these columns that holds a value of these types, else the first that is there and holds none."""
        there = {name: self.values(name) for name in names if name in self.names}
        found = (name for name, values in there.items() if any(isinstance(value, types) for value in values))
        return next(found, next((name for name, values in there.items() if not values), None))


def peek(rows: Iterable[Row]) -> tuple[list[object], Iterator[Row]]:
    """What stands in the first rows; and all rows."""
    rows = iter(rows)
    head = list(islice(rows, PEEKED))
    return [row for _, row in head], chain(head, rows)


def pick_texts(
    rows: Iterable[Row], head: Sequence[object] | None = None, column: str | None = None
) -> Iterator[str | Skipped]:
    """The text of every row: of the column asked for, or of the one that the first rows, `head`, suggest."""
    if head is None:
        head, rows = peek(rows)
    for where, row in rows:
        if isinstance(row, str):
            yield readable(row) or Skipped(where, "empty")
            continue
        if not isinstance(row, Mapping):
            raise InputError(f"{where}: a JSON object with a text column was expected, not {str(row)[:40]!r}")
        if column is None:
            column = _text_column(Columns(head), where)
        if column not in row:
            raise InputError(f"{where}: no column {column!r}; there are {column_names(row)}: choose one with --column")
        text = row[column]
        if not isinstance(text, str | None):
            raise InputError(
                f"{where}: column {column!r} holds {type(text).__name__}, not text; choose another with --column"
            )
        yield readable(text) or Skipped(where, "empty")


def _text_column(columns: Columns, where: str) -> str:
    if known := columns.first(TEXT_COLUMNS, str):
        return known
    asked = f"{where}: which column is the text? There are {', '.join(columns.names)}: choose one with --column"
    # A question alone, or an id beside a conversation, is a text too, but not what anybody wants to learn.
    if {*columns.names} & {*MESSAGES, *PROMPTS, *RESPONSES, *ANSWERS}:
        raise InputError(f"{asked}; conversations are learnt by `gpt finetune`, preferences by `gpt reward`")
    texts = [name for name in columns.names if columns.holds(name, str)]
    if len(texts) != 1:
        raise InputError(asked)
    return texts[0]


def readable(text: str | None) -> str | None:
    """The text, if there is any, as a tokenizer can read it: JSON can spell half a surrogate pair."""
    if not text or text.isspace():
        return None
    return text if text.isascii() else text.encode(errors="replace").decode()


def cell(row: object, column: str, where: str) -> Any:
    """What stands in a column. Raises InputError where there is none such."""
    if not isinstance(row, Mapping) or column not in row:
        raise InputError(f"{where}: no column {column!r}; there are {column_names(row)}")
    return row[column]


def text_of(value: object, where: str) -> str:
    """The text, "" where there is none. Raises InputError for anything else."""
    if not isinstance(value, str | None):
        raise InputError(f"{where}: text was expected, not {type(value).__name__}: {str(value)[:40]!r}")
    return readable(value) or ""


def list_of(value: object) -> list[Any] | None:
    """The list that stands in a cell, or that its JSON text spells; None where it is none."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            return None
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else None


def column_names(row: object) -> str:
    return (isinstance(row, Mapping) and ", ".join(map(str, row))) or "none"
