"""Documents as token files: written once, in parallel, resumable; read by memory map.

    FOLDER/tokenizer.model      or tokenizer.json, of an imported model
    FOLDER/SPLIT/index.json     what the split was made from, and each shard's counts and checksums; written last
    FOLDER/SPLIT/00000.tokens   eod t t t eod t t eod t t t t eod: an eod before each document, one more at the end
    FOLDER/SPLIT/00000.starts   int64 [documents + 1]: where each document's eod stands, and where the last eod does

A document of n tokens trains on n + 1 inputs, its eod and its tokens; "tokens" counts inputs everywhere. Little-endian.
"""

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from functools import lru_cache
from itertools import groupby, pairwise
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.errors import InputError
from engine.tokenizer import tokenizer_file
from train.data.encoding import Chunk, encode_documents

if TYPE_CHECKING:
    from engine.tokenizer import Tokenizer
    from train.data.sources import Source

FORMAT = 1
SHARD_TOKENS = 64_000_000
# A mapped file stays open, and 10^11 tokens are in more files than a process may open.
MAPPED_FILES = 256
# A split of so many bytes of tokens is read and compared with its checksums in a moment, so `check` does. Of a larger
# one it looks at so many documents of every shard.
SMALL_BYTES = 64 << 20
LOOKED_AT, LOOK_TOKENS = 4, 4096
INDEX, UNFINISHED = "index.json", "unfinished.json"
Progress = Callable[[int, int, int], None]


def prepare(
    source: "Source",
    tokenizer: "Tokenizer",
    folder: str | os.PathLike[str],
    split: str,
    *,
    workers: int | None = None,
    max_tokens: int | None = None,
    shard_tokens: int = SHARD_TOKENS,
    progress: Progress | None = None,
) -> "TokenShards":
    """Tokenize a split into FOLDER/SPLIT, or go on where an interrupted run stopped, or open what is already there.

    The files depend on source, tokenizer, max_tokens and shard_tokens alone: not on interruptions, nor on the number of
    worker processes (default: one per core). The document that reaches `max_tokens` is the last. `progress` is told the
    documents, tokens and bytes of text so far. Raises InputError where the folder holds something else, or the split
    nothing.
    """
    root, dtype = Path(folder), "<u2" if tokenizer.vocab_size < 65_536 else "<u4"
    place = root / split
    made_from = {
        "format": FORMAT, "split": split, "source_fingerprint": source.fingerprint(),
        "tokenizer_fingerprint": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size, "dtype": dtype,
        "max_tokens": max_tokens, "shard_tokens": shard_tokens,
    }  # fmt: skip
    index: dict[str, Any] = {"source": source.name, **made_from, "shards": []}
    for name in (INDEX, UNFINISHED):
        if (place / name).exists():
            index = _read_json(place / name)
            if different := [key for key, value in made_from.items() if index.get(key) != value]:
                raise InputError(
                    f"{place} holds data made with another {', '.join(different)}; delete it or choose another folder"
                )
            if name == INDEX:
                return TokenShards.open(root, split)
    place.mkdir(parents=True, exist_ok=True)
    try:
        _save_tokenizer(tokenizer, root)
        _write_shards(place, index, source, tokenizer, workers or _cores(), progress)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InputError(
            f"the disk of {place} is full; make room and run the same command again: it goes on from here"
        ) from None
    return TokenShards.open(root, split)


def _write_shards(
    place: Path,
    index: dict[str, Any],
    source: "Source",
    tokenizer: "Tokenizer",
    workers: int,
    progress: Progress | None,
) -> None:
    shards: list[dict[str, Any]] = index["shards"]
    totals = {key: sum(shard[key] for shard in shards) for key in ("documents", "tokens", "bytes")}
    dtype, room = index["dtype"], (index["max_tokens"] or np.iinfo(np.int64).max) - totals["tokens"]

    def counted(parts: Iterable[tuple[int, Chunk]]) -> Iterator[Chunk]:
        for _, part in parts:
            yield part
            for key, count in part.counts().items():
                totals[key] += count
            if progress:
                progress(totals["documents"], totals["tokens"], totals["bytes"])

    done = totals["documents"]
    chunks = source.chunks(index["split"], done) if room > 0 else iter(())
    with closing(encode_documents(chunks, tokenizer, dtype, workers, done)) as encoded:
        dealt = _deal(_first_tokens(encoded, room), index["shard_tokens"])
        for _, parts in groupby(dealt, key=itemgetter(0)):
            shards.append(_write_shard(place / f"{len(shards):05d}", counted(parts), np.array([tokenizer.eod], dtype)))
            _write_json(place / UNFINISHED, index)
    if not shards:
        raise InputError(f"{source.name} has no text for the {index['split']} split; choose other --data")
    os.replace(place / UNFINISHED, place / INDEX)


def _save_tokenizer(tokenizer: "Tokenizer", folder: Path) -> None:
    path = tokenizer_file(folder)
    if path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() != tokenizer.fingerprint:
        raise InputError(f"{path} is another tokenizer than this data is to be made with; choose another folder")
    tokenizer.save(path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), folder / tokenizer.file_name)


def _first_tokens(chunks: Iterable[Chunk], limit: int) -> Iterator[Chunk]:
    """The documents up to the one that reaches the limit."""
    for chunk in chunks:
        if len(chunk.tokens) >= limit:
            yield chunk.cut(int(np.searchsorted(chunk.lengths.cumsum(), limit)) + 1)[0]
            return
        yield chunk
        limit -= len(chunk.tokens)


def _deal(chunks: Iterable[Chunk], shard_tokens: int) -> Iterator[tuple[int, Chunk]]:
    """Chunks cut where a shard is full, with the shard's number. A document stays whole, alone if it has to."""
    shard = filled = 0
    for chunk in chunks:
        while len(chunk.lengths):
            count = int(np.searchsorted(chunk.lengths.cumsum(), shard_tokens - filled, "right"))
            if not count and filled:
                shard, filled = shard + 1, 0
                continue
            part, chunk = chunk.cut(max(count, 1))
            filled += len(part.tokens)
            yield shard, part


def _write_shard(path: Path, parts: Iterable[Chunk], closing_eod: np.ndarray) -> dict[str, Any]:
    """Write one shard's files under temporary names, sync and rename them. Returns its entry of the index."""
    counts, lengths = {"documents": 0, "tokens": 0, "bytes": 0}, [np.zeros(1, np.int64)]

    def tokens() -> Iterator[np.ndarray]:
        for part in parts:
            lengths.append(part.lengths)
            for key, count in part.counts().items():
                counts[key] += count
            yield part.tokens
        yield closing_eod

    sha256 = {"tokens": _write_array(path.with_suffix(".tokens.tmp"), tokens())}
    starts = np.concatenate(lengths).cumsum(dtype=np.int64).astype("<i8", copy=False)
    sha256["starts"] = _write_array(path.with_suffix(".starts.tmp"), [starts])
    for kind in sha256:
        os.replace(path.with_suffix(f".{kind}.tmp"), path.with_suffix(f".{kind}"))
    return {**counts, "sha256": sha256}


def _write_array(path: Path, parts: Iterable[np.ndarray]) -> str:
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for part in parts:
            data = part.tobytes()
            digest.update(data)
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _write_json(path: Path, value: Any) -> None:
    """Replace a file at one stroke, and make the renames of its folder so far durable."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("w") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    if hasattr(os, "O_DIRECTORY"):
        folder = os.open(path.parent, os.O_DIRECTORY)
        os.fsync(folder)
        os.close(folder)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        index = json.loads(path.read_text())
        if index["format"] == FORMAT and index["shards"] is not None:
            return dict(index)
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path} is damaged; delete {path.parent} and prepare the data again") from None
    raise InputError(
        f"{path} has format {index['format']}, this program reads {FORMAT}; delete {path.parent} and prepare again"
    )


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_prepared(folder: str | os.PathLike[str], split: str = "*") -> bool:
    """Whether a folder holds a split (any, unless named) that `prepare` has finished, with its tokenizer."""
    return tokenizer_file(folder).is_file() and any(Path(folder).glob(f"{split}/{INDEX}"))


class TokenShards:
    """The token files of one split. `documents`, `tokens` and `bytes` (of text) count all shards.

    A file is mapped when something in it is read, the most recent MAPPED_FILES at a time.
    """

    def __init__(self, place: Path, index: dict[str, Any]) -> None:
        self.place, self.index = place, index
        shards = index["shards"]
        self.documents, self.tokens, self.bytes = (
            sum(shard[key] for shard in shards) for key in ("documents", "tokens", "bytes")
        )
        self.vocab_size: int = index["vocab_size"]
        self.tokenizer_fingerprint: str = index["tokenizer_fingerprint"]
        # All tokens and boundaries in one number: what a loader's cursor remembers its data by.
        self.fingerprint = hashlib.sha256(json.dumps([index["tokenizer_fingerprint"], shards]).encode()).hexdigest()
        self._first = np.cumsum([0, *(shard["documents"] for shard in shards)], dtype=np.int64)
        for number in range(len(shards)):
            self._check(number, "tokens")
            self._check(number, "starts")
        self._map = lru_cache(MAPPED_FILES)(self._map_file)

    @classmethod
    def open(
        cls, folder: str | os.PathLike[str], split: str, tokenizer_fingerprint: str | None = None
    ) -> "TokenShards":
        """Open FOLDER/SPLIT. Raises InputError where it is missing, unfinished, damaged or of another tokenizer."""
        place = Path(folder) / split
        if not (place / INDEX).exists():
            if (place / UNFINISHED).exists():
                raise InputError(
                    f"{place} is not finished; run the command that prepared it again: it goes on where it stopped"
                )
            raise InputError(f"{place} holds no prepared data; make it with `gpt data prepare`")
        index = _read_json(place / INDEX)
        if tokenizer_fingerprint not in (None, index["tokenizer_fingerprint"]):
            raise InputError(f"{place} was made with another tokenizer; prepare the data again, in another folder")
        return cls(place, index)

    def _path(self, number: int, kind: str) -> Path:
        return self.place / f"{number:05d}.{kind}"

    def _dtype(self, kind: str) -> np.dtype:
        return np.dtype("<i8" if kind == "starts" else self.index["dtype"])

    def _check(self, number: int, kind: str) -> None:
        path, shard = self._path(number, kind), self.index["shards"][number]
        if not path.exists():
            raise InputError(f"{path} is missing; delete {self.place} and prepare the data again")
        expected = (shard["documents" if kind == "starts" else "tokens"] + 1) * self._dtype(kind).itemsize
        if (size := path.stat().st_size) != expected:
            raise self._damage(number, kind, f"{size:,} bytes long where the index says {expected:,}")

    def _damage(self, number: int, kind: str, what: str) -> InputError:
        path = self._path(number, kind)
        return InputError(f"{path} is damaged: {what}; delete {self.place} and prepare the data again")

    def _map_file(self, number: int, kind: str) -> np.ndarray:
        return np.asarray(np.memmap(self._path(number, kind), self._dtype(kind), mode="r"))

    def verify(self) -> None:
        """Read everything and compare it with the index. Raises InputError with the name of a file that has changed."""
        for number, shard in enumerate(self.index["shards"]):
            for kind, expected in shard["sha256"].items():
                with self._path(number, kind).open("rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                        raise self._damage(number, kind, "its SHA-256 is not the index's")

    def check(self, eod: int) -> None:
        """What can be seen of damage in a moment: all of a small split, some documents of each shard of a large one.

        Raises InputError with the name of the file.
        """
        if self.tokens * self._dtype("tokens").itemsize <= SMALL_BYTES:
            self.verify()
            return
        for number, (first, after) in enumerate(pairwise(self._first.tolist())):
            for document in np.linspace(first, after - 1, LOOKED_AT, dtype=np.int64).tolist():
                _, start, stop = self._at(document)
                self._ids(document, 0, min(stop - start + 1, LOOK_TOKENS))
                if any(self._ids(document, place, 1)[0] != eod for place in (0, stop - start)):
                    what = f"document {document - first + 1:,} of it does not stand between two ends of documents"
                    raise self._damage(number, "tokens", what)

    @property
    def lengths(self) -> np.ndarray:
        """The tokens that every document trains on. int64 [documents], made anew each time."""
        return np.concatenate([self._lengths(number) for number in range(len(self.index["shards"]))])

    def _lengths(self, number: int) -> np.ndarray:
        starts, tokens = self._map(number, "starts"), self.index["shards"][number]["tokens"]
        lengths = np.diff(starts)
        if starts[0] != 0 or starts[-1] != tokens or lengths.min() < 1:
            raise self._damage(number, "starts", f"its places do not rise from 0 to {tokens:,}")
        return lengths

    def _at(self, document: int) -> tuple[int, int, int]:
        number = int(np.searchsorted(self._first, document, "right")) - 1
        starts, local = self._map(number, "starts"), document - int(self._first[number])
        return number, int(starts[local]), int(starts[local + 1])

    def _ids(self, document: int, offset: int, count: int) -> np.ndarray:
        """So many ids of a document from its eod on. Raises InputError for ids that no embedding has a row for."""
        number, start, _ = self._at(document)
        # Copied: a view would keep its file open.
        ids = self._map(number, "tokens")[start + offset : start + offset + count].copy()
        if count < 1 or len(ids) != count:
            raise self._damage(
                number, "starts", f"document {document - int(self._first[number]) + 1:,} of it has no end"
            )
        # Here, where it costs little and the file is known: in the embedding it is an IndexError, or a GPU's assertion.
        if (most := int(ids.max())) >= self.vocab_size:
            what = f"document {document - int(self._first[number]) + 1:,} of it holds the token {most:,}"
            raise self._damage(number, "tokens", f"{what}, beyond the vocabulary of {self.vocab_size:,}")
        return ids

    def document(self, document: int) -> np.ndarray:
        """The ids of one document of n tokens, the eods around it included. [n + 2]"""
        _, start, stop = self._at(document)
        return self._ids(document, 0, stop - start + 1)

    def read(self, document: int, offset: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of a part of a document, which must lie within it. [length] each"""
        ids = self._ids(document, offset, length + 1)
        return ids[:-1], ids[1:]
