"""Batches of packed documents in a pseudo-random order, with a cursor that resumes to the bit.

Documents are cut into pieces of at most `context` tokens. An epoch deals every piece once, in an order computed on the
fly; the pieces, laid end to end, are cut into batches of exactly so many tokens, without padding. Many processes follow
the same plan, and each reads its part of every batch: what is learnt does not depend on how many there are.
"""

import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise, takewhile
from typing import Any, ClassVar, Protocol, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from engine.errors import InputError
from engine.processes import ALONE, Processes
from train.data.permutation import Permutation

IGNORE_INDEX = -100
Item = TypeVar("Item")
# Pieces looked up at a time: enough that numpy's calls cost little, few enough that a resume wastes little.
LOOKAHEAD = 1024


class PieceSource(Protocol):
    """What a loader packs: documents of known lengths. A target may be IGNORE_INDEX: nothing is to be learnt there."""

    @property
    def fingerprint(self) -> str:
        """A hash of what the documents hold."""

    @property
    def lengths(self) -> np.ndarray:
        """Tokens per document. int64 [documents]"""

    def read(self, document: int, offset: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of a part of a document. [length] each"""


@dataclass(frozen=True)
class Batch:
    """Packed sequences. tokens, targets int64 [N]; cu_seqlens int32 [n + 1], 0 to N; none longer than max_seqlen."""

    tokens: Tensor
    targets: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    # So many sequences belong together.
    group: ClassVar[int] = 1

    def split(self, parts: int) -> list[Self]:
        """Cut between sequences, into parts about equal in tokens: so many, or fewer where there are fewer sequences.

        What a sequence sees of itself does not change, so the losses of the parts add up to that of the whole.
        """
        if parts == 1:
            return [self]
        cuts = even_cuts(self.cu_seqlens[:: self.group].tolist(), parts)
        # Nothing but padding is a part, too: every process has one.
        return [self.part(self.group * first, self.group * last) for first, last in pairwise(cuts)] or [self]

    def part(self, first: int, last: int) -> Self:
        """The sequences from number `first` to before `last`."""
        bounds = self.cu_seqlens[first : last + 1]
        tokens = slice(int(bounds[0]), int(bounds[-1]))
        return replace(self, tokens=self.tokens[tokens], targets=self.targets[tokens], cu_seqlens=bounds - bounds[0])

    def to(self, device: torch.device | str) -> Self:
        def move(tensor: Tensor) -> Tensor:
            # Only from pinned memory does a copy overlap with the device's work.
            pinned = tensor.pin_memory() if torch.device(device).type == "cuda" and not tensor.is_cuda else tensor
            return pinned.to(device, non_blocking=True)

        return replace(self, tokens=move(self.tokens), targets=move(self.targets), cu_seqlens=move(self.cu_seqlens))


@dataclass(frozen=True)
class Cursor:
    """A place in the stream: the next piece of an epoch's order, what is already used of it, and what came before."""

    epoch: int = 0
    position: int = 0
    offset: int = 0
    batches: int = 0
    tokens: int = 0


Part = tuple[int, int, int]  # document, offset, length


class PackedLoader:
    """An iterator of `Batch`, this process's part of each. `state_dict` is the place after the batch handed out last.

    Endless without `epochs`; with them the last batch is smaller where the tokens do not come out even.
    `shuffle=False, epochs=1` is for evaluation. `whole` leaves a document that would be cut by the end of a batch to
    the next one: what then stays free is padding, a sequence of which nothing is learnt.
    """

    def __init__(
        self,
        shards: PieceSource,
        tokens_per_batch: int,
        context: int,
        *,
        seed: int,
        processes: Processes = ALONE,
        shuffle: bool = True,
        epochs: int | None = None,
        whole: bool = False,
        prefetch: int = 2,
    ) -> None:
        self.shards, self.tokens_per_batch, self.context, self.seed = shards, tokens_per_batch, context, seed
        self.processes, self.shuffle, self.epochs = processes, shuffle, epochs
        self.whole, self.prefetch = whole, prefetch
        self._lengths = shards.lengths
        self.tokens_per_epoch = int(self._lengths.sum())
        if self.tokens_per_epoch < (tokens_per_batch if shuffle or epochs is None else 1):
            raise InputError(
                f"the data has {self.tokens_per_epoch:,} tokens, too few for one batch of {tokens_per_batch:,}; "
                "give more data with --data, or choose a smaller batch"
            )
        # [documents + 1]: the number of each document's first piece.
        self._first = np.concatenate([[0], -(-self._lengths // context)]).cumsum(dtype=np.int64)
        self._handed_out = Cursor()
        self._producer: Iterator[tuple[Batch, Cursor]] | None = None

    @property
    def epoch(self) -> float:
        """How many times the data has been handed out, fractions included."""
        return self._handed_out.tokens / self.tokens_per_epoch

    @property
    def tokens(self) -> int:
        """What all processes have been handed out, without padding."""
        return self._handed_out.tokens

    def batches_per_epoch(self) -> float:
        """How many batches deal the data once, padding included."""
        if not self.whole:
            return self.tokens_per_epoch / self.tokens_per_batch
        first = takewhile(lambda cursor: cursor.epoch == 0, (cursor for _, cursor in self._plans(Cursor())))
        last = max(first, key=lambda cursor: cursor.batches, default=Cursor(batches=1, tokens=self.tokens_per_batch))
        return last.batches * self.tokens_per_epoch / last.tokens

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
        """JSON-able; the same on every process."""
        return {**vars(self._handed_out), **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there. Raises InputError where the state belongs to other data or another order of it."""
        meanings = {"data": "data", "context": "context", "seed": "seed", "shuffle": "order"}
        for key, value in self._identity().items():
            if state.get(key) != value:
                raise InputError(
                    f"this run cannot be resumed with another {meanings[key]}: it was {state.get(key)}, now it is "
                    f"{value}; use what it began with, or start a new run"
                )
        self.close()
        self._handed_out = Cursor(**{key: state[key] for key in vars(Cursor())})

    def _identity(self) -> dict[str, Any]:
        return {"data": self.shards.fingerprint, "context": self.context, "seed": self.seed, "shuffle": self.shuffle}

    def _batches(self, cursor: Cursor) -> Iterator[tuple[Batch, Cursor]]:
        for plan, after in self._plans(cursor):
            yield self._read(self._own(plan)), after

    def _own(self, plan: list[Part]) -> list[Part]:
        """What this process reads of a batch: the pieces that begin in its equal share of the tokens.

        Cut between pieces, so that what each of them sees of its document does not depend on the number of processes.
        """
        *starts, total = accumulate((length for _, _, length in plan), initial=0)
        rank, count = self.processes.rank, self.processes.count
        return [part for part, start in zip(plan, starts, strict=True) if start * count // total == rank]

    def _plans(self, cursor: Cursor) -> Iterator[tuple[list[Part], Cursor]]:
        """What stands in every batch, and the cursor after it."""
        plan: list[Part] = []
        room = self.tokens_per_batch
        for epoch, position, offset, (document, start, length) in self._pieces(cursor):
            if self.whole and length > room:
                cursor = Cursor(epoch, position, 0, cursor.batches + 1, cursor.tokens + self.tokens_per_batch - room)
                yield plan, cursor
                plan, room = [], self.tokens_per_batch
            while offset < length:
                taken = min(length - offset, room)
                plan.append((document, start + offset, taken))
                offset, room = offset + taken, room - taken
                place = (epoch, position, offset) if offset < length else (epoch, position + 1, 0)
                if not room:
                    cursor = Cursor(*place, cursor.batches + 1, cursor.tokens + self.tokens_per_batch)
                    yield plan, cursor
                    plan, room = [], self.tokens_per_batch
        if plan:
            yield plan, Cursor(*place, cursor.batches + 1, cursor.tokens + self.tokens_per_batch - room)

    def _pieces(self, cursor: Cursor) -> Iterator[tuple[int, int, int, Part]]:
        """Epoch, position, offset and piece, from the cursor on. The offset is what is used of the first piece."""
        pieces = int(self._first[-1])
        epoch, position, offset = cursor.epoch, cursor.position, cursor.offset
        while self.epochs is None or epoch < self.epochs:
            order = Permutation(pieces, self.seed, epoch) if self.shuffle else np.asarray
            for begin in range(position, pieces, LOOKAHEAD):
                numbers = order(np.arange(begin, min(begin + LOOKAHEAD, pieces)))
                documents = np.searchsorted(self._first, numbers, "right") - 1
                starts = (numbers - self._first[documents]) * self.context
                lengths = np.minimum(self.context, self._lengths[documents] - starts)
                parts = zip(documents.tolist(), starts.tolist(), lengths.tolist(), strict=True)
                for at, part in enumerate(parts, begin):
                    yield epoch, at, offset, part
                    offset = 0
            epoch, position = epoch + 1, 0

    def _read(self, plan: list[Part]) -> Batch:
        sequences = [self.shards.read(*part) for part in plan]
        room = int(not plan)  # a batch of fewer pieces than there are processes
        if self.whole and self.processes.count == 1:
            # Batches of one size suit a compiled model. No longer than a document, or one would have found room.
            room = self.tokens_per_batch - sum(length for _, _, length in plan)
        if room:
            sequences.append((np.zeros(room, np.int64), np.full(room, IGNORE_INDEX)))
        return pack(sequences, self.context)


def even_cuts(bounds: Sequence[int], parts: int) -> list[int]:
    """Where to cut units, of which number n holds the tokens bounds[n] to bounds[n + 1], into at most so many parts.

    Numbers of units, from 0 to how many there are. A unit belongs to the part in which its middle lies: two units are
    always cut, and no part exceeds its share of the tokens by more than the longest unit.
    """
    owners = [(start + end) * parts // (2 * bounds[-1]) for start, end in pairwise(bounds)]
    return [number for number, (left, right) in enumerate(pairwise([-1, *owners, parts + 1])) if left != right]


def pack(sequences: list[tuple[np.ndarray, np.ndarray]], context: int) -> Batch:
    """Inputs and targets of several sequences, end to end."""
    inputs, targets = (np.concatenate(arrays).astype(np.int64) for arrays in zip(*sequences, strict=True))
    bounds = np.cumsum([0, *(len(sequence) for sequence, _ in sequences)]).astype(np.int32)
    return Batch(torch.from_numpy(inputs), torch.from_numpy(targets), torch.from_numpy(bounds), context)


class Prefetcher(Iterator[Item]):
    """Runs an iterator ahead in a thread. Its exceptions, and its end, reach whoever asks for the next item."""

    def __init__(self, items: Iterator[Item], depth: int) -> None:
        self.queue: queue.Queue[Item | BaseException] = queue.Queue(depth)
        self.closed = False
        self.end: BaseException | None = None
        self.thread = threading.Thread(target=self._run, args=(items,), daemon=True)
        self.thread.start()

    def _run(self, items: Iterator[Item]) -> None:
        try:
            for item in items:
                self.queue.put(item)
                if self.closed:
                    return
            self.queue.put(StopIteration())
        except BaseException as error:
            self.queue.put(error)

    def __next__(self) -> Item:
        if self.end is None:
            item = self.queue.get()
            if not isinstance(item, BaseException):
                return item
            self.end = item
        raise self.end

    def close(self) -> None:
        self.closed = True
        # After this the thread can put one item more, for which there is room now, before it sees that it is closed.
        while not self.queue.empty():
            self.queue.get()
        self.thread.join()
