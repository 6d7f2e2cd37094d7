"""The model's steps become OpenAI's answers, whole or event by event: text, logprobs and usage."""

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from functools import cache
from json import JSONEncoder
from typing import Any, NamedTuple

from cli.server.openai import Options, model_failed
from cli.server.worker import Job, ModelError
from engine.batcher import Step
from engine.generate import TextStream
from engine.tokenizer import Tokenizer

to_json = JSONEncoder(separators=(",", ":")).encode
# A token and where its text begins in the answer, in characters.
Token = tuple[int, Step]


class Chunk(NamedTuple):
    """A chunk is what a step adds to a text. `produced` says whether its token is one of the text's."""

    text: str
    tokens: list[Token]
    produced: bool
    finish: str | None


class Choice:
    """One text on its way. `unread` is how many of its prompt's tokens `echo` leaves out, where they have logprobs.

    `closing` says whether the token that ends the text is counted. In a message it is not; of a completion clients
    expect one entry for each token that was drawn, and slice the logprobs by position.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str],
        echo: str = "",
        unread: int | None = None,
        *,
        closing: bool = False,
        after: Sequence[int] = (),
    ) -> None:
        self.stream, self.closing = TextStream(tokenizer, stop, after), closing
        self.echo, self.unread, self.length, self.tokens = echo, unread, len(echo), 0
        self.finish: str | None = None
        self.held: list[Token] = []  # behind text that a stop string may yet take back

    def push(self, step: Step | None) -> Chunk:
        """Return the text that is now certain, and its tokens. Without a step the text is cut off here."""
        start = self.length + len(self.stream.held)
        produced = step is not None and (self.closing or step.finish != "stop")
        if step is None:
            text, self.stream.held, self.finish = self.stream.held, "", "length"
        else:
            text = self.stream.push(step.token, last=step.finish is not None)
            self.finish = "stop" if self.stream.stopped else step.finish
        if step is not None and produced:
            self.tokens += 1
            self.held.append((start, step))
        self.length += len(text)
        certain = len(self.held)
        if self.stream.stopped or not self.finish:
            certain = sum(start < self.length for start, _ in self.held)
        tokens, self.held = self.held[:certain], self.held[certain:]
        return Chunk(text, tokens, produced, self.finish)

    def read(self, prompt: Sequence[Step]) -> Chunk:
        """Return the chunk that holds the prompt, with its logprobs."""
        spelled, start, tokens = TextStream(self.stream.tokenizer), 0, []
        for step in prompt[self.unread :]:
            tokens.append((start, step))
            start += len(spelled.push(step.token))
        return Chunk(self.echo, tokens, True, None)


class CompletionAnswer:
    """The answer to a completion, of which ChatAnswer makes a message. `logprobs` says whether they are asked for."""

    prefix, kind, chunk_kind, escape = "cmpl-", "text_completion", "text_completion", "bytes:"
    said = "prompt"  # the field of the request that holds it

    def __init__(
        self, asked: Options, tokenizer: Tokenizer, choices: Sequence[Choice], prompt_tokens: int, *, logprobs: bool
    ) -> None:
        self.asked, self.tokenizer, self.choices = asked, tokenizer, choices
        self.prompt_tokens, self.logprobs = prompt_tokens, logprobs
        self.head: dict[str, Any] = {
            "id": self.prefix + uuid.uuid4().hex,
            "created": int(time.time()),
            "model": asked.model,
        }

    def first(self, choice: Choice) -> dict[str, Any] | None:
        """Return the fields of an event that comes before any token, where there is one."""
        return {"text": choice.echo} if choice.echo and choice.unread is None else None

    def text(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def delta(self, text: str, finish: str | None) -> dict[str, Any]:
        return {"text": text}

    def describe(self, tokens: Sequence[Token]) -> dict[str, Any]:
        # The token itself is always named; where two tokens are spelled alike, the likelier one stays.
        likeliest = [((step.token, step.logprob), *reversed(step.top)) for _, step in tokens]
        return {
            "tokens": [self.spell(step.token)[0] for _, step in tokens],
            "token_logprobs": [step.logprob for _, step in tokens],
            # The first token of a prompt has none.
            "top_logprobs": [
                None if each[0][1] is None else {self.spell(token)[0]: logprob for token, logprob in each}
                for each in likeliest
            ],
            "text_offset": [start for start, _ in tokens],
        }

    async def collect(self, job: Job) -> tuple[list[str], list[list[Token]]]:
        """Return the whole texts and their tokens."""
        texts: list[list[str]] = [[choice.echo if choice.unread is None else ""] for choice in self.choices]
        tokens: list[list[Token]] = [[] for _ in self.choices]
        async for arrived in self._arrivals(job):
            for index, chunk in arrived:
                texts[index].append(chunk.text)
                tokens[index] += chunk.tokens
        return ["".join(each) for each in texts], tokens

    async def whole(self, job: Job) -> dict[str, Any]:
        texts, tokens = await self.collect(job)
        choices = [
            {
                "index": index,
                **self.text(texts[index]),
                "logprobs": self.describe(tokens[index]) if self.logprobs else None,
                "finish_reason": choice.finish,
            }
            for index, choice in enumerate(self.choices)
        ]
        return {**self.head, "object": self.kind, "system_fingerprint": None, "choices": choices, "usage": self.usage()}

    async def events(self, job: Job) -> AsyncIterator[str]:
        """Server-sent events: one for every token, one for every end, which may add what was held back."""
        include_usage = self.asked.stream_options is not None and self.asked.stream_options.include_usage
        head = {**self.head, "object": self.chunk_kind, "system_fingerprint": None}
        # What all events share is spelled once.
        before = "data: " + to_json({**head, "choices": []})[:-2]
        after = ('],"usage":null}' if include_usage else "]}") + "\n\n"

        def event(index: int, fields: dict[str, Any], tokens: Sequence[Token], finish: str | None) -> str:
            logprobs = self.describe(tokens) if self.logprobs and (tokens or not finish) else None
            choice = {"index": index, **fields, "logprobs": logprobs, "finish_reason": finish}
            return before + to_json(choice) + after

        @cache
        def around(index: int) -> list[str]:
            return event(index, self.delta("\0", None), (), None).rsplit('"\\u0000"', 1)

        def of_token(index: int, text: str, tokens: Sequence[Token]) -> str:
            if self.logprobs:
                return event(index, self.delta(text, None), tokens, None)
            start, end = around(index)  # of such events only the text differs
            return start + to_json(text) + end

        first = [(index, self.first(choice)) for index, choice in enumerate(self.choices)]
        yield "".join(event(index, fields, (), None) for index, fields in first if fields)
        try:
            async for arrived in self._arrivals(job):
                events = []
                for index, (text, tokens, produced, finish) in arrived:
                    if produced:
                        events.append(of_token(index, text, tokens))
                        text, tokens = "", []
                    if finish:
                        events.append(event(index, self.delta(text, finish), tokens, finish))
                yield "".join(events)
        except ModelError as error:
            yield f"data: {to_json(model_failed(500, error).content)}\n\n"  # too late for a status
            return
        if include_usage:
            yield f"data: {to_json({**head, 'choices': [], 'usage': self.usage()})}\n\n"
        yield "data: [DONE]\n\n"

    async def _arrivals(self, job: Job) -> AsyncIterator[list[tuple[int, Chunk]]]:
        """Yield whatever has come, as soon as something has."""
        while job.running:
            arrived = []
            for index, step in await job.arrivals():
                if index not in job.running:
                    continue  # the model was a step ahead of the end
                choice = self.choices[index]
                chunk = choice.read(step) if isinstance(step, list) else choice.push(step)
                arrived.append((index, chunk))
                if chunk.finish:
                    job.finish(index)
            yield arrived

    def usage(self) -> dict[str, int]:
        prompt, completion = self.prompt_tokens, sum(choice.tokens for choice in self.choices)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def spell(self, token: int) -> tuple[str, list[int] | None]:
        """Return a token's text and bytes. Half a character is spelled in escapes, a special token by its name."""
        spelled = self.tokenizer.bytes_of([token])
        if not spelled:
            return self.tokenizer.name(token), None
        try:
            return spelled.decode(), list(spelled)
        except UnicodeDecodeError:
            return self.escape + "".join(f"\\x{byte:02x}" for byte in spelled), list(spelled)


class ChatAnswer(CompletionAnswer):
    prefix, kind, chunk_kind, escape = "chatcmpl-", "chat.completion", "chat.completion.chunk", ""
    said = "messages"

    def first(self, choice: Choice) -> dict[str, Any]:
        return {"delta": {"role": "assistant", "content": "", "refusal": None}}

    def text(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def delta(self, text: str, finish: str | None) -> dict[str, Any]:
        return {"delta": {"content": text} if text or not finish else {}}

    def describe(self, tokens: Sequence[Token]) -> dict[str, Any]:
        content = [
            {
                **self._entry(step.token, step.logprob),
                "top_logprobs": [self._entry(token, logprob) for token, logprob in step.top],
            }
            for _, step in tokens
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        text, spelled = self.spell(token)
        return {"token": text, "logprob": logprob, "bytes": spelled}
