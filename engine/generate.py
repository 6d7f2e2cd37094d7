"""Text from a model: prefill, KV cache, sampling, and a stream that never emits half a character."""

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from engine.batcher import Batcher, Request
from engine.errors import InputError
from engine.model import GPT
from engine.sampling import Sampling
from engine.tokenizer import Tokenizer

# Of a batch of prompts, at once; the others wait.
SLOTS = 64


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
    stop_ids: frozenset[int] | None = None,
) -> Iterator[Piece]:
    """Continue a batch of prompts (token ids, lengths may differ), yielding each sequence's new text step by step.

    A sequence ends at one of stop_ids (unless given, the end-of-document piece) or a stop string ("stop"), or after
    max_tokens or at the model's context ("length"). Raises InputError for a prompt that is empty or leaves no room in
    the context.
    """
    if not prompts:
        return
    if stop_ids is None:
        stop_ids = frozenset([tokenizer.eod])
    context = model.config.context
    batcher = Batcher(model, slots=min(len(prompts), SLOTS), queue=len(prompts))
    texts = [TextStream(tokenizer, stop) for _ in prompts]
    numbers = {}
    for index, prompt in enumerate(prompts):
        request = Request(prompt, sampling.of_row(index), context if max_tokens is None else max_tokens, stop_ids)
        try:
            numbers[batcher.submit(request)] = index
        except InputError as error:
            raise InputError(f"prompt {index}: {error}") from None
    while not batcher.idle:
        for step in batcher.step():
            index, ended = numbers[step.request], step.token in stop_ids
            text = texts[index].push(step.token, last=step.finish is not None)
            finish = "stop" if texts[index].stopped else step.finish
            if finish and not step.finish:
                batcher.cancel(step.request)
            yield Piece(index, text, () if ended else (step.token,), finish)


def generate(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    max_tokens: int | None = None,
    stop: Sequence[str] = (),
    stop_ids: frozenset[int] | None = None,
) -> list[Completion]:
    """`stream`, gathered: one completion per prompt."""
    pieces: list[list[Piece]] = [[] for _ in prompts]
    for piece in stream(model, tokenizer, prompts, sampling, max_tokens=max_tokens, stop=stop, stop_ids=stop_ids):
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
