"""Continuous batching: requests join and leave a running batch at any step, and none notices the others.

A fixed number of slots of the KV cache. Those in use lie together at the front, first the sequences that produce
tokens, then those whose prompts are still being read: a pass works on a slice. A step moves every producing sequence on
by one token and reads one chunk of prompts, so that a long prompt stalls nobody for longer than its chunk.

On a GPU the tokens stay there: the next step is under way before the host has read what the last one chose.
"""

import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from engine.cache import KVCache
from engine.cpu_decode import CpuDecoder
from engine.errors import InputError
from engine.graphs import DecodeGraphs
from engine.model import GPT
from engine.runtime import ToHost, inference
from engine.sampling import Sampling, choose, make_generator
from kernels.backend import backend


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


class Step(NamedTuple):
    """One more token of a request. `finish` is None while it goes on, then "stop" or "length".

    logprob, and top (token and log-probability, likeliest first), are the model's own at temperature 1, in nats.
    """

    request: int
    token: int
    finish: str | None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def read_prompt(model: GPT, prompt: Sequence[int], top_logprobs: int) -> list[Step]:
    """The tokens of a prompt as if they had been chosen: log-probability and the likeliest. The first has neither."""
    ids = torch.tensor(prompt, device=model.embedding.weight.device)
    steps = [Step(-1, prompt[0], None)]
    if len(ids) == 1:
        return steps
    with inference(model):
        logprobs = model.logits(model(ids[None, :-1]))[0].log_softmax(-1)
        own = logprobs.gather(-1, ids[1:, None])[:, 0].tolist()
        values, likeliest = (each.tolist() for each in logprobs.topk(top_logprobs))
    for token, logprob, *top in zip(prompt[1:], own, likeliest, values, strict=True):
        steps.append(Step(-1, token, None, logprob, tuple(zip(*top, strict=True))))
    return steps


@dataclass(eq=False)
class Running:
    number: int
    request: Request
    most: int  # tokens to produce, of max_tokens as many as the context has room for
    group: Sampling  # who has the same is sampled together
    generator: torch.Generator
    read: int = 0  # tokens of the prompt that are in the cache
    produced: int = 0
    given: int = 0  # of those, how many the host has read
    over: bool = False  # stopped or cancelled: what is still under way is for nobody
    seen: Tensor | None = None  # bool [V], for a repetition penalty

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return self.read + max(self.produced - 1, 0)


class Chosen(NamedTuple):
    """The next token of each of these, on its way to the host."""

    rows: list[Running]
    tokens: ToHost
    logprobs: ToHost | None  # of those who ask: [rows, 1 + k], the token's own first
    likeliest: ToHost | None  # [rows, k]


class Batcher:
    """One thread calls it: a server hands requests over through a queue of its own."""

    def __init__(
        self,
        model: GPT,
        *,
        slots: int = 32,
        queue: int = 1024,
        chunk: int = 256,
        ahead: bool | None = None,
        graphs: bool | None = None,
    ) -> None:
        """`queue` bounds how many requests may wait; `chunk` how many tokens of prompts a step reads.

        ahead: a step returns what the step before it chose, and the host works while the device does. graphs: a CUDA
        graph for each size of batch. Both are for a GPU, where they are the default.
        """
        self.model, self.queue, self.chunk = model, queue, chunk
        # How much of one prompt a step reads.
        self.width = min(chunk, model.config.context)
        weight = model.embedding.weight
        # A short prompt read beside a long one is padded to its width: room for what nobody will look at.
        capacity = model.config.context + self.width
        dtype = model.compute_dtype or weight.dtype
        self.cache = KVCache(model.config, slots, capacity, device=weight.device, dtype=dtype)
        self.slots, self.device = slots, weight.device
        self.ahead = self.device.type == "cuda" if ahead is None else ahead
        self.last = torch.zeros(slots, dtype=torch.int64, device=self.device)  # each slot's newest token
        self.decoder: DecodeGraphs | CpuDecoder | None = None
        if self.device.type == "cuda" and backend(self.device) == "triton" if graphs is None else graphs:
            self.decoder = DecodeGraphs(model, self.cache, self.last)
        elif CpuDecoder.knows(model):
            self.decoder = CpuDecoder(model, self.cache, self.last)
        elif model.decode_int8:
            raise InputError("int8 is not there for a model with biases, parallel residual or partial rotary positions")
        self.waiting: deque[Running] = deque()
        self.running: list[Running] = []  # by slot
        self.producing = 0  # how many of them, from the front, have read their prompts
        self.under_way: list[Chosen] = []
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
        most = min(request.max_tokens, context - len(request.prompt))
        sampling = request.sampling
        group, generator = replace(sampling, seed=None), make_generator(sampling.seed)
        entry = Running(next(self.numbers), request, most, group, generator)
        self.waiting.append(entry)
        return entry.number

    def cancel(self, number: int) -> None:
        """Forget a request; the next step may use its slot. A number that is not there any more is ignored."""
        self.waiting = deque(each for each in self.waiting if each.number != number)
        for each in [*self.running, *(each for chosen in self.under_way for each in chosen.rows)]:
            each.over |= each.number == number
        self._free()

    @property
    def idle(self) -> bool:
        return not (self.waiting or self.running or self.under_way)

    def step(self) -> list[Step]:
        """One token for every producing sequence, one chunk of prompts: what came of it, in the order of the slots."""
        while self.waiting and len(self.running) < self.slots:
            self.cache.lengths[len(self.running)] = 0
            self.running.append(self.waiting.popleft())
        with inference(self.model):
            chosen = [self._produce()] if self.producing else []
            if self.producing < len(self.running):
                chosen += self._read()
        self._free()
        if self.ahead:
            chosen, self.under_way = self.under_way, chosen
        steps = [step for each in chosen for step in self._arrived(each)]
        self._free()
        return steps

    def _produce(self) -> Chosen:
        rows = self.producing
        if self.decoder:
            logits = self.decoder.logits(rows)
            self.cache.lengths[:rows] += 1
        else:
            logits = self.model.logits(self._pass(self.last[:rows, None], 0, 1)[:, -1])
        return self._choose(logits, 0, self.running[:rows])

    def _read(self) -> list[Chosen]:
        first, rows, width = self.producing, 0, 0
        # Side by side, as many as fit: what is padded to the width of the longest counts too.
        for each in self.running[first:]:
            wider = max(width, min(len(each.request.prompt) - each.read, self.width))
            if rows and (rows + 1) * wider > self.chunk:
                break
            rows, width = rows + 1, wider
        chosen = self.running[first : first + rows]
        pieces = [torch.tensor(each.request.prompt[each.read : each.read + width]) for each in chosen]
        new = torch.tensor([len(piece) for piece in pieces])
        tokens = torch.nn.utils.rnn.pad_sequence(pieces, batch_first=True)
        hidden = self._pass(tokens.to(self.device), first, new.to(self.device))
        done = []
        for row, (each, piece) in enumerate(zip(chosen, pieces, strict=True)):
            each.read += len(piece)
            if each.read == len(each.request.prompt):
                done.append(row)
                # They now stand behind the others that produce.
                self._swap(first + row, self.producing)
                self.producing += 1
        if not done:
            return []
        logits = self.model.logits(hidden[done, new[done] - 1])
        return [self._choose(logits, first, [chosen[row] for row in done])]

    def _pass(self, tokens: Tensor, first: int, new: Tensor | int) -> Tensor:
        """Hidden states of `tokens`, of which `new` of each row are real, in the slots from `first` on."""
        rows, width = tokens.shape
        longest = max(each.length for each in self.running[first : first + rows])
        view = self.cache.view(first, rows, longest + width)
        hidden = self.model(tokens, cache=view)
        view.lengths += new
        return hidden

    def _choose(self, logits: Tensor, first: int, chosen: list[Running]) -> Chosen:
        """Choose a token for each of these, which stand in the slots from `first` on."""
        tokens = self.last[first : first + len(chosen)]
        groups: dict[Sampling, list[int]] = {}
        for row, each in enumerate(chosen):
            groups.setdefault(each.group, []).append(row)
        for sampling, rows in groups.items():
            everyone = len(rows) == len(chosen)
            generators = [chosen[row].generator for row in rows]
            seen = None
            if sampling.repetition_penalty != 1:
                seen = torch.stack([self._seen(chosen[row], first + row) for row in rows])
            picked = choose(logits if everyone else logits[rows], sampling, generators, seen)
            if everyone:
                tokens.copy_(picked)
            else:
                tokens[rows] = picked
        for each in chosen:
            each.produced += 1
        asking = [row for row, each in enumerate(chosen) if each.request.top_logprobs is not None]
        if not asking:
            return Chosen(chosen, ToHost(tokens), None, None)
        logprobs = logits.log_softmax(-1)
        values, likeliest = logprobs.topk(max(chosen[row].request.top_logprobs or 0 for row in asking))
        own = logprobs.gather(-1, tokens[:, None])
        return Chosen(chosen, ToHost(tokens), ToHost(torch.cat((own, values), dim=-1)), ToHost(likeliest))

    def _seen(self, each: Running, slot: int) -> Tensor:
        if each.seen is None:
            each.seen = torch.zeros(self.model.config.vocab_size, dtype=torch.bool, device=self.device)
            each.seen[torch.tensor(each.request.prompt, device=self.device)] = True
        if each.produced:
            each.seen.index_fill_(0, self.last[slot : slot + 1], True)
        return each.seen

    def _arrived(self, chosen: Chosen) -> list[Step]:
        steps = []
        tokens = chosen.tokens.read().tolist()
        logprobs = chosen.logprobs.read().tolist() if chosen.logprobs else []
        likeliest = chosen.likeliest.read().tolist() if chosen.likeliest else []
        for row, (each, token) in enumerate(zip(chosen.rows, tokens, strict=True)):
            if each.over:
                continue
            each.given += 1
            finish = "stop" if token in each.request.stop_ids else "length" if each.given == each.most else None
            each.over = finish is not None
            asked = each.request.top_logprobs
            if asked is None:
                steps.append(Step(each.number, token, finish))
            else:
                top = tuple(zip(likeliest[row][:asked], logprobs[row][1:], strict=False))
                steps.append(Step(each.number, token, finish, logprobs[row][0], top))
        return steps

    def _free(self) -> None:
        """Give back the slots of those that are over, or have no more to produce."""
        for slot in reversed(range(len(self.running))):
            each = self.running[slot]
            if not each.over and each.produced < each.most:
                continue
            if slot < self.producing:
                self.producing -= 1
                self._move(self.producing, slot)
                slot = self.producing
            self._move(len(self.running) - 1, slot)
            self.running.pop()

    def _move(self, source: int, target: int) -> None:
        """Into a slot that nobody wants any more."""
        if source != target:
            self.cache.copy(source, target, self.running[source].length)
            self.last[target] = self.last[source]
            self.running[target] = self.running[source]

    def _swap(self, one: int, other: int) -> None:
        if one != other:
            self.cache.swap(one, other, max(self.running[one].length, self.running[other].length))
            self.last[[one, other]] = self.last[[other, one]]
            self.running[one], self.running[other] = self.running[other], self.running[one]
