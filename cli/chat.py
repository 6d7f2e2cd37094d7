"""gpt chat: from a pipe, or at a terminal with prompt and history, commands, and answers as they come."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.console import Console
from typer import Option

from cli.options import ModelOptions, RunArgument, SamplingOptions
from engine.errors import InputError, meant

if TYPE_CHECKING:
    from cli.conversation import Conversation

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
# A model may write any byte; these, which would control the terminal, are not shown.
UNSEEN = dict.fromkeys(code for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t")


def chat(
    path: RunArgument,
    sampling: SamplingOptions,
    model: ModelOptions,
    system: Annotated[str, Option(help="How to answer, told to the model before all else.")] = "",
) -> None:
    """Talk to a model; a base model, not taught to answer, goes on from your text.

    Example: gpt chat runs/nano --temperature 0.7

    Example: echo "Tell me a story" | gpt chat runs/nano

    From a pipe each line is a message, never a command; for a base model the
    whole input is one text. Only what the model writes goes to standard output.
    """
    from cli.conversation import Conversation, Settings
    from engine.run import Run

    settings, run = Settings(**vars(sampling)), Run(path)
    conversation = Conversation(*model.load(run), settings, chat=run.read_recipe().chat)
    conversation.instruct(system)
    if sys.stdin.isatty() and sys.stdout.isatty():
        ChatTerminal(conversation).run()
    else:
        answer_pipe(conversation)


def answer_pipe(conversation: "Conversation") -> None:
    """Answer standard input on standard output, until it ends."""
    if not conversation.chat:
        conversation.notice("base model: it goes on from the text")
    try:
        for message in sys.stdin if conversation.chat else [sys.stdin.read()]:
            if message.strip():
                for text in conversation.ask(message.rstrip("\r\n")):
                    print(text, end="", flush=True)
                print(flush=True)
                if not conversation.answer.content:
                    conversation.notice("(no answer)")
    except UnicodeDecodeError:
        raise InputError("the input is not UTF-8") from None


class ChatTerminal:
    def __init__(self, conversation: "Conversation", console: Console | None = None) -> None:
        self.conversation = conversation
        self.console = console or Console()
        conversation.notice = self.note

    def run(self) -> None:
        """Talk until /quit, Ctrl-D, or Ctrl-C twice."""
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
            # Readline counts no columns for what stands between \1 and \2.
            prompt = f"\1\x1b[1;36m\2{prompt}\1\x1b[0m\2"
        text = input(prompt)
        while text.endswith("\\"):
            text = text[:-1] + "\n" + input("...> ")
        return text

    def _do(self, text: str) -> None:
        talk = self.conversation
        if text.startswith("//") or not text.startswith("/"):
            # Enter alone asks a chat model nothing, but lets a base model go on.
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
                names = [usage.split()[0] for usage in COMMANDS]
                there = f"there are {', '.join(names)}; {SLASHES}{meant(command, names)}"
                self.note(f"error: no command is called {command}; {there}", style="red")

    def _answer(self, chunks: Iterator[str]) -> None:
        talk = self.conversation
        self.console.print("gpt> ", style="bold green", end="")
        begin, prompt = time.perf_counter(), talk.used
        with contextlib.suppress(KeyboardInterrupt):
            for text in chunks:
                # Rich would read markup in the text, so print writes it.
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
    """Edit lines with readline where it is there, and keep what was typed for later conversations."""
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
