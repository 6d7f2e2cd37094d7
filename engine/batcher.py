"""Continuous batching: requests join and leave a running batch at any step, and none changes what another gets.

The KV cache has a fixed number of slots, one for each running request. Those in use lie together at the front, first
the sequences that produce tokens, then those whose prompts are still being read: so a pass works on a slice of the
cache, without a gap. When one ends, others are moved into its place.

A step that raises an exception costs one request, not all of them: see `Batcher.recover`.

A step moves every producing sequence on by one token and reads one chunk of prompts, so that a long prompt stalls
nobody for longer than its chunk. On a GPU the tokens stay there: the next step is under way before the host has read
what the last one chose. On a CPU a step is one call (engine/native.py), and where nobody waits it makes several tokens.
"""

import itertools
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Self

import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.decoders import Ending, Reading, make_decoder
from engine.errors import InputError
from engine.model import GPT, KVCache, NoRoomError, swap_rows
from engine.runtime import ToHost, inference
from engine.sampling import Past, Sampling, begin_past, choose, make_generator
from kernels import cpu

# A native step goes on for at most so many tokens, or seconds: what is new meanwhile waits for its end.
MOST_TURNS, MOST_SECONDS = 16, 0.004
# It reads at most so many tokens of prompts: with more, what it writes between two products leaves the cache of a core.
MOST_READ = 512
# When too many at once were too much, a step that goes well makes room for this many more of them.
ROOM_REGAINED = 1 / 64


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
    """One more token of a request. `finish` is None while it goes on, then "stop" or "length"; "error" has no token.

    logprob, and top (token and log-probability, likeliest first), are the model's own, in nats: at temperature 1,
    without penalties and biases.
    """

    request: int
    token: int
    finish: str | None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def read_prompt(model: GPT, prompt: Sequence[int], top_logprobs: int) -> list[Step]:
    """Return a prompt's tokens as if they had been chosen: log-probability and the likeliest. The first has neither."""
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


@dataclass(eq=False, slots=True)
class Running:
    """A request, waiting or in a slot, and how far it has come."""

    number: int
    request: Request
    most: int  # tokens to produce: of max_tokens as many as the context has room for
    group: Sampling  # the sampling without its seed: who has the same is sampled together
    generator: torch.Generator
    read: int = 0  # tokens of the prompt that are in the cache
    produced: int = 0
    tokens: list[int] = field(default_factory=list)  # of the produced tokens those that the host has read
    drawn: int = 0  # tokens that it had chosen before: they end its prompt, and its generator gave a number for each
    over: bool = False  # stopped or cancelled: tokens that are still under way are dropped
    past: Past | None = None  # where its sampling changes logits
    slot: int = -1  # of a native cache, in which nothing moves

    @property
    def length(self) -> int:
        """Tokens in the cache. The newest one produced is not in it yet."""
        return self.read + max(self.produced - 1, 0)

    def anew(self) -> "Running":
        """Return the rest of it as a request that has not begun: the tokens that it has got end its prompt."""
        drawn, generator = self.drawn + len(self.tokens), make_generator(self.generator.initial_seed())
        for _ in range(drawn):
            torch.rand(1, generator=generator)
        request = replace(self.request, prompt=[*self.request.prompt, *self.tokens])
        return Running(self.number, request, self.most - len(self.tokens), self.group, generator, drawn=drawn)


Arriving = ToHost | Tensor | NDArray[Any]


class Chosen(NamedTuple):
    """The next tokens of some sequences, on a GPU on their way to the host."""

    rows: list[Running]
    tokens: Arriving
    logprobs: Arriving | None = None  # [rows, 1 + k], the token's own first, then the k likeliest
    likeliest: Arriving | None = None  # [rows, k]


class Batcher:
    """It runs requests on a model. Only one thread may call it: a server has a queue of its own before it."""

    def __init__(
        self,
        model: GPT,
        *,
        slots: int = 32,
        queue: int = 1024,
        chunk: int = 256,
        capacity: int | None = None,
        ahead: bool | None = None,
        graphs: bool | None = None,
    ) -> None:
        """Make a batcher. At most `queue` requests wait, and a step reads at most `chunk` tokens of prompts.

        A text holds at most `capacity` tokens, by default the model's context.
        With `ahead` a step returns what the step before it chose, and the host works while the device does; with
        `graphs` each size of batch has a CUDA graph. Both are for a GPU, where they are the default.
        """
        self.model, self.slots, self.queue, self.chunk = model, slots, queue, chunk
        self.capacity = capacity or model.config.context
        weight = model.embedding.weight
        self.device, dtype = weight.device, model.compute_dtype or weight.dtype
        self.native = None
        why = cpu.why_not(self.device, dtype)
        if why is None and (ahead or graphs):
            why = "a native step runs neither ahead nor as a graph"
        if why is not None and model.decode_int8:
            raise InputError(f"--precision int8 cannot be used: {why}")
        if why is None:
            from engine.native import NativeDecoder  # and with it Numba, where it is used

            self.chunk = min(chunk, MOST_READ)
            self.native = NativeDecoder(model, slots, self.chunk, MOST_TURNS, self.capacity)
        self.turn_seconds = MOST_SECONDS  # what a token of all running sequences took last
        if self.native is None:
            # How much of one prompt a step reads at most.
            self.width = min(chunk, self.capacity)
            # A short prompt that is read beside a long one is padded to its width, and the padding is written as well.
            room = self.capacity + self.width
            self.cache = KVCache(model.config, slots, room, device=self.device, dtype=dtype)
            self.last = torch.zeros(slots, dtype=torch.int64, device=self.device)  # each slot's newest token
            self.decoder = make_decoder(model, self.cache, self.last, graphs=graphs)
        self.free_slots = list(range(slots))
        self.ahead = self.device.type == "cuda" if ahead is None else ahead
        self.waiting: deque[Running] = deque()
        self.running: list[Running] = []  # by slot
        self.producing = 0  # how many of them, from the front, have read their prompts
        self.ended = False  # whether some of them are over, or have no more to produce
        self.under_way: list[Chosen] = []
        self.found: list[Step] = []  # what the present step has to return
        self.suspects: deque[Running] = deque()  # each runs alone for a token, as one of them made a step fail
        self.room = float(slots)  # how many may run at once
        self.numbers = itertools.count()

    @classmethod
    def fitting(cls, model: GPT, slots: int, queue: int, capacity: int | None = None) -> Self:
        """Return one of so many slots, or of as many as half of the memory has room for: a long context takes much."""
        try:
            return cls(model, slots=slots, queue=queue, capacity=capacity)
        except NoRoomError as error:
            if error.most < 1:
                raise
            return cls(model, slots=max(1, error.most // 2), queue=queue, capacity=capacity)

    def submit(self, request: Request) -> int:
        """Return the number that its steps carry. Raises InputError for a prompt that does not fit, QueueFullError."""
        if not request.prompt:
            raise InputError("the prompt is empty; begin it with the end-of-document token")
        if request.max_tokens < 1:
            raise InputError(f"max_tokens is {request.max_tokens}; it must be at least 1")
        if (tokens := len(request.prompt)) >= self.capacity:
            whose = "this model's context" if self.capacity == self.model.config.context else "its cache"
            raise InputError(f"the prompt has {tokens} tokens; {whose} holds {self.capacity}, answer included")
        vocab = self.model.config.vocab_size
        if beyond := [token for token, _ in request.sampling.logit_bias if not 0 <= token < vocab]:
            raise InputError(f"logit_bias names token {beyond[0]}; this model's tokens are 0 to {vocab - 1}")
        if len(self.waiting) >= self.queue:
            raise QueueFullError(f"{self.queue} requests are waiting already")
        most = min(request.max_tokens, self.capacity - len(request.prompt))
        group, generator = replace(request.sampling, seed=None), make_generator(request.sampling.seed)
        entry = Running(next(self.numbers), request, most, group, generator)
        self.waiting.append(entry)
        return entry.number

    def cancel(self, number: int) -> None:
        """Forget a request; the next step may use its slot. A number that is not there any more is ignored."""
        self.waiting, self.suspects = (
            deque(each for each in line if each.number != number) for line in (self.waiting, self.suspects)
        )
        for each in [*self.running, *(each for chosen in self.under_way for each in chosen.rows)]:
            each.over |= each.number == number
        self.ended = True
        self._free()

    @property
    def idle(self) -> bool:
        return not (self.waiting or self.running or self.under_way or self.suspects)

    def step(self) -> list[Step]:
        """Produce a token for every producing sequence, or some, and read one chunk of prompts. Return the tokens."""
        self._admit()
        if self.native is not None:
            chosen = self._step_natively() if self.running else []
        else:
            with inference(self.model):
                chosen = [self._produce()] if self.producing else []
                if self.producing < len(self.running):
                    chosen += self._read()
        self._free()
        if self.ahead:
            chosen, self.under_way = self.under_way, chosen
        for each in chosen:
            self.found += self._arrived(each)
        self._free()
        if self.suspects and any(each.tokens for each in self.running):
            self.waiting.extendleft(each.anew() for each in self.running)
            self._clear()
        self.room = min(self.room + ROOM_REGAINED, self.slots)
        found, self.found = self.found, []
        return found

    def recover(self) -> list[Step]:
        """Call it when `step` or `cancel` has raised an exception. It returns the steps that the exception held back.

        A step is a batch: its exception does not say which request it comes from, and has left the cache in some state
        between two steps. So each that was running begins anew, from its prompt and the tokens that it has got, and is
        alone until it has one more. Who fails alone ends with a step that says "error". If nobody does, as when memory
        is short, fewer run at once from then on. Raises what `probe` raises.
        """
        self.probe()
        begun = [*self.running, *(each for chosen in self.under_way for each in chosen.rows)]
        running = {each.number: each for each in begun if not each.over}
        found, self.found = self.found, []
        self._clear()
        if len(running) == 1:
            self.room = self.slots
            return [*found, Step(next(iter(running)), -1, "error")]
        self.room = max(1, len(running) // 2)
        self.suspects.extend(each.anew() for each in running.values())
        return found

    def probe(self) -> None:
        """Raise the device's exception where it computes nothing any more."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        with inference(self.model):
            self.model(torch.zeros((1, 1), dtype=torch.int64, device=self.device)).cpu()

    def _clear(self) -> None:
        self.running, self.under_way, self.producing = [], [], 0
        self.free_slots = list(range(self.slots))

    def _admit(self) -> None:
        if self.suspects:
            line, room = self.suspects, 0 if self.under_way else 1
        else:
            line, room = self.waiting, int(self.room)
        while line and len(self.running) < room:
            if self.native is None:
                self.cache.lengths[len(self.running)] = 0
            else:
                line[0].slot = self.free_slots.pop()
            self.running.append(line.popleft())

    def _step_natively(self) -> list[Chosen]:
        """Do all in one call. Prompts that are now read to their ends stand behind the sequences that produce."""
        native, reading, ended, room = self.native, [], [], self.chunk
        assert native is not None
        for each in self.running[self.producing :]:
            if room == 0:
                break
            part = each.request.prompt[each.read : each.read + room]
            last = each.read + len(part) == len(each.request.prompt)
            ending = None
            if last:
                ended.append(each)
                ask = each.request
                asked = ask.top_logprobs is not None
                ending = Ending(ask.prompt, ask.sampling, each.generator, ask.stop_ids, asked, each.drawn)
            reading.append(Reading(part, each.slot, each.read, ending))
            each.read, room = each.read + len(part), room - len(part)
        chosen = [*self.running[: self.producing], *ended]
        asking = max([each.request.top_logprobs or 0 for each in chosen], default=0)
        turns, left = 1, min([each.most - each.produced for each in chosen], default=MOST_TURNS)
        if not (reading or asking or self.suspects):
            turns = max(1, min(left, MOST_TURNS, int(MOST_SECONDS / self.turn_seconds)))
        native.draw([each.generator for each in chosen[: self.producing]], turns)
        begin = time.perf_counter()
        tokens, logprobs = native.step(self.producing, reading, turns)
        self.turn_seconds = (time.perf_counter() - begin) / len(tokens)
        if ended:
            others = [each for each in self.running[self.producing :] if each not in ended]
            self.running = chosen + others
            self.producing = len(chosen)
        self.ended |= len(tokens) >= left
        for each in chosen:
            each.produced += len(tokens)
        if asking:
            likeliest = _likeliest(native.scores(len(chosen)), torch.from_numpy(tokens[0]), asking)
            return [Chosen(chosen, tokens[0], *likeliest)]
        return [Chosen(chosen, tokens[turn], logprobs[turn][:, None]) for turn in range(len(tokens))]

    def _produce(self) -> Chosen:
        chosen = self.running[: self.producing]
        logits = self.decoder.logits(len(chosen), max(each.length for each in chosen) + 1)
        self.cache.lengths[: len(chosen)] += 1
        return self._choose(logits, 0, chosen)

    def _read(self) -> list[Chosen]:
        """Read a chunk of prompts: a part of one long prompt, or as many short ones as fit side by side.

        They are padded at their ends to one width, and the padding counts. It does no harm: a sequence's length covers
        only its own tokens, and the next ones are written over the padding. Prompts that are now read to their ends get
        their first token, and stand from then on behind the sequences that produce.
        """
        first, rows, width = self.producing, 0, 0
        for each in self.running[first:]:
            wider = max(width, min(len(each.request.prompt) - each.read, self.width))
            if rows and (rows + 1) * wider > self.chunk:
                break
            rows, width = rows + 1, wider
        chosen = self.running[first : first + rows]
        parts = [torch.tensor(each.request.prompt[each.read : each.read + width]) for each in chosen]
        new = torch.tensor([len(part) for part in parts])
        tokens = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
        view = self.cache.view(first, rows, max(each.read for each in chosen) + width)
        hidden = self.model(tokens.to(self.device), cache=view)
        view.lengths += new.to(self.device)
        done = []
        for row, (each, part) in enumerate(zip(chosen, parts, strict=True)):
            each.read += len(part)
            if each.read == len(each.request.prompt):
                done.append(row)
                self._swap(first + row, self.producing)
                self.producing += 1
        if not done:
            return []
        logits = self.model.logits(hidden[done, new[done] - 1])
        return [self._choose(logits, first, [chosen[row] for row in done])]

    def _choose(self, logits: Tensor, first: int, chosen: list[Running]) -> Chosen:
        """Choose a token for each of these, which stand in the slots from `first` on."""
        tokens = self.last[first : first + len(chosen)]
        groups: dict[Sampling, list[int]] = {}
        for row, each in enumerate(chosen):
            groups.setdefault(each.group, []).append(row)
        for sampling, rows in groups.items():
            past = None
            if sampling.changes_logits:
                pasts = [self._past(chosen[row], first + row) for row in rows]
                past = Past(*map(torch.stack, zip(*pasts, strict=True)))
            everyone = len(rows) == len(chosen)
            generators = [chosen[row].generator for row in rows]
            picked = choose(logits if everyone else logits[rows], sampling, generators, past)
            tokens[slice(None) if everyone else rows] = picked
        for each in chosen:
            each.produced += 1
            self.ended |= each.produced == each.most
        asking = [each.request.top_logprobs for each in chosen if each.request.top_logprobs is not None]
        if not asking:
            return Chosen(chosen, ToHost(tokens))
        return Chosen(chosen, ToHost(tokens), *map(ToHost, _likeliest(logits, tokens, max(asking))))

    def _past(self, each: Running, slot: int) -> Past:
        """Return the past of its text: that of the prompt, and every new token. Call it once for each."""
        if each.past is None:
            past = begin_past(each.group, each.request.prompt, self.model.config.vocab_size, each.drawn)
            each.past = Past(*(table.to(self.device) for table in past))
        if each.produced:
            each.past.note(self.last[slot : slot + 1], each.group)
        return each.past

    def _arrived(self, chosen: Chosen) -> list[Step]:
        steps = []
        tokens, logprobs, likeliest = ([] if each is None else each.tolist() for each in chosen[1:])
        for row, (each, token) in enumerate(zip(chosen.rows, tokens, strict=True)):
            if each.over:
                continue
            request, finish, logprob = each.request, None, None
            top: tuple[tuple[int, float], ...] = ()
            each.tokens.append(token)
            if token in request.stop_ids or len(each.tokens) == each.most:
                finish = "stop" if token in request.stop_ids else "length"
                each.over = self.ended = True
            if (asked := request.top_logprobs) is not None:
                logprob = logprobs[row][0]
                top = tuple(zip(likeliest[row][:asked], logprobs[row][1:], strict=False)) if asked else ()
            # As Step(...), which takes three times as long.
            steps.append(tuple.__new__(Step, (each.number, token, finish, logprob, top)))
        return steps

    def _free(self) -> None:
        """Give back the slots of those that are over, or have no more to produce: the last ones take their places."""
        if not self.ended:
            return
        self.ended = False
        for slot in reversed(range(len(self.running))):
            each = self.running[slot]
            if not each.over and each.produced < each.most:
                continue
            if slot < self.producing:
                self.producing -= 1
                self._swap(slot, self.producing)
                slot = self.producing
            self._swap(slot, len(self.running) - 1)
            if (given := self.running.pop().slot) >= 0:
                self.free_slots.append(given)

    def _swap(self, one: int, other: int) -> None:
        if one == other:
            return
        if self.native is not None:
            self.native.swap(one, other)
        else:
            self.cache.swap(one, other, max(self.running[one].length, self.running[other].length))
            swap_rows(self.last, one, other)
        self.running[one], self.running[other] = self.running[other], self.running[one]


def _likeliest(logits: Tensor, tokens: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities of the tokens and of the likeliest, [rows, 1 + count], and the latter's ids."""
    logprobs = logits.log_softmax(-1)
    values, likeliest = logprobs.topk(count)
    return torch.cat((logprobs.gather(-1, tokens[:, None]), values), dim=-1), likeliest
