"""Rows and their cells, and how local files (.txt .jsonl .json .csv .parquet) are read row by row.

All readers follow one policy. A row with an empty cell is `Skipped`, and counted with the reason. Malformed input, or
input that asks for something unsupported, is an error with file and line. Nothing is dropped without a message.
For a new kind of files, add a reader to READERS: a function from a file to its rows, each with its file and line.
"""

import contextlib
import csv
import glob
import hashlib
import io
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice, takewhile
from pathlib import Path, PurePath
from typing import Any

from engine.errors import InputError
from engine.records import MOST_DIGITS, parse
from engine.tokenizer import END_OF_DOCUMENT

# A document of a text file is long enough to fill a context many times, and short enough that one file gives several.
CUT_CHARACTERS = 8192
SAMPLE_BYTES = 1 << 20
# The number of rows of a Parquet file that are read at a time.
BLOCK = 1024
MESSAGES = ("messages", "conversations", "conversation")
PROMPTS = ("instruction", "prompt", "question")
# The number of rows that are looked at to tell what a file's columns hold: cells of the first row alone may be empty.
PEEKED = 100

Row = tuple[str, object]  # its file and line, for messages, and its value


@dataclass(frozen=True)
class Skipped:
    """A row that is left out: its file and line, and the reason, as in "3 left out, WHY"."""

    where: str
    why: str


class Columns:
    """The columns of some rows: their names, in order, and what they hold."""

    def __init__(self, rows: Iterable[object]) -> None:
        self.rows = [row for row in rows if isinstance(row, Mapping)]
        self.names = list(dict.fromkeys(chain.from_iterable(self.rows)))

    def values(self, name: str) -> list[Any]:
        """Return the values of a column, empty cells left out."""
        try:
            return [row[name] for row in self.rows if row.get(name) is not None]
        except InputError:  # a column that cannot be read cannot be the one that is meant
            return []

    def holds(self, name: str, *types: type) -> bool:
        """Return whether this column has any values, and all of them are of these types."""
        values = self.values(name)
        return bool(values) and all(isinstance(value, types) for value in values)

    def first(self, names: Iterable[str], *types: type) -> str | None:
        """Return the first of these columns with a value of these types, else the first that is there and empty."""
        there = {name: self.values(name) for name in names if name in self.names}
        found = (name for name, values in there.items() if any(isinstance(value, types) for value in values))
        return next(found, next((name for name, values in there.items() if not values), None))


def peek(rows: Iterable[Row]) -> tuple[list[object], Iterator[Row]]:
    """Return the values of the first rows, and an iterator over all rows, these included."""
    rows = iter(rows)
    head = list(islice(rows, PEEKED))
    return [row for _, row in head], chain(head, rows)


def clean(text: str | None) -> str | None:
    """Return the text, or None if it is blank. Half a surrogate pair, which JSON can spell, is replaced."""
    if not text or text.isspace():
        return None
    return text if text.isascii() else text.encode(errors="replace").decode()


def cell(row: object, column: str, where: str) -> Any:
    """Return the value of a row in a column. Raises InputError if there is no such column."""
    if not isinstance(row, Mapping) or column not in row:
        raise InputError(f"{where}: no column {column!r}; there are {column_names(row)}")
    return row[column]


def text_of(value: object, where: str) -> str:
    """Return the text, or "" where there is none. Raises InputError for anything else."""
    if not isinstance(value, str | None):
        raise InputError(f"{where}: text was expected, not {type(value).__name__}: {str(value)[:40]!r}")
    return clean(value) or ""


def list_of(value: object) -> list[Any] | None:
    """Return the list in a cell, given as such or as JSON text; None if it holds no list."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = parse(value)
        except ValueError:
            return None
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else None


def column_names(row: object) -> str:
    """Return the columns of a row, for a message."""
    return (isinstance(row, Mapping) and ", ".join(map(str, row))) or "none"


def find_files(name: str) -> tuple[tuple[Path, ...], Path]:
    """Find the files that a path, folder or glob means, sorted, and the folder from which their names are read.

    Hidden ones are left out unless they are named themselves. Raises InputError where there are none.
    """
    path = Path(os.path.expanduser(name))  # noqa: PTH111 (Path's fails for an unknown user)
    if path.is_dir():
        found, root = list(path.rglob("*")), path
    elif path.exists() or not glob.has_magic(name):
        found, root = [path], path.parent
    else:
        root = Path(*takewhile(lambda part: not glob.has_magic(part), path.parts))
        found = [Path(match) for match in glob.glob(str(path), recursive=True)]  # noqa: PTH207
        if not found:
            raise InputError(f"no file matches {name}; check the pattern and the folder it starts from")
    if found == [path] and not path.exists():
        raise InputError(f"no such file: {name}")
    asked = is_hidden(path, root)
    readable = (file for file in found if file.is_file() and file.suffix.lower() in EXTENSIONS)
    files = tuple(sorted(file for file in readable if asked or not is_hidden(file, root)))
    if not files:
        raise InputError(f"{name}: nothing to read there; text comes as {' '.join(EXTENSIONS)}: rename or convert it")
    return files, root


def is_hidden(file: Path, root: Path) -> bool:
    """Return whether a file is hidden or internal to a program: in .ipynb_checkpoints, .git, __MACOSX and the like."""
    return any(part.startswith((".", "__")) for part in PurePath(file).relative_to(root).parts)


def sample_hash(file: Path) -> str:
    """Return the SHA-256 of a whole file of up to 64 MB, or of 64 evenly spaced parts of a larger one."""
    digest, size = hashlib.sha256(), file.stat().st_size
    with file.open("rb") as stream:
        for at in range(0, size, max(SAMPLE_BYTES, size // 64)):
            stream.seek(at)
            digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()


def read_rows(file: Path, cut: int = CUT_CHARACTERS) -> Iterator[Row]:
    """Read the rows of one file. The rows of a text file are its documents."""
    if file.suffix.lower() == ".txt":
        return ((f"{file}, document {number}", text) for number, text in enumerate(_read_text(file, cut), 1))
    return READERS[file.suffix.lower()](file)


def _lines(file: Path) -> Iterator[str]:
    """Yield the lines of a UTF-8 file with their ends. Raises InputError with line and byte where it is not UTF-8."""
    with file.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            try:
                if 0 in line:
                    raise UnicodeDecodeError("utf-8", line, line.index(0), line.index(0) + 1, "zero byte")
                yield line.decode("utf-8-sig" if number == 1 else "utf-8").replace("\r\n", "\n")
            except UnicodeDecodeError as error:
                where = f"{file}, line {number}, byte {error.start + 1}"
                raise InputError(
                    f"{where}: not UTF-8 text ({error.reason}); convert the file, or leave it out if it is binary"
                ) from None


def _read_text(file: Path, cut: int) -> Iterator[str]:
    """Yield the documents between lines of <|endoftext|>, or, without such lines, the text cut into documents."""
    with file.open("rb") as stream:
        separated = any(line.strip() == END_OF_DOCUMENT.encode() for line in stream)
    if not separated:
        yield from cut_text(_lines(file), cut)
        return
    document: list[str] = []
    for line in _lines(file):
        if line.strip() == END_OF_DOCUMENT:
            yield "".join(document).strip("\n")
            document = []
        else:
            document.append(line)
    if document:
        yield "".join(document).strip("\n")


def cut_text(lines: Iterable[str], cut: int) -> Iterator[str]:
    """Cut documents of `cut` to 2 `cut` characters: at a blank line, else at a line, else at a word, else anywhere."""
    document: list[str] = []
    size = 0
    for line in lines:
        for part in [line] if len(line) <= cut else re.findall(rf"(?s).{{1,{cut - 1}}}(?:\s|$)|.{{1,{cut}}}", line):
            if size + len(part) > 2 * cut or (size >= cut and document[-1].isspace()):
                yield "".join(document)
                document, size = [], 0
            document.append(part)
            size += len(part)
    if document:
        yield "".join(document)


def _read_json_lines(file: Path, lines: Iterable[str] | None = None) -> Iterator[Row]:
    for number, line in enumerate(lines or _lines(file), 1):
        if not line.isspace():
            try:
                yield f"{file}, line {number}", _parse_json(line)
            except ValueError as error:
                why = f"{error.msg} at character {error.colno:,}" if isinstance(error, json.JSONDecodeError) else error
                raise InputError(f"{file}, line {number}: broken JSON ({why}); fix or delete the line") from None


def _read_json(file: Path) -> Iterator[Row]:
    text = "".join(_lines(file))
    try:
        value = _parse_json(text or "[]")
    except json.JSONDecodeError as error:
        # Many .json files hold JSON lines.
        if error.msg == "Extra data":
            return _read_json_lines(file, io.StringIO(text))
        raise InputError(f"{file}, line {error.lineno}: broken JSON ({error.msg}); fix the file") from None
    except ValueError as error:
        raise InputError(f"{file}, line {_broken_line(text)}: broken JSON ({error}); fix the file") from None
    records = value if isinstance(value, list) else [value]
    return ((f"{file}, record {number}", record) for number, record in enumerate(records, 1))


def _parse_json(text: str) -> Any:
    """Return the value. An integer of hundreds of digits, which no float is large enough for, becomes infinite."""
    return parse(text, parse_int=lambda digits: int(digits) if len(digits) < MOST_DIGITS else float(digits))


def _broken_line(text: str) -> int:
    """Return the line where the first record begins that JSON spells and that we refuse."""
    space, decoder, at = re.compile(r"[\s,\[]*"), json.JSONDecoder(), 0
    while (found := space.match(text, at)) and found.end() < len(text):
        begin = found.end()
        try:
            _, at = decoder.raw_decode(text, begin)
            _parse_json(text[begin:at])
        except (ValueError, RecursionError):
            return text.count("\n", 0, begin) + 1
    return 1


def _read_csv(file: Path) -> Iterator[Row]:
    """Read rows, whose columns the first line names. The separator of that line (, ; or tab) is that of all lines."""
    csv.field_size_limit(sys.maxsize)
    with file.open(encoding="utf-8-sig", errors="replace") as stream:
        header = stream.readline()
    parted = max(",;\t", key=lambda mark: len(next(csv.reader([header], delimiter=mark), [])))
    reader = csv.reader(_lines(file), strict=True, delimiter=parted)
    try:
        names = next(reader, [])
        _require_names(names, f"{file}, line 1")
        for row in reader:
            where = f"{file}, line {reader.line_num}"
            if row and len(row) != len(names):
                raise InputError(
                    f"{where}: {len(row)} fields where the first line names {len(names)} ({', '.join(names)}); a text "
                    f"that holds {parted!r} must be in quotes"
                )
            if row:
                yield where, dict(zip(names, row, strict=True))
    except csv.Error as error:
        raise InputError(f"{file}, line {reader.line_num}: broken CSV ({error}); fix the line") from None


def _require_names(names: Sequence[str], where: str) -> None:
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise InputError(f"{where}: two columns have one name, {twice[0]!r}, of {', '.join(names)}; rename one")


def _read_parquet(file: Path) -> Iterator[Row]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise InputError(f"reading {file} needs pyarrow: pip install pyarrow, or convert the file to .jsonl") from None
    with _plain_errors(file):
        opened = parquet.ParquetFile(file)
    _require_names(opened.schema_arrow.names, str(file))
    columns = {name: ParquetColumn(file, opened, name) for name in opened.schema_arrow.names}
    yield from ((f"{file}, row {at + 1}", ParquetRow(columns, at)) for at in range(opened.metadata.num_rows))


@contextlib.contextmanager
def _plain_errors(file: Path) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{file}: damaged, or no parquet file ({reason}); fetch it again") from None


class ParquetColumn:
    """A column of a Parquet file that is read from the disk, block by block, when a row first asks for it."""

    def __init__(self, file: Path, opened: Any, name: str) -> None:
        self.file, self.opened, self.name = file, opened, name
        self.block = -1  # the number of the block in `values`; those after it are in `rest`
        self.values: Any = None
        self.rest: Iterator[Any] = iter(())

    def cell(self, number: int) -> Any:
        """Return a cell as a Python value. Raises InputError with file, row and column if it cannot be read."""
        block, place = divmod(number, BLOCK)
        with _plain_errors(self.file):
            if self.block < 0 or block < self.block:
                self.block, self.rest = -1, self.opened.iter_batches(BLOCK, columns=[self.name])
            if block > self.block:
                self.values = next(islice(self.rest, block - self.block - 1, None)).column(0)
                self.block = block
        try:
            value = self.values[place].as_py()
            return _from_json(value, self.values.type) if "arrow.json" in str(self.values.type) else value
        except (ValueError, OverflowError) as error:
            where = f"{self.file}, row {number + 1}: column {self.name!r}"
            raise InputError(f"{where} cannot be read ({error}); fix it or choose another") from None


class ParquetRow(Mapping[str, Any]):
    """A row that reads only the columns that are asked for."""

    def __init__(self, columns: Mapping[str, ParquetColumn], number: int) -> None:
        self.columns, self.number = columns, number

    def __getitem__(self, name: str) -> Any:
        return self.columns[name].cell(self.number)

    def __contains__(self, name: object) -> bool:
        return name in self.columns

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)

    def __len__(self) -> int:
        return len(self.columns)


def _from_json(value: Any, kind: Any) -> Any:
    """Return the value with all JSON text in it parsed, which `datasets` stores as Arrow's type arrow.json."""
    from pyarrow import types

    if value is None:
        return None
    if types.is_list(kind) or types.is_large_list(kind):
        return [_from_json(each, kind.value_type) for each in value]
    if types.is_struct(kind):
        return {field.name: _from_json(value[field.name], field.type) for field in kind}
    return parse(value) if getattr(kind, "extension_name", "") == "arrow.json" else value


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
EXTENSIONS = (".txt", *READERS)
