"""Local files as rows and documents: .txt .jsonl .json .csv .parquet. What is wrong is said with file and line."""

import csv
import glob
import hashlib
import io
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from engine.errors import InputError

SEPARATOR = "<|endoftext|>"
TEXT_COLUMNS = ("text", "contents", "content", "story", "document")
# Long enough to fill a context many times, short enough that one text file gives documents to hold out.
CUT_CHARACTERS = 8192
SAMPLE_BYTES = 1 << 20

Row = tuple[str, object]  # where it stands, for messages, and what stands there


def find_files(name: str) -> tuple[Path, ...]:
    """The readable files that a path, folder or glob means, sorted. Raises InputError where there are none."""
    path = Path(name).expanduser()
    if path.is_dir():
        found = [file for file in path.rglob("*") if not file.name.startswith(".")]
    elif path.exists() or not glob.has_magic(name):
        found = [path]
    else:
        found = [Path(match) for match in glob.glob(str(path), recursive=True)]  # noqa: PTH207
        if not found:
            raise InputError(f"no file matches {name}; check the pattern and the folder it starts from")
    if found == [path] and not path.exists():
        raise InputError(f"no such file: {name}")
    files = tuple(sorted(file for file in found if file.is_file() and file.suffix.lower() in EXTENSIONS))
    if not files:
        raise InputError(f"{name}: nothing to read there; text comes as {' '.join(EXTENSIONS)}: rename or convert it")
    return files


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


def pick_texts(rows: Iterable[Row], column: str | None = None) -> Iterator[str | None]:
    """The text of every row, None of an empty one: of the column asked for, or of the one the first row suggests."""
    for where, row in rows:
        if isinstance(row, str):
            yield readable(row)
            continue
        if not isinstance(row, Mapping):
            raise InputError(f"{where}: a JSON object with a text column was expected, not {str(row)[:40]!r}")
        if column is None:
            column = _pick_column(row, where)
        if column not in row:
            raise InputError(f"{where}: no column {column!r}; there are {column_names(row)}: choose one with --column")
        text = row[column]
        if not isinstance(text, str | None):
            raise InputError(
                f"{where}: column {column!r} holds {type(text).__name__}, not text; choose another with --column"
            )
        yield readable(text)


def readable(text: str | None) -> str | None:
    """The text, if there is any, as a tokenizer can read it: JSON can spell half a surrogate pair."""
    if not text or text.isspace():
        return None
    return text if text.isascii() else text.encode(errors="replace").decode()


def _pick_column(row: Mapping[str, object], where: str) -> str:
    known = [name for name in TEXT_COLUMNS if isinstance(row.get(name, 0), str | None)]
    texts = known[:1] or [name for name, value in row.items() if isinstance(value, str)]
    if len(texts) != 1:
        raise InputError(f"{where}: which column is the text? There are {column_names(row)}: choose one with --column")
    return texts[0]


def column_names(row: object) -> str:
    return (isinstance(row, Mapping) and ", ".join(map(str, row))) or "none"


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
                yield f"{file}, line {number}", json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise InputError(f"{file}, line {number}: broken JSON ({error}); mend or delete the line") from None


def _read_json(file: Path) -> Iterator[Row]:
    text = "".join(_lines(file))
    try:
        value = json.loads(text or "[]")
    except json.JSONDecodeError as error:
        # Many a .json file holds JSON lines.
        if error.msg == "Extra data":
            return _read_json_lines(file, io.StringIO(text))
        raise InputError(f"{file}, line {error.lineno}: broken JSON ({error.msg}); mend the file") from None
    records = value if isinstance(value, list) else [value]
    return ((f"{file}, record {number}", record) for number, record in enumerate(records, 1))


def _read_csv(file: Path) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)
    reader = csv.DictReader(_lines(file), strict=True)
    try:
        for row in reader:
            yield f"{file}, line {reader.line_num}", {name: value for name, value in row.items() if name is not None}
    except csv.Error as error:
        raise InputError(f"{file}, line {reader.reader.line_num}: broken CSV ({error}); mend the line") from None


def _read_parquet(file: Path) -> Iterator[Row]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise InputError(f"reading {file} needs pyarrow: pip install pyarrow, or convert the file to .jsonl") from None
    try:
        rows = (row for batch in parquet.ParquetFile(file).iter_batches(1024) for row in batch.to_pylist())
        yield from ((f"{file}, row {number}", row) for number, row in enumerate(rows, 1))
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(
            f"{file}: damaged, or no parquet file ({str(error).splitlines()[0]}); fetch it again"
        ) from None


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
EXTENSIONS = (".txt", *READERS)
