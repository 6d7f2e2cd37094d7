"""Documents as token files, which are written once, in parallel and resumably, and read by memory map.

    FOLDER/tokenizer.model      or tokenizer.json, of an imported model
    FOLDER/SPLIT/index.json     what the split was made from, and each shard's counts and checksums; written last
    FOLDER/SPLIT/00000.tokens   eod t t t eod t t eod t t t t eod: an eod before each document, one more at the end
    FOLDER/SPLIT/00000.starts   int64 [documents + 1]: the position of each document's eod, and of the last eod

A document of n tokens trains on n + 1 inputs, its eod and its tokens; "tokens" counts inputs everywhere. Little-endian.
"""

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import groupby, pairwise
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from engine import records
from engine.disk import replacing, sync, write_atomically, writing
from engine.errors import InputError
from engine.progress import Told, listener
from engine.tokenizer import Tokenizer, tokenizer_file
from train.data.workers import encode_documents

if TYPE_CHECKING:
    from train.data.splits import Source

FORMAT = 1
SHARD_TOKENS = 64_000_000
# A mapped file stays open, and 10^11 tokens are in more files than a process may open.
MAPPED_FILES = 256
# `check` reads a split of up to SMALL_BYTES of tokens whole, which takes a moment, and compares it with its checksums.
# Of each shard of a larger split it looks at LOOKED_AT documents, at the first LOOK_TOKENS tokens of each.
SMALL_BYTES = 64 << 20
LOOKED_AT, LOOK_TOKENS = 4, 4096
INDEX, UNFINISHED = "index.json", "unfinished.json"
COUNTS = ("documents", "tokens", "bytes")


@dataclass(frozen=True)
class Shard:
    """What an index holds of a shard."""

    documents: int
    tokens: int
    bytes: int
    sha256: dict[Literal["tokens", "starts"], str]


@dataclass(frozen=True, kw_only=True)
class Index:
    """What index.json holds of a split: what it was made from, and its shards."""

    source: str = ""
    commit: str | None = None  # of a set of the Hub
    format: int
    split: str = ""
    source_fingerprint: str = ""
    tokenizer_fingerprint: str
    vocab_size: int
    dtype: Literal["<u2", "<u4"]
    max_tokens: int | None = None
    shard_tokens: int = SHARD_TOKENS
    shards: list[Shard]


def prepare(
    source: "Source",
    tokenizer: Tokenizer,
    folder: str | os.PathLike[str],
    split: str,
    *,
    workers: int | None = None,
    max_tokens: int | None = None,
    shard_tokens: int = SHARD_TOKENS,
) -> "TokenShards":
    """Tokenize a split into FOLDER/SPLIT, or continue an interrupted run, or open what is already finished.

    The files depend on source, tokenizer, max_tokens and shard_tokens alone: not on interruptions, nor on the number of
    worker processes (default: one per core). The document that reaches `max_tokens` is the last. Raises InputError
    where the folder holds something else, or the split nothing.
    """
    root, dtype = Path(folder), "<u2" if tokenizer.vocab_size < 65_536 else "<u4"
    place = root / split
    made_from = {
        "format": FORMAT, "split": split, "source_fingerprint": source.fingerprint(),
        "tokenizer_fingerprint": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size, "dtype": dtype,
        "max_tokens": max_tokens, "shard_tokens": shard_tokens,
    }  # fmt: skip
    index: dict[str, Any] = {"source": source.name, "commit": source.commit, **made_from, "shards": []}
    for name in (INDEX, UNFINISHED):
        if (place / name).exists():
            index = _read_index(place / name)
            if different := [key for key, value in made_from.items() if index.get(key) != value]:
                raise InputError(
                    f"{place} holds data made with another {', '.join(different)}; delete it or choose another folder"
                )
            if name == INDEX:
                return TokenShards(root, split)
    saved = tokenizer_file(root)
    if saved.exists() and hashlib.sha256(saved.read_bytes()).hexdigest() != tokenizer.fingerprint:
        raise InputError(f"{saved} is another tokenizer than this data is to be made with; choose another folder")
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    tokenizer.save(root / tokenizer.file_name)
    with listener.get()(f"tokenizing {split}", max_tokens, "tokens") as told:
        _write_shards(place, index, source, tokenizer, workers, told)
    return TokenShards(root, split)


def _write_shards(
    place: Path, index: dict[str, Any], source: "Source", tokenizer: Tokenizer, workers: int, told: Told
) -> None:
    shards, most = index["shards"], index["max_tokens"] or math.inf
    totals = Counter({key: sum(shard[key] for shard in shards) for key in COUNTS})
    done = totals["documents"]
    chunks = source.chunks(index["split"], done) if totals["tokens"] < most else iter(())

    def deal() -> Iterator[tuple[int, np.ndarray, int]]:
        """Yield each document's shard, tokens and bytes of text. A document is never cut, and may fill one alone."""
        shard = filled = 0
        for tokens, lengths, sizes in encoded:
            for ids, size in zip(np.split(tokens, lengths.cumsum()[:-1]), sizes.tolist(), strict=True):
                if filled and filled + len(ids) > index["shard_tokens"]:
                    shard, filled = shard + 1, 0
                yield shard, ids, size
                filled += len(ids)
                totals.update(documents=1, tokens=len(ids), bytes=size)
                if totals["tokens"] >= most:
                    break
            told(totals["tokens"])
            if totals["tokens"] >= most:
                return

    with closing(encode_documents(chunks, tokenizer, index["dtype"], workers, done)) as encoded:
        for _, documents in groupby(deal(), key=itemgetter(0)):
            path, last = place / f"{len(shards):05d}", np.array([tokenizer.begin], index["dtype"])
            shards.append(_write_shard(path, ((ids, size) for _, ids, size in documents), last))
            write_atomically(place / UNFINISHED, records.dumps(index))
            sync(place)
    with writing(place / INDEX):
        os.replace(place / UNFINISHED, place / INDEX)


def _write_shard(path: Path, documents: Iterable[tuple[np.ndarray, int]], last: np.ndarray) -> dict[str, Any]:
    """Write one shard's files. Returns its entry of the index."""
    lengths, text_bytes = [0], 0

    def tokens() -> Iterator[np.ndarray]:
        nonlocal text_bytes
        for ids, size in documents:
            lengths.append(len(ids))
            text_bytes += size
            yield ids
        yield last

    sha256 = {"tokens": _write_array(path.with_suffix(".tokens"), tokens())}
    sha256["starts"] = _write_array(path.with_suffix(".starts"), [np.cumsum(lengths, dtype="<i8")])
    return {"documents": len(lengths) - 1, "tokens": sum(lengths), "bytes": text_bytes, "sha256": sha256}


def _write_array(path: Path, parts: Iterable[np.ndarray]) -> str:
    digest = hashlib.sha256()
    with replacing(path) as new, new.open("wb") as file:
        for part in parts:
            digest.update(data := part.tobytes())
            file.write(data)
    return digest.hexdigest()


def _read_index(path: Path) -> dict[str, Any]:
    return asdict(records.read(path, Index, f"delete {path.parent} and prepare the data again", {FORMAT: False}))


def read_indices(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return what the indices in a folder hold, of splits that are finished or begun."""
    return [_read_index(path) for path in Path(folder).glob("*/*.json") if path.name in (INDEX, UNFINISHED)]


def is_prepared(folder: str | os.PathLike[str], split: str = "*") -> bool:
    """Return whether a folder holds a split (any, unless named) that `prepare` has finished, with its tokenizer."""
    return tokenizer_file(folder).is_file() and any(Path(folder).glob(f"{split}/{INDEX}"))


class TokenShards:
    """The token files of one split, FOLDER/SPLIT. `documents`, `tokens` and `bytes` (of text) count all shards.

    A file is mapped when something in it is read, the most recent MAPPED_FILES at a time. Raises InputError where the
    split is missing, unfinished, damaged or of another tokenizer.
    """

    def __init__(self, folder: str | os.PathLike[str], split: str, tokenizer_fingerprint: str | None = None) -> None:
        self.place = place = Path(folder) / split
        if not (place / INDEX).exists():
            if (place / UNFINISHED).exists():
                raise InputError(
                    f"{place} is not finished; run the command that prepared it again: it goes on where it stopped"
                )
            raise InputError(f"{place} holds no prepared data; make it with `gpt data prepare`")
        self.index = index = _read_index(place / INDEX)
        if tokenizer_fingerprint not in (None, index["tokenizer_fingerprint"]):
            raise InputError(f"{place} was made with another tokenizer; prepare the data again, in another folder")
        if not (shards := index["shards"]):
            raise InputError(f"{place / INDEX} lists no shards; delete {place} and prepare the data again")
        for number in range(len(shards)):
            for kind in ("tokens", "starts"):
                self._check_size(number, kind)
        self.documents, self.tokens, self.bytes = (sum(shard[key] for shard in shards) for key in COUNTS)
        self.vocab_size: int = index["vocab_size"]
        # A loader's cursor remembers its data by this: all tokens and boundaries in one number.
        self.fingerprint = hashlib.sha256(json.dumps([index["tokenizer_fingerprint"], shards]).encode()).hexdigest()
        # The number of each shard's first document, and of all documents. [shards + 1]
        self.first = np.cumsum([0, *(shard["documents"] for shard in shards)], dtype=np.int64)
        self._map = lru_cache(MAPPED_FILES)(self._map_file)

    def _path(self, number: int, kind: str) -> Path:
        return self.place / f"{number:05d}.{kind}"

    def _dtype(self, kind: str) -> np.dtype:
        return np.dtype("<i8" if kind == "starts" else self.index["dtype"])

    def _map_file(self, number: int, kind: str) -> np.ndarray:
        return np.asarray(np.memmap(self._path(number, kind), self._dtype(kind), mode="r"))

    def _damage(self, number: int, kind: str, what: str) -> InputError:
        path = self._path(number, kind)
        return InputError(f"{path} is damaged: {what}; delete {self.place} and prepare the data again")

    def _check_size(self, number: int, kind: str) -> None:
        path, shard = self._path(number, kind), self.index["shards"][number]
        if not path.exists():
            raise InputError(f"{path} is missing; delete {self.place} and prepare the data again")
        expected = (shard["documents" if kind == "starts" else "tokens"] + 1) * self._dtype(kind).itemsize
        if (size := path.stat().st_size) != expected:
            raise self._damage(number, kind, f"{size:,} bytes long where the index says {expected:,}")

    def verify(self) -> None:
        """Read everything and compare it with the index. Raises InputError with the name of a file that has changed."""
        for number, shard in enumerate(self.index["shards"]):
            for kind, expected in shard["sha256"].items():
                with self._path(number, kind).open("rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                        raise self._damage(number, kind, "its SHA-256 is not the index's")

    def check(self, eod: int) -> None:
        """Look for damage that shows in a moment: all of a small split, some documents of each shard of a large one.

        Raises InputError with the name of the file.
        """
        if self.tokens * self._dtype("tokens").itemsize <= SMALL_BYTES:
            self.verify()
            return
        for first, after in pairwise(self.first.tolist()):
            for document in np.linspace(first, after - 1, LOOKED_AT, dtype=np.int64).tolist():
                number, start, stop = self._at(document)
                self._ids(document, 0, min(stop - start + 1, LOOK_TOKENS))
                if any(self._ids(document, place, 1)[0] != eod for place in (0, stop - start)):
                    what = f"document {document - first + 1:,} of it does not stand between two ends of documents"
                    raise self._damage(number, "tokens", what)

    @property
    def lengths(self) -> np.ndarray:
        """Return the tokens that every document trains on. int64 [documents], made anew each time."""
        found = []
        for number, shard in enumerate(self.index["shards"]):
            starts = self._map(number, "starts")
            found.append(np.diff(starts))
            if starts[0] != 0 or starts[-1] != shard["tokens"] or found[-1].min() < 1:
                raise self._damage(number, "starts", f"its places do not rise from 0 to {shard['tokens']:,}")
        return np.concatenate(found)

    def _at(self, document: int) -> tuple[int, int, int]:
        """Return the shard of a document, and the positions in it of the document's eod and of the next one."""
        number = int(np.searchsorted(self.first, document, "right")) - 1
        starts, local = self._map(number, "starts"), document - int(self.first[number])
        return number, int(starts[local]), int(starts[local + 1])

    def _ids(self, document: int, offset: int, count: int) -> np.ndarray:
        """Return `count` ids of a document from its eod + `offset` on. Raises InputError for damage."""
        number, start, _ = self._at(document)
        which = f"document {document - int(self.first[number]) + 1:,} of it"
        # The ids are copied, since a view would keep its file open.
        ids = self._map(number, "tokens")[start + offset : start + offset + count].copy()
        if count < 1 or len(ids) != count:
            raise self._damage(number, "starts", f"{which} has no end")
        # This check is cheap, and it can name the file. In the embedding such an id would raise an IndexError, or fail
        # an assertion on a GPU.
        if (most := int(ids.max())) >= self.vocab_size:
            place = start + offset + int(ids.argmax())
            what = f"{which} holds at place {place:,} the token {most:,}, beyond the vocabulary of {self.vocab_size:,}"
            raise self._damage(number, "tokens", what)
        return ids

    def document(self, document: int) -> np.ndarray:
        """Return the ids of one document of n tokens, the eods around it included. [n + 2]"""
        _, start, stop = self._at(document)
        return self._ids(document, 0, stop - start + 1)

    def read(self, document: int, offset: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Return inputs and targets of a part of a document, which must lie within it. [length] each"""
        ids = self._ids(document, offset, length + 1)
        return ids[:-1], ids[1:]
