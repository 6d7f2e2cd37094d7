"""Batches of documents that are read and tokenized while they are trained on, with a cursor that resumes to the bit.

Nothing is prepared, and nothing is shuffled: documents come in the order in which they are stored, again and again.
Each process reads a share of its own, so the stream of batches follows from their number.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from engine.errors import InputError
from engine.processes import ALONE, Processes
from engine.tokenizer import Tokenizer
from train.data.loader import Batch, Prefetcher, pack
from train.data.rows import Skipped
from train.data.shards import TokenShards
from train.data.sources import Source

# Encoded in one call, and read again by a run that resumes among them.
CHUNK_DOCUMENTS = 64


@dataclass(frozen=True)
class StreamCursor:
    """A place in a process's stream: a chunk of a pass over the data, what is used of it, and what came before."""

    passes: int = 0
    chunk: dict[str, Any] | None = None  # what train.data.sources.Stream says before it; None at the beginning
    document: int = 0
    offset: int = 0
    batches: int = 0
    tokens: int = 0


class StreamLoader:
    """An endless iterator of `Batch`, this process's part of each, packed as PackedLoader does.

    Leaves out what `held_out` holds. Raises InputError where batches do not divide among the processes.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer,
        held_out: TokenShards,
        tokens_per_batch: int,
        context: int,
        *,
        processes: Processes = ALONE,
        prefetch: int = 2,
    ) -> None:
        self.source, self.tokenizer, self.context = source, tokenizer, context
        self.processes, self.prefetch = processes, prefetch
        self.own_tokens, rest = divmod(tokens_per_batch, processes.count)
        if rest:
            raise InputError(f"a stream's {tokens_per_batch} tokens do not divide among {processes.count} processes")
        documents = (held_out.document(number) for number in range(held_out.documents))
        self._held_out = {document.astype(np.int64).tobytes() for document in documents}
        self._data = hashlib.sha256(
            "".join([source.fingerprint(), tokenizer.fingerprint, held_out.fingerprint]).encode()
        ).hexdigest()
        self._handed_out = StreamCursor()
        self._producer: Iterator[tuple[Batch, StreamCursor]] | None = None

    @property
    def epoch(self) -> float:
        """How many times the data has been read to its end."""
        return float(self._handed_out.passes)

    @property
    def tokens(self) -> int:
        """What all processes have been handed out."""
        return self._handed_out.tokens * self.processes.count

    def batches_per_epoch(self) -> float:
        """Nobody knows the length of a stream."""
        return float("inf")

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._producer is None:
            batches = self._batches(self._handed_out)
            self._producer = Prefetcher(batches, self.prefetch) if self.prefetch else batches
        batch, self._handed_out = next(self._producer)
        return batch

    def close(self) -> None:
        """Stop prefetching. Iterating again goes on after the batch handed out last."""
        if isinstance(self._producer, Prefetcher):
            self._producer.close()
        self._producer = None

    def state_dict(self) -> dict[str, Any]:
        """JSON-able; the same on every process, and to be asked for by all at once: it holds the places of all."""
        return {"places": self.processes.collect(vars(self._handed_out)), **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there. Raises InputError where the state belongs to another stream."""
        for key, value in self._identity().items():
            if state.get(key) != value:
                raise InputError(
                    f"a stream cannot be resumed with another {key}: it was {state.get(key)}, now it "
                    f"is {value}; use what it began with, or start a new run"
                )
        self.close()
        self._handed_out = StreamCursor(**state["places"][self.processes.rank])

    def _identity(self) -> dict[str, Any]:
        return {"data": self._data, "context": self.context, "number of processes": self.processes.count}

    def _batches(self, cursor: StreamCursor) -> Iterator[tuple[Batch, StreamCursor]]:
        parts: list[tuple[np.ndarray, np.ndarray]] = []
        room, offset = self.own_tokens, cursor.offset
        for passes, chunk, document, ids in self._documents(cursor):
            while offset < len(ids) - 1:
                taken = min(self.context - offset % self.context, len(ids) - 1 - offset, room)
                parts.append((ids[offset : offset + taken], ids[offset + 1 : offset + taken + 1]))
                offset, room = offset + taken, room - taken
                if not room:
                    before = (cursor.batches + 1, cursor.tokens + self.own_tokens)
                    cursor = StreamCursor(passes, chunk, document, offset, *before)
                    yield pack(parts, self.context), cursor
                    parts, room = [], self.own_tokens
            offset = 0

    def _documents(self, cursor: StreamCursor) -> Iterator[tuple[int, dict[str, Any] | None, int, np.ndarray]]:
        """Every document from the cursor on, an eod on either side, with its pass, chunk and number in it."""
        passes, place, skip = cursor.passes, cursor.chunk, cursor.document
        while True:
            rank, count = self.processes.rank, self.processes.count
            stream = self.source.share(rank, count)
            if place is not None:
                stream.load_state_dict(place)
            documents = iter(stream)
            empty = place is None
            while chunk := list(islice(documents, CHUNK_DOCUMENTS)):
                for number, ids in self._encode(chunk[skip:]):
                    empty = False
                    yield passes, place, skip + number, ids
                place, skip = stream.state_dict(), 0
            if empty:
                raise InputError(
                    f"{self.source.name} has no text to train on for process {rank + 1} of {count}; "
                    "give more data with --data, or use fewer processes"
                )
            passes, place = passes + 1, None

    def _encode(self, documents: list[str | Skipped]) -> Iterator[tuple[int, np.ndarray]]:
        present = [(number, text) for number, text in enumerate(documents) if isinstance(text, str)]
        encoded = self.tokenizer.encode_batch([text for _, text in present])
        for (number, _), tokens in zip(present, encoded, strict=True):
            ids = np.array([self.tokenizer.eod, *tokens, self.tokenizer.eod])
            if ids.tobytes() not in self._held_out:
                yield number, ids
