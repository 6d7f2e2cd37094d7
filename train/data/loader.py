"""Batches of packed documents in a pseudo-random order, with a cursor that resumes to the bit.

Documents are cut into segments of at most `context` tokens. An epoch hands out every segment once, in an order computed
on the fly; the segments, laid end to end, are cut into batches of exactly `tokens_per_batch` tokens, without padding.
All processes follow the same plan, and each reads its own part of every batch: the result of training does not depend
on the number of processes.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise, takewhile
from typing import Any, ClassVar, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from engine.errors import InputError
from engine.processes import ALONE, Processes

IGNORE_INDEX = -100
Sequences = Sequence[tuple[np.ndarray, np.ndarray]]  # inputs and targets of each
# The number of segments that are looked up at a time: enough to make numpy's calls cheap, and few to repeat on resume.
LOOKAHEAD = 1024


class TokenSource(Protocol):
    """The documents that a loader packs, of known lengths. Where a target is IGNORE_INDEX, nothing is learnt."""

    @property
    def fingerprint(self) -> str:
        """Return a hash of what the documents hold."""

    @property
    def lengths(self) -> np.ndarray:
        """Return the tokens per document. int64 [documents]"""

    def read(self, document: int, offset: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Return inputs and targets of a part of a document. [length] each"""


@dataclass(frozen=True)
class Batch:
    """Packed sequences. tokens, targets int64 [N]; cu_seqlens int32 [n + 1], 0 to N; none longer than max_seqlen."""

    tokens: Tensor
    targets: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    # Sequences per unit, which `split` never separates: 1, or 2 for the two answers of a preference pair.
    group: ClassVar[int] = 1

    def split(self, parts: int) -> list[Self]:
        """Cut between sequences into this many parts with about equal tokens, or fewer if there are fewer sequences.

        No sequence is cut, so every token sees what it saw, and the losses of the parts add up to that of the whole.
        """
        if parts == 1:
            return [self]
        # A unit (`group` sequences) goes to the part that contains its midpoint, counted in tokens. So two units never
        # stay in one part, and no part exceeds its equal share of the tokens by more than the longest unit. `owners` is
        # the part of each unit, and `cuts` are the units at which a new part begins.
        bounds = self.cu_seqlens[:: self.group].tolist()
        owners = [(start + end) * parts // (2 * bounds[-1]) for start, end in pairwise(bounds)]
        cuts = [number for number, (left, right) in enumerate(pairwise([-1, *owners, parts + 1])) if left != right]
        # A batch of nothing but padding is one part: every process needs one.
        return [self.part(self.group * first, self.group * last) for first, last in pairwise(cuts)] or [self]

    def part(self, first: int, last: int) -> Self:
        """Return the sequences from number `first` to before `last`."""
        bounds = self.cu_seqlens[first : last + 1]
        tokens = slice(int(bounds[0]), int(bounds[-1]))
        return replace(self, tokens=self.tokens[tokens], targets=self.targets[tokens], cu_seqlens=bounds - bounds[0])

    def to(self, device: torch.device | str) -> Self:
        def move(tensor: Tensor) -> Tensor:
            # Only from pinned memory does a copy overlap with the device's work.
            pinned = tensor.pin_memory() if torch.device(device).type == "cuda" and not tensor.is_cuda else tensor
            return pinned.to(device, non_blocking=True)

        return replace(self, tokens=move(self.tokens), targets=move(self.targets), cu_seqlens=move(self.cu_seqlens))


def pack(sequences: Sequences, context: int) -> Batch:
    """Make a batch of several sequences, end to end."""
    inputs, targets = (np.concatenate(arrays).astype(np.int64) for arrays in zip(*sequences, strict=True))
    bounds = np.cumsum([0, *(len(sequence) for sequence, _ in sequences)]).astype(np.int32)
    return Batch(torch.from_numpy(inputs), torch.from_numpy(targets), torch.from_numpy(bounds), context)


class Permutation:
    """A pseudo-random bijection of range(size), computed where it is asked for: no table, whatever the size.

    A Feistel network over the next even number of bits, walked until the value falls inside the range (Black & Rogaway,
    "Ciphers with Arbitrary Finite Domains", 2002).
    """

    ROUNDS = 6

    def __init__(self, size: int, *key: int) -> None:
        self.size = size
        self.half = np.uint64(max(2, ((size - 1).bit_length() + 1) // 2))
        self.mask = np.uint64((1 << int(self.half)) - 1)
        self.keys = np.random.SeedSequence(key).generate_state(self.ROUNDS, np.uint64)

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Return the images of these positions. int64 [n] -> int64 [n]"""
        values = self._encrypt(positions.astype(np.uint64))
        while len(outside := np.flatnonzero(values >= self.size)):
            values[outside] = self._encrypt(values[outside])
        return values.astype(np.int64)

    def _encrypt(self, values: np.ndarray) -> np.ndarray:
        left, right = values >> self.half, values & self.mask
        for key in self.keys:
            # One round of the splitmix64 finalizer, which mixes every bit into the low half.
            mixed = (right ^ key) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0x94D049BB133111EB)
            left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(32))) & self.mask)
        return (left << self.half) | right


class Batches(Protocol):
    """An endless iterator of micro-batches: each process gets its own part of each. state_dict is its position."""

    @property
    def epoch(self) -> float:
        """Return how many times all data has been handed out, fractions included where they are known."""

    @property
    def tokens(self) -> int:
        """Return how many tokens have been handed out to all processes together, without padding."""

    def batches_per_epoch(self) -> float:
        """Return how many batches hand out the data once, padding included."""

    def __next__(self) -> Batch: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def close(self) -> None: ...

    def give_up(self) -> None:
        """Wait for nothing more: a batch that would take long raises UnfinishedError. Signal handlers may call it."""


class Loader(Batches, Iterator[Batch]):
    """The base class of data loaders: a thread reads `prefetch` batches ahead, and a resume continues to the bit.

    `cursor` is the position after the batch that was handed out last. A subclass defines how its cursor is saved and
    restored (state_dict and `cursor_of`), and which batches follow a cursor, each with the cursor after it (`batches`).
    """

    def __init__(self, cursor: Any, prefetch: int) -> None:
        self.cursor, self.prefetch = cursor, prefetch
        self._pool: ThreadPoolExecutor | None = None
        self._ahead: deque[Future[tuple[Batch, Any]]] = deque()

    def identity(self) -> dict[str, Any]:
        """Return what must be the same when a run is resumed, by the names that a message gives to it."""
        raise NotImplementedError

    def cursor_of(self, state: dict[str, Any]) -> Any:
        raise NotImplementedError

    def batches(self, cursor: Any) -> Iterator[tuple[Batch, Any]]:
        raise NotImplementedError

    def __next__(self) -> Batch:
        if self._pool is None:
            self._pool, self._batches = ThreadPoolExecutor(1), self.batches(self.cursor)
        while len(self._ahead) <= self.prefetch:
            self._ahead.append(self._pool.submit(next, self._batches))
        batch, self.cursor = self._ahead[0].result()  # an exception stays where it is, and is raised again
        self._ahead.popleft()
        return batch

    def close(self) -> None:
        """Stop reading ahead. Iterating again continues after the batch that was handed out last."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._pool, self._ahead = None, deque()

    def give_up(self) -> None:
        pass  # what is read from a disk comes soon

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from that state. Raises InputError if it belongs to other data or to another order of it."""
        for key, value in self.identity().items():
            if state.get(key) != value:
                raise InputError(
                    f"this run cannot be resumed with another {'order' if key == 'shuffle' else key}: it was "
                    f"{state.get(key)}, now it is {value}; use what it began with, or start a new run"
                )
        self.close()
        self.cursor = self.cursor_of(state)


@dataclass(frozen=True)
class Cursor:
    """A position in a packed stream: the next segment is number `position` of the order of `epoch`.

    `offset` tokens of that segment are used already; `batches` and `tokens` have been handed out so far.
    """

    epoch: int = 0
    position: int = 0
    offset: int = 0
    batches: int = 0
    tokens: int = 0


Part = tuple[int, int, int]  # document, offset, length


class PackedLoader(Loader):
    """The batches of documents of known lengths, the same stream for any number of processes.

    With `whole`, a document that the end of a batch would cut is left to the next batch. The rest of the batch is then
    padding: a sequence without targets.
    """

    def __init__(
        self,
        source: TokenSource,
        tokens_per_batch: int,
        context: int,
        *,
        seed: int,
        processes: Processes = ALONE,
        shuffle: bool = True,
        whole: bool = False,
        prefetch: int = 2,
    ) -> None:
        super().__init__(Cursor(), prefetch)
        self.source, self.tokens_per_batch, self.context, self.seed = source, tokens_per_batch, context, seed
        self.processes, self.shuffle, self.whole = processes, shuffle, whole
        self._lengths = source.lengths
        self.tokens_per_epoch = int(self._lengths.sum())
        if self.tokens_per_epoch < tokens_per_batch:
            raise InputError(
                f"the data has {self.tokens_per_epoch:,} tokens, too few for one batch of {tokens_per_batch:,}; "
                "give more data with --data, or take a smaller batch with --set loop.batch=N"
            )
        # [documents + 1]: the number of each document's first segment.
        self._first = np.concatenate([[0], -(-self._lengths // context)]).cumsum(dtype=np.int64)

    @property
    def epoch(self) -> float:
        return self.cursor.tokens / self.tokens_per_epoch

    @property
    def tokens(self) -> int:
        return self.cursor.tokens

    def batches_per_epoch(self) -> float:
        if not self.whole:
            return self.tokens_per_epoch / self.tokens_per_batch
        # How much padding there is depends on the order. So the plans of the first epoch are counted, without reading
        # any data, and the batches that lie wholly within it are scaled to all tokens.
        first = takewhile(lambda cursor: cursor.epoch == 0, (cursor for _, cursor in self._plans(Cursor())))
        last = max(first, key=lambda cursor: cursor.batches, default=Cursor(batches=1, tokens=self.tokens_per_batch))
        return last.batches * self.tokens_per_epoch / last.tokens

    def identity(self) -> dict[str, Any]:
        return {"data": self.source.fingerprint, "context": self.context, "seed": self.seed, "shuffle": self.shuffle}

    def state_dict(self) -> dict[str, Any]:
        """Return the cursor, JSON-able and the same on every process."""
        return {**vars(self.cursor), **self.identity()}

    def cursor_of(self, state: dict[str, Any]) -> Cursor:
        return Cursor(**{key: state[key] for key in vars(Cursor())})

    def batches(self, cursor: Cursor) -> Iterator[tuple[Batch, Cursor]]:
        return ((self._read(self._own(plan)), after) for plan, after in self._plans(cursor))

    def _own(self, plan: list[Part]) -> list[Part]:
        """Return the segments of a batch that this process reads: those that begin in its equal part of the tokens.

        A batch is cut only between segments, so no segment depends on the number of processes.
        """
        *starts, total = accumulate((length for _, _, length in plan), initial=0)
        rank, count = self.processes.rank, self.processes.count
        return [part for part, start in zip(plan, starts, strict=True) if start * count // total == rank]

    def _plans(self, cursor: Cursor) -> Iterator[tuple[list[Part], Cursor]]:
        """Yield the segments of every batch, and the cursor after it."""
        plan: list[Part] = []
        room = self.tokens_per_batch

        def finish(epoch: int, position: int, offset: int) -> tuple[list[Part], Cursor]:
            nonlocal cursor, plan, room
            tokens = cursor.tokens + self.tokens_per_batch - room
            cursor = Cursor(epoch, position, offset, cursor.batches + 1, tokens)
            finished, plan, room = plan, [], self.tokens_per_batch
            return finished, cursor

        for epoch, position, offset, (document, start, length) in self.segments(cursor):
            if self.whole and length > room:
                yield finish(epoch, position, 0)
            while offset < length:
                taken = min(length - offset, room)
                plan.append((document, start + offset, taken))
                offset, room = offset + taken, room - taken
                place = (epoch, position, offset) if offset < length else (epoch, position + 1, 0)
                if not room:
                    yield finish(*place)

    def segments(self, cursor: Cursor) -> Iterator[tuple[int, int, int, Part]]:
        """Yield epoch, position, offset and segment from the cursor on. The offset is 0 except for the first one."""
        count = int(self._first[-1])
        epoch, position, offset = cursor.epoch, cursor.position, cursor.offset
        while True:
            order = Permutation(count, self.seed, epoch) if self.shuffle else np.asarray
            for begin in range(position, count, LOOKAHEAD):
                numbers = order(np.arange(begin, min(begin + LOOKAHEAD, count)))
                documents = np.searchsorted(self._first, numbers, "right") - 1
                starts = (numbers - self._first[documents]) * self.context
                lengths = np.minimum(self.context, self._lengths[documents] - starts)
                parts = zip(documents.tolist(), starts.tolist(), lengths.tolist(), strict=True)
                for at, part in enumerate(parts, begin):
                    yield epoch, at, offset, part
                    offset = 0
            epoch, position = epoch + 1, 0

    def _read(self, plan: list[Part]) -> Batch:
        """Read the batch of these segments, and add padding where it is needed."""
        sequences = [self.source.read(*part) for part in plan]
        room = int(not plan)  # where a batch has fewer segments than there are processes
        if self.whole and self.processes.count == 1:
            # A compiled model runs best on batches of one size. The padding is shorter than the next document.
            room = self.tokens_per_batch - sum(length for _, _, length in plan)
        if room:
            sequences.append((np.zeros(room, np.int64), np.full(room, IGNORE_INDEX)))
        return pack(sequences, self.context)
