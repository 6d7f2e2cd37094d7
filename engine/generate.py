"""Text from a model: prompts in, streams of text out that never hold half a character."""

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from engine.batcher import Batcher, Request
from engine.errors import InputError
from engine.model import GPT
from engine.progress import listener
from engine.sampling import Sampling
from engine.tokenizer import Tokenizer

# So many prompts of a batch are continued at once; the others wait.
SLOTS = 64


@dataclass(frozen=True)
class Chunk:
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
    """It turns ids into text as they come: whole characters only, and never a part of a stop string.

    Where a text begins, `after` the header of an answer or without text before, a space that is none of it is left out.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), after: Sequence[int] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, [each for each in stop if each]
        begins = not tokenizer.bytes_of(after) or list(after[-len(tokenizer.header) :]) == tokenizer.header
        self.strips = tokenizer.strips and begins
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.held = ""
        self.stopped = False

    def push(self, token: int, *, last: bool = False) -> str:
        """Return the text that is now certain. After a stop string `stopped` is set, and nothing more comes."""
        if self.stopped:
            return ""
        # A character that the end cuts in half stays in the decoder: half of one is never text.
        text = self.decoder.decode(self.tokenizer.token_bytes[token])
        if self.strips and text:
            text, self.strips = text.removeprefix(" "), False
        if not self.stop:
            return text
        self.held += text
        found = [position for each in self.stop if (position := self.held.find(each)) >= 0]
        if found:
            self.stopped = True
            ready, self.held = self.held[: min(found)], ""
            return ready
        # The longest end of the text that may be the beginning of a stop string waits.
        begun = (size for each in self.stop for size in range(1, len(each)) if self.held.endswith(each[:size]))
        certain = len(self.held) - (0 if last else max(begun, default=0))
        ready, self.held = self.held[:certain], self.held[certain:]
        return ready


def stream(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    max_tokens: int | None = None,
    stop: Sequence[str] = (),
    stop_ids: frozenset[int] | None = None,
) -> Iterator[Chunk]:
    """Continue a batch of prompts (token ids, lengths may differ), yielding each sequence's new text step by step.

    A sequence ends at one of stop_ids (unless given, the end-of-document token) or a stop string ("stop"), or after
    max_tokens or at the model's context ("length"). Raises InputError for a prompt that is empty or leaves no room in
    the context.
    """
    if not prompts:
        return
    ends = frozenset([tokenizer.eod]) if stop_ids is None else stop_ids
    most = model.config.context if max_tokens is None else max_tokens
    # A short answer needs no cache for all of a long context.
    longest = min(max(map(len, prompts)) + max(most, 1), model.config.context)
    batcher = Batcher.fitting(model, min(len(prompts), SLOTS), len(prompts), longest)
    texts = [TextStream(tokenizer, stop, prompt) for prompt in prompts]
    for index, prompt in enumerate(prompts):
        try:
            batcher.submit(Request(prompt, sampling.of_row(index), most, ends))  # its number is the prompt's
        except InputError as error:
            raise InputError(f"prompt {index}: {error}") from None
    while not batcher.idle:
        for index, token, finish, *_ in batcher.step():
            if texts[index].stopped:  # by a token of this same step
                continue
            text = texts[index].push(token, last=finish is not None)
            if texts[index].stopped:
                batcher.cancel(index)
                finish = "stop"
            yield Chunk(index, text, () if token in ends else (token,), finish)


def generate(
    model: GPT, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], sampling: Sampling, **options: Any
) -> list[Completion]:
    """Return one completion for each prompt: what `stream` yields, put together. The options are those of `stream`."""
    found = [Completion("", (), "length") for _ in prompts]
    with listener.get()("writing texts", len(prompts), "texts") as told:
        whole = 0
        for new in stream(model, tokenizer, prompts, sampling, **options):
            old = found[new.index]
            found[new.index] = Completion(old.text + new.text, old.ids + new.ids, new.finish or "length")
            told(whole := whole + (new.finish is not None))
    return found


def document_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the ids that begin a document with this text."""
    return [tokenizer.begin, *tokenizer.encode(text)]
