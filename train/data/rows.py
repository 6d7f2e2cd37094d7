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

MESSAGES = ("messages", "conversations", "conversation")
PROMPTS = ("instruction", "prompt", "question")
# So many rows together say what a file's columns hold: in the first one a cell may be empty.
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
        """Return what stands in a column, empty cells left out."""
        try:
            return [row[name] for row in self.rows if row.get(name) is not None]
        except InputError:  # a column that cannot be read cannot be the one that is meant
            return []

    def holds(self, name: str, *types: type) -> bool:
        """Return whether anything stands in this column, and all of it is of these types."""
        values = self.values(name)
        return bool(values) and all(isinstance(value, types) for value in values)

    def first(self, names: Iterable[str], *types: type) -> str | None:
        """Return the first of these columns with a value of these types, else the first that is there and empty."""
        there = {name: self.values(name) for name in names if name in self.names}
        found = (name for name, values in there.items() if any(isinstance(value, types) for value in values))
        return next(found, next((name for name, values in there.items() if not values), None))


def peek(rows: Iterable[Row]) -> tuple[list[object], Iterator[Row]]:
    """Return what stands in the first rows, and all rows."""
    rows = iter(rows)
    head = list(islice(rows, PEEKED))
    return [row for _, row in head], chain(head, rows)


def clean(text: str | None) -> str | None:
    """Return the text, if there is any, as a tokenizer can read it: JSON can spell half a surrogate pair."""
    if not text or text.isspace():
        return None
    return text if text.isascii() else text.encode(errors="replace").decode()


def cell(row: object, column: str, where: str) -> Any:
    """Return what stands in a column. Raises InputError where there is no such column."""
    if not isinstance(row, Mapping) or column not in row:
        raise InputError(f"{where}: no column {column!r}; there are {column_names(row)}")
    return row[column]


def text_of(value: object, where: str) -> str:
    """Return the text, or "" where there is none. Raises InputError for anything else."""
    if not isinstance(value, str | None):
        raise InputError(f"{where}: text was expected, not {type(value).__name__}: {str(value)[:40]!r}")
    return clean(value) or ""


def list_of(value: object) -> list[Any] | None:
    """Return the list that stands in a cell, or that its JSON text spells; None where there is none."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            return None
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else None


def column_names(row: object) -> str:
    """Return the columns of a row, for a message."""
    return (isinstance(row, Mapping) and ", ".join(map(str, row))) or "none"
