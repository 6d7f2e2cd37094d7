"""`gpt chat` at a terminal: prompt and history, commands, answers as they come."""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from cli.conversation import Conversation
from engine.errors import InputError

COMMANDS = {
    "/system [TEXT]": "tell it how to answer; - takes that back; alone shows it",
    "/reset": "forget what was said",
    "/retry": "another answer to the last message",
    "/save FILE": ".jsonl to finetune on, .md to read",
    "/set [NAME=VALUE]": "temperature, max_tokens and others; alone shows all",
    "/help": "this list",
    "/quit": "leave, as Ctrl-D does",
}
SLASHES = "//text sends a text that begins with a slash"
HISTORY_LINES = 1000
# A model may write any byte. Those that would command the terminal are not shown.
UNSEEN = dict.fromkeys(code for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t")


class ChatTerminal:
    def __init__(self, conversation: Conversation, console: Console | None = None) -> None:
        self.conversation = conversation
        self.console = console or Console()
        conversation.notice = self.note

    def run(self) -> None:
        """Until /quit, Ctrl-D, or Ctrl-C twice."""
        if self.conversation.chat:
            self.note("/help lists the commands, Ctrl-D leaves, Ctrl-C stops an answer")
        else:
            self.note("base model: it goes on from your text, and further with Enter alone; /help lists the commands")
        interrupted = False
        with history():
            while True:
                try:
                    text = self._read()
                except EOFError:
                    self.console.print()
                    return
                except KeyboardInterrupt:
                    self.console.print()
                    if interrupted:
                        return
                    interrupted = True
                    self.note("Ctrl-C again leaves, as Ctrl-D and /quit do")
                    continue
                interrupted = False
                if text.strip() == "/quit":
                    return
                try:
                    self._do(text)
                except (InputError, OSError) as error:
                    self.note(f"error: {error}", style="red")

    def note(self, message: str, style: str = "dim") -> None:
        self.console.print(message, style=style, markup=False, emoji=False, highlight=False, soft_wrap=True)

    def _read(self) -> str:
        prompt = "you> "
        if self.console.color_system and not self.console.no_color:
            # Between \1 and \2 stands what readline must not count as columns.
            prompt = f"\1\x1b[1;36m\2{prompt}\1\x1b[0m\2"
        text = input(prompt)
        while text.endswith("\\"):
            text = text[:-1] + "\n" + input("...> ")
        return text

    def _do(self, text: str) -> None:
        talk = self.conversation
        if text.startswith("//") or not text.startswith("/"):
            # Enter alone is no question; but a base model goes on.
            if text.strip() or not talk.chat:
                self._answer(talk.ask(text.removeprefix("/")))
            return
        command, _, argument = text.partition(" ")
        argument = argument.strip()
        match command:
            case "/system":
                if argument:
                    talk.instruct("" if argument == "-" else argument)
                self.note(f"system: {talk.system}" if talk.system else "no system message")
            case "/reset":
                talk.reset()
                self.note("forgotten")
            case "/retry":
                self._answer(talk.retry())
            case "/save":
                talk.save(Path(os.path.expanduser(argument)))  # noqa: PTH111 (Path's fails without a home)
                self.note(f"saved {argument}")
            case "/set":
                if argument:
                    talk.set(argument)
                self.note(str(talk.settings))
            case "/help":
                for usage, meaning in COMMANDS.items():
                    self.note(f"{usage:18} {meaning}")
                self.note(f"{SLASHES}; a line that ends in a backslash goes on in the next")
            case _:
                names = ", ".join(usage.split()[0] for usage in COMMANDS)
                self.note(f"error: no command is called {command}; there are {names}; {SLASHES}", style="red")

    def _answer(self, pieces: Iterator[str]) -> None:
        talk = self.conversation
        self.console.print("gpt> ", style="bold green", end="")
        begin, prompt = time.perf_counter(), talk.used
        with contextlib.suppress(KeyboardInterrupt):
            for text in pieces:
                # Not through rich: it is text, whatever it looks like.
                print(text.translate(UNSEEN), end="", file=self.console.file, flush=True)
        seconds, tokens = time.perf_counter() - begin, talk.used - prompt
        if not talk.answer.content:
            self.console.print("(no answer)", style="dim", end="")
        status = f"{tokens} tokens  {tokens / seconds:,.0f} tokens/s  context {talk.used} of {talk.context}"
        ended = "stop" if talk.chat else "end of the document: your next text begins another"
        how = {"stop": ended, "length": "cut short", "stopped": "stopped"}[talk.answer.finish]
        self.console.print()
        self.note(status if how == "stop" else f"{status}  {how}")


@contextlib.contextmanager
def history() -> Iterator[None]:
    """Line editing, and what was typed in earlier conversations, where readline and its file can be had."""
    try:
        import readline

        file = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser() / "gpt" / "history"
    except (ImportError, RuntimeError):  # no readline, or no home
        yield
        return
    with contextlib.suppress(OSError):
        readline.read_history_file(file)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            readline.set_history_length(HISTORY_LINES)
            readline.write_history_file(file)
