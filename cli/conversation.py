"""A conversation with a model: what was said, how the next answer is drawn, and what still fits the context."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cli.console import notice
from engine.chat_template import Message, answer_prompt, text_ends, trim
from engine.config import Count, override, settings
from engine.disk import write_atomically
from engine.errors import InputError
from engine.generate import document_prompt, stream
from engine.model import GPT
from engine.sampling import Sampling
from engine.tokenizer import Tokenizer


@dataclass(frozen=True)
class Settings(Sampling):
    """The settings say how to sample an answer, and how long it may get."""

    max_tokens: Annotated[Count | None, "The longest answer."] = None

    def __str__(self) -> str:
        return "  ".join(f"{name}={'none' if value is None else value}" for name, value, _ in settings(self))


@dataclass(frozen=True)
class Answer(Message):
    """`finish` is "stop" where the model ended it, "length" where it was cut, "stopped" where nobody listened on."""

    finish: str = "stop"


def prompt_room(context: int, max_tokens: int | None = None) -> int:
    """Return how many tokens of a context a prompt may take, so that its answer finds room, too."""
    # The answer gets max_tokens, or else a quarter of the context, but never more than half of it.
    return context - min(max_tokens or context // 4, context // 2)


class Conversation:
    """With a chat model it is messages in turn; with a base model one document, which both sides lengthen in turn."""

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        settings: Settings,
        *,
        chat: bool,
        notice: Callable[[str], None] = notice,
    ) -> None:
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.chat, self.notice = chat, notice
        self.context = model.config.context
        self.system = ""
        self.written: set[Path] = set()
        self.reset()

    def reset(self) -> None:
        """Forget what was said; the system message and the settings stay."""
        self.messages: list[Message] = []
        self.forgotten = 0  # how many messages, from the oldest, the model does not see any more
        self.used = 0  # tokens of the context, the last answer included
        self.draws = 0  # answers so far: each has a seed of its own

    def instruct(self, system: str) -> None:
        """Tell the model how to answer from now on; "" takes it back."""
        if system and not self.chat:
            raise InputError("a base model takes no system message; begin the text in the way you want it to go on")
        self.system = system

    def set(self, setting: str) -> None:
        """Obey `name=value`. Raises InputError for an unknown name or a value out of its bounds."""
        name, equals, value = setting.partition("=")
        if not equals:
            raise InputError(f"it takes name=value, such as temperature=0.7, not {setting!r}")
        self.settings = override(self.settings, name.strip(), value.strip())
        if name.strip() == "seed":
            self.draws = 0

    def ask(self, text: str) -> Iterator[str]:
        """Yield the answer's text, token by token. Both are remembered, as far as the answer was listened to.

        Raises InputError for a message that does not fit, and forgets it.
        """
        # A base model that ended its document begins another.
        over = not self.chat and self.messages and self.answer.finish == "stop"
        return self._begin([*([] if over else self.messages), Message("user", text)])

    def retry(self) -> Iterator[str]:
        """Yield another answer to the last message, in place of the first."""
        if not self.messages:
            raise InputError("there is no message to answer again")
        if self.settings.temperature == 0:
            self.notice("at temperature 0 every draw is the same")
        return self._begin(self.messages[:-1])

    @property
    def answer(self) -> Answer:
        """Return the last answer, as far as it has come."""
        last = self.messages[-1]
        assert isinstance(last, Answer)
        return last

    def _begin(self, messages: Sequence[Message]) -> Iterator[str]:
        prompt = self._fit(messages)
        self.messages, self.used = [*messages, Answer("assistant", "", "stopped")], len(prompt)
        sampling, self.draws = self.settings.of_row(self.draws), self.draws + 1
        return self._continue(prompt, sampling)

    def _continue(self, prompt: list[int], sampling: Sampling) -> Iterator[str]:
        ends = text_ends(self.tokenizer, chat=self.chat)
        limit = self.settings.max_tokens
        for chunk in stream(self.model, self.tokenizer, [prompt], sampling, max_tokens=limit, stop_ids=ends):
            # The listener may leave at any token, so the answer so far is kept at each.
            self.messages[-1] = Answer("assistant", self.answer.content + chunk.text, chunk.finish or "stopped")
            self.used += 1
            yield chunk.text

    def _fit(self, messages: Sequence[Message]) -> list[int]:
        """Return the prompt of these messages. Where the answer finds no room, the oldest go, and `notice` is told."""
        room = prompt_room(self.context, self.settings.max_tokens)
        if not self.chat:
            ids = document_prompt(self.tokenizer, "".join(message.content for message in messages))
            if len(ids) > room:
                self.notice(f"the context is full: the first {len(ids) - room} tokens of the text are forgotten")
            return ids[-room:]
        system = [Message("system", self.system)] if self.system else []
        kept, dropped = trim(self.tokenizer, [*system, *messages[self.forgotten :]], room)
        if dropped:
            self.forgotten += dropped
            self.notice(f"the context is full: the oldest {dropped} messages are forgotten")
        return answer_prompt(self.tokenizer, kept)

    def save(self, path: Path) -> None:
        """Write what was said: `.jsonl` for training (a line with "messages", of a base model "text"), `.md` to read.

        Raises InputError for another name, and for a file that this conversation has not written itself.
        """
        if path.suffix not in (".jsonl", ".md"):
            raise InputError(f"cannot save to {str(path)!r}: it takes a name that ends in .jsonl or .md")
        if path.exists() and path not in self.written:
            raise InputError(f"{path} exists already; choose another name")
        if not path.parent.is_dir():
            raise InputError(f"{path}: No such file or directory")
        said = [*([Message("system", self.system)] if self.system else []), *self.messages]
        text = "".join(message.content for message in said)
        if path.suffix == ".jsonl":
            turns = [{"role": message.role, "content": message.content} for message in said]
            written = json.dumps({"messages": turns} if self.chat else {"text": text}, ensure_ascii=False)
        else:
            written = "\n\n".join(map(_markdown, said)) if self.chat else text
        write_atomically(path, written + "\n")
        self.written.add(path)


def _markdown(message: Message) -> str:
    stopped = " (stopped)" if isinstance(message, Answer) and message.finish == "stopped" else ""
    return f"**{message.role}**{stopped}\n\n{message.content}"
