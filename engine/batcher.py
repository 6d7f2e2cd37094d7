"""Continuous batching: requests join and leave a running batch at any step, and none notices the others.

A fixed number of slots of the KV cache. Those in use lie together at the front, first the sequences that produce
tokens, then those whose prompts are still being read: a pass works on a slice. A step moves every producing sequence on
by one token and reads one chunk of prompts, so that a long prompt stalls nobody for longer than its chunk.
"""

import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.cache import KVCache
from engine.errors import InputError
from engine.model import GPT
from engine.runtime import inference
from engine.sampling import Sampling, choose, make_generator


class QueueFullError(Exception):
    """No room for one more request: try again later."""


@dataclass(frozen=True)
class Request:
    """Continue `prompt` (token ids) by at most `max_tokens`, or until one of `stop_ids`, which is the last token given.

    `top_logprobs` asks for log-probabilities, and says how many of the likeliest tokens to name at every step.
    """

    prompt: Sequence[int]
    sampling: Sampling
    max_tokens: int
    stop_ids: frozenset[int] = frozenset()
    top_logprobs: int | None = None


@dataclass(frozen=True)
class Step:
    """One more token of a request. `finish` is None while it goes on, then "stop" or "length".

    logprob, and top (token and log-probability, likeliest first), are the model's own at temperature 1, in nats.
    """

    request: int
    token: int
    finish: str | None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass
class Running:
    number: int
    request: Request
    generator: torch.Generator
    read: int = 0  # tokens of the prompt that are in the cache
    produced: int = 0
    last: int = -1  # the token produced last: the next pass reads it
    seen: Tensor | None = None  # bool [V], for a repetition penalty

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return self.read + max(self.produced - 1, 0)


class Batcher:
    """One thread calls it: a server hands requests over through a queue of its own."""

    def __init__(self, model: GPT, *, slots: int = 32, queue: int = 1024, chunk: int = 256) -> None:
        """`queue` bounds how many requests may wait; `chunk` how many tokens of prompts a step reads."""
        self.model, self.queue, self.chunk = model, queue, min(chunk, model.config.context)
        weight = model.embedding.weight
        # A short prompt read beside a long one is padded to its width: room for what nobody will look at.
        capacity = model.config.context + self.chunk
        dtype = model.compute_dtype or weight.dtype
        self.cache = KVCache(model.config, slots, capacity, device=weight.device, dtype=dtype)
        self.slots, self.device = slots, weight.device
        self.waiting: deque[Running] = deque()
        self.running: list[Running] = []  # by slot
        self.producing = 0  # how many of them, from the front, have read their prompts
        self.numbers = itertools.count()

    def submit(self, request: Request) -> int:
        """The number that its steps carry. Raises InputError for a prompt that does not fit, QueueFullError."""
        context = self.model.config.context
        if not request.prompt:
            raise InputError("the prompt is empty; begin it with the end-of-document piece")
        if len(request.prompt) >= context:
            raise InputError(
                f"the prompt has {len(request.prompt)} tokens; this model's context holds {context}, answer included"
            )
        if request.max_tokens < 1:
            raise InputError(f"max_tokens is {request.max_tokens}; it must be at least 1")
        if len(self.waiting) >= self.queue:
            raise QueueFullError(f"{self.queue} requests are waiting already")
        entry = Running(next(self.numbers), request, make_generator(request.sampling.seed))
        self.waiting.append(entry)
        return entry.number

    def cancel(self, number: int) -> None:
        """Forget a request; the next step may use its slot. A number that is not there any more is ignored."""
        self.waiting = deque(each for each in self.waiting if each.number != number)
        self._free({number})

    @property
    def idle(self) -> bool:
        return not (self.waiting or self.running)

    def step(self) -> list[Step]:
        """One token for every producing sequence, one chunk of prompts: what came of it, in the order of the slots."""
        while self.waiting and len(self.running) < self.slots:
            self.cache.lengths[len(self.running)] = 0
            self.running.append(self.waiting.popleft())
        with inference(self.model):
            steps = self._produce() if self.producing else []
            if self.producing < len(self.running):
                steps += self._read()
        self._free({step.request for step in steps if step.finish})
        return steps

    def _produce(self) -> list[Step]:
        chosen = self.running[: self.producing]
        tokens = torch.tensor([[each.last] for each in chosen])
        hidden = self._pass(tokens, 0, torch.ones(len(chosen), dtype=torch.int64))
        return self._choose(hidden[:, -1], chosen)

    def _read(self) -> list[Step]:
        first, rows, width = self.producing, 0, 0
        # Side by side, as many as fit: what is padded to the width of the longest counts too.
        for each in self.running[first:]:
            wider = max(width, min(len(each.request.prompt) - each.read, self.chunk))
            if rows and (rows + 1) * wider > self.chunk:
                break
            rows, width = rows + 1, wider
        chosen = self.running[first : first + rows]
        pieces = [torch.tensor(each.request.prompt[each.read : each.read + width]) for each in chosen]
        new = torch.tensor([len(piece) for piece in pieces])
        hidden = self._pass(torch.nn.utils.rnn.pad_sequence(pieces, batch_first=True), first, new)
        done = []
        for row, (each, piece) in enumerate(zip(chosen, pieces, strict=True)):
            each.read += len(piece)
            if each.read == len(each.request.prompt):
                done.append(row)
                # They now stand behind the others that produce.
                self._swap(first + row, self.producing)
                self.producing += 1
        return self._choose(hidden[done, new[done] - 1], [chosen[row] for row in done]) if done else []

    def _pass(self, tokens: Tensor, first: int, new: Tensor) -> Tensor:
        """Hidden states of `tokens`, of which `new` of each row are real, in the slots from `first` on."""
        rows, width = tokens.shape
        longest = max(each.length for each in self.running[first : first + rows])
        view = self.cache.view(first, rows, longest + width)
        hidden = self.model(tokens.to(self.device), cache=view)
        view.lengths += new.to(self.device)
        return hidden

    def _choose(self, hidden: Tensor, chosen: Sequence[Running]) -> list[Step]:
        logits = self.model.logits(hidden)
        tokens = torch.empty(len(chosen), dtype=torch.int64, device=logits.device)
        # Rows that sample alike are sampled together; each draws from a generator of its own all the same.
        groups: dict[Sampling, list[int]] = {}
        for row, each in enumerate(chosen):
            groups.setdefault(replace(each.request.sampling, seed=None), []).append(row)
        for sampling, rows in groups.items():
            mine = logits if len(rows) == len(chosen) else logits[rows]
            seen = None
            if sampling.repetition_penalty != 1:
                seen = torch.stack([self._seen(chosen[row]) for row in rows])
            tokens[rows] = choose(mine, sampling, [chosen[row].generator for row in rows], seen)
        return [
            self._advance(each, token, logits[row])
            for row, (each, token) in enumerate(zip(chosen, tokens.tolist(), strict=True))
        ]

    def _seen(self, each: Running) -> Tensor:
        if each.seen is None:
            each.seen = torch.zeros(self.model.config.vocab_size, dtype=torch.bool, device=self.device)
            each.seen[torch.tensor(each.request.prompt, device=self.device)] = True
        if each.last >= 0:
            each.seen[each.last] = True
        return each.seen

    def _advance(self, each: Running, token: int, logits_V: Tensor) -> Step:
        each.last, each.produced = token, each.produced + 1
        full = len(each.request.prompt) + each.produced >= self.model.config.context
        length = full or each.produced == each.request.max_tokens
        finish = "stop" if token in each.request.stop_ids else "length" if length else None
        if each.request.top_logprobs is None:
            return Step(each.number, token, finish)
        logprobs = logits_V.log_softmax(-1)
        values, ids = logprobs.topk(each.request.top_logprobs)
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        return Step(each.number, token, finish, float(logprobs[token]), top)

    def _free(self, numbers: set[int]) -> None:
        for slot in reversed(range(len(self.running))):
            if self.running[slot].number not in numbers:
                continue
            if slot < self.producing:
                self.producing -= 1
                self._swap(slot, self.producing)
                slot = self.producing
            self._swap(slot, len(self.running) - 1)
            self.running.pop()

    def _swap(self, one: int, other: int) -> None:
        if one != other:
            self.cache.swap(one, other, max(self.running[one].length, self.running[other].length))
            self.running[one], self.running[other] = self.running[other], self.running[one]
