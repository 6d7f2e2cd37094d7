"""Texts are tokenized here, in order, by as many processes as there are cores."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np

from engine.errors import InputError, UnfinishedError
from engine.tokenizer import Tokenizer

# Characters of text per task of a worker; and those below which starting workers costs more time than they save.
CHUNK_CHARACTERS = 1 << 20
SMALL_CHARACTERS = 4 << 20
# Documents in one call of the tokenizer: enough to be fast, and few enough to tell which document made it fail.
GROUP = 16


class Chunk(NamedTuple):
    """Encoded documents.

    `tokens` are those of all documents, with an eod before each, or a token that begins and one that ends it. `lengths`
    are the tokens of each document with these, and `sizes` its UTF-8 bytes.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    sizes: np.ndarray


def encode_documents(
    chunks: Iterable[Sequence[str]], tokenizer: Tokenizer, dtype: str, workers: int, first: int = 0
) -> Generator[Chunk, None, None]:
    """Encode documents in order, with this number of worker processes, or in this process if there is little to do.

    Raises InputError with the number of the document, counted from `first`, if encoding fails or a worker dies. To know
    the document even then, each worker writes the number of the one that it begins into shared memory.
    """
    numbered = _numbered(chunks, first)
    head = list(islice(numbered, SMALL_CHARACTERS // CHUNK_CHARACTERS + 1))
    if workers == 1 or len(head) <= SMALL_CHARACTERS // CHUNK_CHARACTERS:
        yield from (_encode(*each, tokenizer, dtype) for each in chain(head, numbered))
        return
    # Workers are spawned, not forked: a fork of a process that runs torch's or CUDA's threads may hang.
    spawn = multiprocessing.get_context("spawn")
    # In shared memory: the first document of the group that each worker encodes, counted from 1, or 0 while it is idle;
    # and the number of workers that have started, which gives each worker its own index.
    positions, begun = spawn.RawArray("q", workers), spawn.Value("i", 0)
    pool = ProcessPoolExecutor(workers, spawn, _start_worker, (tokenizer, dtype, positions, begun))
    waiting: deque[Future[Chunk]] = deque()
    try:
        for each in chain(head, numbered):
            waiting.append(pool.submit(_encode_in_worker, *each))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except KeyboardInterrupt:
        # What they work on is not waited for: a second Ctrl-C would leave workers behind that are only just starting.
        for worker in multiprocessing.active_children():
            worker.kill()
        raise
    except BrokenProcessPool:
        # The pool terminates the other workers, which set their own positions to 0 first (see _start_worker). The
        # position that remains is that of the worker that died.
        pool.shutdown()
        where = " or ".join(f" at {_span(position - 1, GROUP)}" for position in positions if position)
        raise UnfinishedError(
            f"a tokenizing process died{where}, perhaps because memory ran out; run again with fewer workers: it "
            "continues from here"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def in_chunks(documents: Iterable[str]) -> Iterator[list[str]]:
    """Group documents into tasks for the workers."""
    chunk: list[str] = []
    size = 0
    for document in documents:
        chunk.append(document)
        size += len(document)
        if size >= CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _numbered(chunks: Iterable[Sequence[str]], first: int) -> Iterator[tuple[int, Sequence[str]]]:
    for chunk in chunks:
        yield first, chunk
        first += len(chunk)


def _span(first: int, count: int) -> str:
    return f"document {first + 1:,}" if count == 1 else f"one of the documents {first + 1:,} to {first + count:,}"


def _encode(
    first: int, texts: Sequence[str], tokenizer: Tokenizer, dtype: str, arrive: Callable[[int], None] | None = None
) -> Chunk:
    ids: list[list[int]] = []
    sizes: list[int] = []
    rest = iter(texts)
    while group := list(islice(rest, GROUP)):
        number = first + len(ids)
        if arrive:
            arrive(number)
        try:
            ids += tokenizer.encode_batch(group)
        except (InputError, MemoryError, RuntimeError) as error:
            reason = str(error) or type(error).__name__
            raise InputError(f"{_span(number, len(group))} cannot be tokenized: {reason}") from error
        sizes += [len(text.encode()) for text in group]
    documents = [tokenizer.document(each)[:-1] for each in ids]
    lengths = np.array([*map(len, documents)], np.int64)
    stream = chain.from_iterable(documents)
    return Chunk(np.fromiter(stream, dtype, int(lengths.sum())), lengths, np.array(sizes, np.int64))


_worker: dict[str, Any] = {}


def _start_worker(tokenizer: Tokenizer, dtype: str, positions: Any, begun: Any) -> None:
    with begun.get_lock():
        own = begun.value
        begun.value += 1
    _worker.update(tokenizer=tokenizer, dtype=dtype, arrive=lambda number: positions.__setitem__(own, number + 1))
    # The parent alone handles Ctrl-C. If the parent is killed, its workers end too.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def end(*_: object) -> None:
        # A worker that is told to end did not fail: its position must not be taken for that of the one that did.
        positions[own] = 0
        os._exit(1)

    signal.signal(signal.SIGTERM, end)


def _end_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def _encode_in_worker(first: int, texts: Sequence[str]) -> Chunk:
    chunk = _encode(first, texts, **_worker)
    _worker["arrive"](-1)
    return chunk
