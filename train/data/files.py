"""Local files as rows: .txt .jsonl .json .csv .parquet. What is wrong is said with file and line."""

import contextlib
import csv
import glob
import hashlib
import io
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import InputError
from train.data.rows import Row
from train.data.splits import is_hidden

if TYPE_CHECKING:
    from pyarrow import DataType
    from pyarrow.parquet import ParquetFile

SEPARATOR = "<|endoftext|>"
# Long enough to fill a context many times, short enough that one text file gives documents to hold out.
CUT_CHARACTERS = 8192
SAMPLE_BYTES = 1 << 20
# Rows of a Parquet file that are read at a time.
BLOCK = 1024


def find_files(name: str) -> tuple[tuple[Path, ...], Path]:
    """The readable files that a path, folder or glob means, sorted, and the folder from which their names are read.

    Hidden ones are left out unless they are named themselves. Raises InputError where there are none.
    """
    path = Path(name).expanduser()
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


def sample_hash(file: Path) -> str:
    """SHA-256 of a whole file of up to 64 MB, of 64 evenly spaced pieces of a larger one."""
    digest, size = hashlib.sha256(), file.stat().st_size
    with file.open("rb") as stream:
        for at in range(0, size, max(SAMPLE_BYTES, size // 64)):
            stream.seek(at)
            digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()


def read_rows(file: Path, cut: int = CUT_CHARACTERS) -> Iterator[Row]:
    """The rows of one file; of a text file its documents."""
    if file.suffix.lower() == ".txt":
        return ((f"{file}, document {number}", text) for number, text in enumerate(_read_text(file, cut), 1))
    return READERS[file.suffix.lower()](file)


def _lines(file: Path) -> Iterator[str]:
    """The lines of a UTF-8 file, ends kept. Raises InputError with file, line and byte where it is none."""
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
    """The documents between lines of <|endoftext|>, or, without such lines, the text cut into documents."""
    with file.open("rb") as stream:
        separated = any(line.strip() == SEPARATOR.encode() for line in stream)
    if not separated:
        yield from _cut(_lines(file), cut)
        return
    document: list[str] = []
    for line in _lines(file):
        if line.strip() == SEPARATOR:
            yield "".join(document).strip("\n")
            document = []
        else:
            document.append(line)
    if document:
        yield "".join(document).strip("\n")


def _cut(lines: Iterable[str], cut: int) -> Iterator[str]:
    """Documents of `cut` to 2 `cut` characters: cut at a blank line, else at a line, else at a word, else anywhere."""
    document: list[str] = []
    size = 0
    for line in lines:
        for piece in [line] if len(line) <= cut else re.findall(rf"(?s).{{1,{cut - 1}}}(?:\s|$)|.{{1,{cut}}}", line):
            if size + len(piece) > 2 * cut:
                yield "".join(document)
                document, size = [], 0
            document.append(piece)
            size += len(piece)
            if size >= cut and piece.isspace():
                yield "".join(document)
                document, size = [], 0
    if document:
        yield "".join(document)


def _read_json_lines(file: Path, lines: Iterable[str] | None = None) -> Iterator[Row]:
    for number, line in enumerate(lines or _lines(file), 1):
        if not line.isspace():
            try:
                yield f"{file}, line {number}", _parse_json(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise InputError(f"{file}, line {number}: broken JSON ({error}); mend or delete the line") from None


def _read_json(file: Path) -> Iterator[Row]:
    text = "".join(_lines(file))
    try:
        value = _parse_json(text or "[]")
    except RecursionError as error:
        raise InputError(f"{file}: broken JSON ({error}); mend the file") from None
    except json.JSONDecodeError as error:
        # Many a .json file holds JSON lines.
        if error.msg == "Extra data":
            return _read_json_lines(file, io.StringIO(text))
        raise InputError(f"{file}, line {error.lineno}: broken JSON ({error.msg}); mend the file") from None
    records = value if isinstance(value, list) else [value]
    return ((f"{file}, record {number}", record) for number, record in enumerate(records, 1))


def _parse_json(text: str) -> Any:
    """The value; an integer of thousands of digits, for which Python has no patience, is one without end."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except ValueError:
        return json.loads(text, parse_int=float)


def _read_csv(file: Path) -> Iterator[Row]:
    """Rows by the names in the first one. What parts them there, a comma, semicolon or tab, does so everywhere."""
    csv.field_size_limit(sys.maxsize)
    with file.open(encoding="utf-8-sig", errors="replace") as stream:
        header = stream.readline()
    parted = max(",;\t", key=lambda mark: len(next(csv.reader([header], delimiter=mark), [])))
    reader = csv.reader(_lines(file), strict=True, delimiter=parted)
    try:
        names = next(reader, [])
        if len(set(names)) < len(names):
            raise InputError(f"{file}, line 1: two columns have one name, of {', '.join(names)}; rename one")
        for row in reader:
            where = f"{file}, line {reader.line_num}"
            if row and len(row) != len(names):
                raise InputError(
                    f"{where}: {len(row)} fields where the first line names {len(names)} ({', '.join(names)}); a text "
                    f"that holds {parted!r} must stand in quotes"
                )
            if row:
                yield where, dict(zip(names, row, strict=True))
    except csv.Error as error:
        raise InputError(f"{file}, line {reader.line_num}: broken CSV ({error}); mend the line") from None


def _read_parquet(file: Path) -> Iterator[Row]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise InputError(f"reading {file} needs pyarrow: pip install pyarrow, or convert the file to .jsonl") from None
    columns = ParquetColumns(file, lambda: parquet.ParquetFile(file), (pyarrow.ArrowException, OSError))
    yield from ((f"{file}, row {number + 1}", ParquetRow(columns, number)) for number in range(columns.rows))


class ParquetColumns:
    """The columns of a Parquet file, each read from the disk when a row first asks for it, and then along with it."""

    def __init__(
        self, file: Path, open_file: "Callable[[], ParquetFile]", failures: tuple[type[Exception], ...]
    ) -> None:
        self.file, self.failures = file, failures
        with self._plain_errors():
            self.opened = open_file()
        self.names: list[str] = self.opened.schema_arrow.names
        self.rows: int = self.opened.metadata.num_rows
        self._held: dict[str, tuple[int, Any, Iterator[Any]]] = {}  # the block read last, and those after it

    def cell(self, name: str, number: int) -> Any:
        """Python's value of a cell. Raises InputError with its place where there is none."""
        block, place = divmod(number, BLOCK)
        at, values, rest = self._held.get(name, (-1, None, iter(())))
        with self._plain_errors():
            if at < 0 or at > block:
                at, rest = -1, self.opened.iter_batches(BLOCK, columns=[name])
            while at < block:
                at, values = at + 1, next(rest).column(0)
        self._held[name] = (at, values, rest)
        try:
            value = values[place].as_py()
            return _from_json(value, values.type) if "arrow.json" in str(values.type) else value
        except (ValueError, OverflowError) as error:
            raise InputError(
                f"{self.file}, row {number + 1}: column {name!r} cannot be read ({error}); mend it or choose another"
            ) from None

    @contextlib.contextmanager
    def _plain_errors(self) -> Iterator[None]:
        try:
            yield
        except self.failures as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"{self.file}: damaged, or no parquet file ({reason}); fetch it again") from None


class ParquetRow(Mapping[str, Any]):
    """A row of which only those columns are read that are asked for."""

    def __init__(self, columns: ParquetColumns, number: int) -> None:
        self.columns, self.number = columns, number

    def __getitem__(self, name: str) -> Any:
        if name not in self.columns.names:
            raise KeyError(name)
        return self.columns.cell(name, self.number)

    def __contains__(self, name: object) -> bool:
        return name in self.columns.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns.names)

    def __len__(self) -> int:
        return len(self.columns.names)


def _from_json(value: Any, kind: "DataType") -> Any:
    """The value with what `datasets` stores as JSON text (Arrow's type arrow.json) made what it spells."""
    from pyarrow import types

    if value is None:
        return None
    if types.is_list(kind) or types.is_large_list(kind):
        return [_from_json(each, kind.value_type) for each in value]
    if types.is_struct(kind):
        return {field.name: _from_json(value[field.name], field.type) for field in kind}
    return json.loads(value) if getattr(kind, "extension_name", "") == "arrow.json" else value


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
EXTENSIONS = (".txt", *READERS)
