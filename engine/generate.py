"""Text from a model: prefill, KV cache, sampling, and a stream that never emits half a character."""

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.cache import KVCache
from engine.errors import InputError
from engine.model import GPT
from engine.runtime import inference
from engine.sampling import Sampling, choose, make_generators
from engine.tokenizer import Tokenizer


@dataclass(frozen=True)
class Piece:
    """What one step adds to one sequence. `finish` is None while it goes on, then "stop" or "length"."""

    index: int
    text: str
    ids: tuple[int, ...]
    finish: str | None


@dataclass(frozen=True)
class Completion:
    text: str
    ids: tuple[int, ...]
    finish: str


class TextStream:
    """Turns ids into text as they come: whole characters only, and never a part of a stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, [each for each in stop if each]
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.held = ""
        self.stopped = False

    def push(self, token: int, *, last: bool = False) -> str:
        """The text that is now certain. After a stop string `stopped` is set, and nothing more comes."""
        if self.stopped:
            return ""
        # A character that the end cuts in half stays in the decoder: half of one is never text.
        self.held += self.decoder.decode(self.tokenizer.bytes_of([token]))
        found = [position for each in self.stop if (position := self.held.find(each)) >= 0]
        if found:
            self.stopped = True
            ready, self.held = self.held[: min(found)], ""
            return ready
        keep = 0 if last else max((_overlap(self.held, each) for each in self.stop), default=0)
        ready, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return ready


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)


def stream(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    max_tokens: int | None = None,
    stop: Sequence[str] = (),
) -> Iterator[Piece]:
    """Continue a batch of prompts (token ids, lengths may differ), yielding each sequence's new text step by step.

    A sequence ends at the end-of-document piece or a stop string ("stop"), or after max_tokens or at the model's
    context ("length"). Raises InputError for a prompt that is empty or leaves no room in the context.
    """
    context = model.config.context
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise InputError(f"prompt {index} is empty; begin it with the end-of-document piece")
        if len(prompt) >= context:
            raise InputError(
                f"prompt {index} has {len(prompt)} tokens; this model's context holds {context}, answer included"
            )
    if max_tokens is not None and max_tokens < 1:
        raise InputError(f"max_tokens is {max_tokens}; it must be at least 1")
    if not prompts:
        return
    limits = [min(context - len(prompt), max_tokens or context) for prompt in prompts]
    texts = [TextStream(tokenizer, stop) for _ in prompts]
    open_sequences = set(range(len(prompts)))
    for produced, tokens in enumerate(_token_steps(model, prompts, sampling), start=1):
        for index, token in enumerate(tokens):
            if index not in open_sequences:
                continue
            ended = token == tokenizer.eod
            last = ended or produced == limits[index]
            text = texts[index].push(token, last=last)
            stopped = ended or texts[index].stopped
            finish = "stop" if stopped else "length" if last else None
            if finish:
                open_sequences.discard(index)
            yield Piece(index, text, () if ended else (token,), finish)
        if not open_sequences:
            return


def _token_steps(model: GPT, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[list[int]]:
    """Endlessly the next token of every sequence, one list per step. The caller stops where the context ends."""
    weight = model.embedding.weight
    padded = torch.zeros(len(prompts), max(map(len, prompts)), dtype=torch.int64)
    for index, prompt in enumerate(prompts):
        padded[index, : len(prompt)] = torch.tensor(prompt)
    tokens = padded.to(weight.device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=weight.device)
    generators = make_generators(sampling.seed, len(prompts))
    seen = _seen(tokens, lengths, model.config.vocab_size) if sampling.repetition_penalty != 1 else None
    # One more than the context: where a sequence that has ended goes on being written.
    capacity = model.config.context + 1
    cache = KVCache(
        model.config, len(prompts), capacity, device=weight.device, dtype=model.compute_dtype or weight.dtype
    )
    rows = torch.arange(len(prompts), device=weight.device)
    new = lengths  # of each sequence: how many of its tokens this pass reads
    while True:
        with inference(model):
            hidden = model(tokens, cache=cache)
            # Shorter prompts are padded on the right. Nothing attends to padding, and it is soon written over.
            last = hidden[rows, new - 1]
            cache.lengths = (cache.lengths + new).clamp(max=model.config.context)
            chosen = choose(model.logits(last), sampling, generators, seen)
            if seen is not None:
                seen.scatter_(1, chosen[:, None], True)
        yield chosen.tolist()
        tokens, new = chosen[:, None], torch.ones_like(lengths)


def _seen(tokens_BT: Tensor, lengths: Tensor, vocab_size: int) -> Tensor:
    real = torch.arange(tokens_BT.shape[1], device=tokens_BT.device) < lengths[:, None]
    seen = torch.zeros(len(tokens_BT), vocab_size + 1, dtype=torch.bool, device=tokens_BT.device)
    # Padding goes to a column of its own, which is then dropped.
    return seen.scatter_(1, tokens_BT.masked_fill(~real, vocab_size), True)[:, :vocab_size].contiguous()


def generate(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    max_tokens: int | None = None,
    stop: Sequence[str] = (),
) -> list[Completion]:
    """`stream`, gathered: one completion per prompt."""
    pieces: list[list[Piece]] = [[] for _ in prompts]
    for piece in stream(model, tokenizer, prompts, sampling, max_tokens=max_tokens, stop=stop):
        pieces[piece.index].append(piece)
    return [
        Completion(
            text="".join(piece.text for piece in own),
            ids=tuple(token for piece in own for token in piece.ids),
            finish=own[-1].finish or "length",
        )
        for own in pieces
    ]


def document_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids that begin a document with this text."""
    return [tokenizer.eod, *tokenizer.encode(text)]
