"""Texts to token arrays: in order, by as many processes as there are cores."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from engine.tokenizer import Tokenizer

# What a worker is dealt at a time; and below how much text starting workers costs more than they save.
CHUNK_CHARACTERS = 1 << 20
SMALL_CHARACTERS = 4 << 20


class Chunk(NamedTuple):
    """Encoded documents: the tokens, each document's after an eod; and per document its tokens and bytes of text."""

    tokens: np.ndarray
    lengths: np.ndarray
    sizes: np.ndarray

    def cut(self, count: int) -> tuple["Chunk", "Chunk"]:
        at = int(self.lengths[:count].sum())
        first = Chunk(self.tokens[:at], self.lengths[:count], self.sizes[:count])
        return first, Chunk(self.tokens[at:], self.lengths[count:], self.sizes[count:])

    def counts(self) -> dict[str, int]:
        return {"documents": len(self.lengths), "tokens": len(self.tokens), "bytes": int(self.sizes.sum())}


def encode_documents(
    documents: Iterable[str], tokenizer: "Tokenizer", dtype: str, workers: int
) -> Generator[Chunk, None, None]:
    """The documents encoded, in order, by so many processes; by this one alone where there is little to do."""
    chunks = _chunks(documents)
    head = list(islice(chunks, SMALL_CHARACTERS // CHUNK_CHARACTERS + 1))
    if workers == 1 or len(head) <= SMALL_CHARACTERS // CHUNK_CHARACTERS:
        yield from (_encode(chunk, tokenizer, dtype) for chunk in chain(head, chunks))
        return
    # Spawned, not forked: a fork of a process that runs torch's or CUDA's threads may hang.
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, spawn, _start_worker, (tokenizer, dtype))
    waiting: deque[Future[Chunk]] = deque()
    try:
        for chunk in chain(head, chunks):
            waiting.append(pool.submit(_encode_in_worker, chunk))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _chunks(documents: Iterable[str]) -> Iterator[list[str]]:
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


def _encode(texts: Sequence[str], tokenizer: "Tokenizer", dtype: str) -> Chunk:
    ids = tokenizer.encode_batch(texts)
    lengths = np.array([len(document) + 1 for document in ids], np.int64)
    stream = chain.from_iterable(chain((tokenizer.eod,), document) for document in ids)
    tokens = np.fromiter(stream, dtype, int(lengths.sum()))
    return Chunk(tokens, lengths, np.array([len(text.encode()) for text in texts], np.int64))


_worker: dict[str, Any] = {}


def _start_worker(tokenizer: "Tokenizer", dtype: str) -> None:
    _worker.update(tokenizer=tokenizer, dtype=dtype)
    # Ctrl-C is the parent's to handle; and a killed parent takes its workers with it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def _encode_in_worker(texts: list[str]) -> Chunk:
    return _encode(texts, **_worker)
