"""Batches of documents that are read and tokenized while they are trained on, with a cursor that resumes to the bit.

Nothing is prepared, and nothing is shuffled: documents come in the order in which they are stored, again and again.
Each process reads its own part of the documents, so the batches depend on the number of processes.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.errors import InputError
from engine.processes import ALONE, Processes
from engine.tokenizer import Tokenizer
from train.data.loader import Batch, Loader, pack
from train.data.rows import Skipped
from train.data.shards import TokenShards
from train.data.splits import Place, Source

# The number of documents that are encoded in one call. A run that is resumed within them reads them again.
CHUNK_DOCUMENTS = 64


@dataclass(frozen=True)
class StreamCursor:
    """The position of a process in its stream.

    It is in document number `document` of a chunk, `offset` tokens of which are used already, in pass number `passes`
    over the data; `batches` and `tokens` have been handed out so far.
    """

    passes: int = 0
    chunk: Place = None  # the source's place before the chunk
    document: int = 0
    offset: int = 0
    batches: int = 0
    tokens: int = 0


class StreamLoader(Loader):
    """Endless batches of a source, packed as PackedLoader does.

    Documents of `held_out` are left out. Raises InputError if the tokens of a batch do not divide among the processes.
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
        super().__init__(StreamCursor(), prefetch)
        self.source, self.tokenizer, self.context, self.processes = source, tokenizer, context, processes
        self.own_tokens, rest = divmod(tokens_per_batch, processes.count)
        if rest:
            raise InputError(f"a stream's {tokens_per_batch} tokens do not divide among {processes.count} processes")
        documents = (held_out.document(number) for number in range(held_out.documents))
        self._held_out = {document.astype(np.int64).tobytes() for document in documents}
        data = source.fingerprint() + tokenizer.fingerprint + held_out.fingerprint
        self._data = hashlib.sha256(data.encode()).hexdigest()

    @property
    def epoch(self) -> float:
        return float(self.cursor.passes)

    @property
    def tokens(self) -> int:
        return self.cursor.tokens * self.processes.count

    def batches_per_epoch(self) -> float:
        return math.inf  # nobody knows the length of a stream

    def identity(self) -> dict[str, Any]:
        return {"data": self._data, "context": self.context, "number of processes": self.processes.count}

    def state_dict(self) -> dict[str, Any]:
        """Return the cursors of all processes, JSON-able. All processes must ask for it at once."""
        return {"places": self.processes.collect(vars(self.cursor)), **self.identity()}

    def cursor_of(self, state: dict[str, Any]) -> StreamCursor:
        return StreamCursor(**state["places"][self.processes.rank])

    def give_up(self) -> None:
        # The thread that reads may be waiting for the Hub, for an hour.
        self.source.abandoned = True

    def close(self) -> None:
        self.give_up()
        super().close()
        self.source.abandoned = False

    def batches(self, cursor: StreamCursor) -> Iterator[tuple[Batch, StreamCursor]]:
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

    def _documents(self, cursor: StreamCursor) -> Iterator[tuple[int, Place, int, np.ndarray]]:
        """Yield every document from the cursor on, an eod on either side, after its pass, chunk and number in it."""
        passes, place, skip = cursor.passes, cursor.chunk, cursor.document
        rank, count = self.processes.rank, self.processes.count
        while True:
            empty = place is None
            for before, chunk in self.source.share(rank, count, place, CHUNK_DOCUMENTS):
                for number, ids in self._encode(chunk[skip:]):
                    empty = False
                    yield passes, before, skip + number, ids
                skip = 0
            if empty:
                raise InputError(
                    f"{self.source.name} has no text to train on for process {rank + 1} of {count}; "
                    "give more data with --data, or use fewer processes with --gpus"
                )
            passes, place = passes + 1, None

    def _encode(self, documents: list[str | Skipped]) -> Iterator[tuple[int, np.ndarray]]:
        present = [(number, text) for number, text in enumerate(documents) if isinstance(text, str)]
        encoded = self.tokenizer.encode_batch([text for _, text in present])
        for (number, _), tokens in zip(present, encoded, strict=True):
            ids = np.array(self.tokenizer.document(tokens))
            if ids.tobytes() not in self._held_out:
                yield number, ids
