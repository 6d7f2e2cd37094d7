"""`gpt chat`: what is remembered and forgotten, every command, Ctrl-C, and what a pipe gets."""

import dataclasses
import io
import json
import readline
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from cli import conversation as module
from cli.chat import ChatTerminal
from cli.conversation import Answer, Conversation, Settings
from engine import checkpoint
from engine.chat_template import Message, answer_prompt
from engine.config import BudgetConfig, ModelConfig, Recipe
from engine.errors import InputError
from engine.generate import Chunk, document_prompt
from engine.model import GPT
from engine.run import Run
from engine.tokenizer import Tokenizer
from tests.cli.conftest import Gpt

Typed = str | type[BaseException]


@pytest.fixture
def model(small_config: ModelConfig) -> GPT:
    """Untrained, with a context of 48 tokens."""
    torch.manual_seed(0)
    return GPT(small_config)


@pytest.fixture
def notices() -> list[str]:
    return []


Talk = Callable[..., Conversation]


@pytest.fixture
def talk(model: GPT, tokenizer: Tokenizer, notices: list[str]) -> Talk:
    """talk(chat=False, seed=3): a conversation that has not begun."""

    def begin(*, chat: bool = True, **settings: Any) -> Conversation:
        return Conversation(model, tokenizer, Settings(**settings), chat=chat, notice=notices.append)

    return begin


class Script:
    """Stands in for the engine: says what it is told to, and remembers the prompts."""

    def __init__(self) -> None:
        self.prompts: list[list[int]] = []
        self.steps: list[Any] = ["Hello", " there."]
        self.finish = "stop"

    def __call__(self, model: GPT, tokenizer: Tokenizer, prompts: list[list[int]], *_: Any, **__: Any) -> Iterator[Any]:
        self.prompts += prompts
        for step in self.steps:
            if not isinstance(step, str):
                raise step
            yield Chunk(0, step, (1,), None)
        yield Chunk(0, "", (), self.finish)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    script = Script()
    monkeypatch.setattr(module, "stream", script)
    return script


@pytest.fixture(autouse=True)
def state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state"


@pytest.fixture
def type_in(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """type_in(conversation, "hello", KeyboardInterrupt, ...): what the screen shows, until the input ends."""

    def run(conversation: Conversation, *typed: Typed) -> str:
        entries = iter(typed)

        def read(prompt: str) -> str:
            entry = next(entries, EOFError)
            if isinstance(entry, str):
                return entry
            raise entry

        monkeypatch.setattr("builtins.input", read)
        screen = io.StringIO()
        ChatTerminal(conversation, Console(file=screen, width=200)).run()
        return screen.getvalue()

    return run


TypeIn = Callable[..., str]


def test_every_answer_sees_all_that_was_said_before(talk: Talk, script: Script, tokenizer: Tokenizer) -> None:
    chat = talk()
    chat.instruct("be kind")
    assert list(chat.ask("hi")) == ["Hello", " there.", ""]
    list(chat.ask("and you?"))
    said = [
        Message("system", "be kind"),
        Message("user", "hi"),
        Message("assistant", "Hello there."),
        Message("user", "and you?"),
    ]
    assert script.prompts == [answer_prompt(tokenizer, said[:2]), answer_prompt(tokenizer, said)]
    assert chat.used == len(script.prompts[1]) + 3


def test_an_answer_ends_at_the_special_tokens_of_the_template(
    talk: Talk, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[bool, Any] = {}

    def stream(*_: Any, stop_ids: Any, **__: Any) -> Iterator[Chunk]:
        asked[chat] = stop_ids
        return iter([Chunk(0, "", (), "stop")])

    monkeypatch.setattr(module, "stream", stream)
    for chat in (True, False):
        list(talk(chat=chat).ask("hi"))
    assert asked == {True: {tokenizer.special["<|end|>"], tokenizer.eod}, False: {tokenizer.eod}}


def test_retry_draws_another_answer_and_forgets_the_first(talk: Talk) -> None:
    chat = talk(seed=1, max_tokens=12)
    first = "".join(chat.ask("the fox"))
    second = "".join(chat.retry())
    assert first != second and [message.content for message in chat.messages] == ["the fox", second]
    again = talk(seed=1, max_tokens=12)
    assert ["".join(again.ask("the fox")), "".join(again.retry())] == [first, second]
    with pytest.raises(InputError, match="no message"):
        talk().retry()


def test_retry_says_so_where_every_draw_is_the_same(talk: Talk, notices: list[str]) -> None:
    chat = talk(temperature=0, max_tokens=5)
    assert list(chat.ask("the fox")) == list(chat.retry())
    assert "temperature 0" in notices[0]


def test_what_does_not_fit_is_forgotten_oldest_first_with_a_notice(
    talk: Talk, script: Script, notices: list[str], tokenizer: Tokenizer
) -> None:
    chat = talk()
    chat.instruct("kind")
    while not notices:
        list(chat.ask("a fox"))
    assert notices == ["the context is full: the oldest 2 messages are forgotten"]
    kept = [Message("system", "kind"), *chat.messages[2:-1]]
    # A quarter of 48 is left for the answer.
    assert script.prompts[-1] == answer_prompt(tokenizer, kept) and len(script.prompts[-1]) <= 36
    before = list(chat.messages)
    with pytest.raises(InputError, match="does not fit"):
        chat.ask("fox " * 40)
    assert chat.messages == before
    chat.reset()
    assert chat.messages == [] and chat.used == 0 and chat.system == "kind"


@pytest.mark.parametrize(("max_tokens", "room"), [(None, 36), (6, 42), (40, 24)])
def test_room_for_the_answer_is_max_tokens_but_at_most_half(
    talk: Talk, script: Script, max_tokens: int | None, room: int
) -> None:
    list(talk(chat=False, max_tokens=max_tokens).ask("fox " * 40))
    assert len(script.prompts[0]) == room


def test_a_base_model_lengthens_one_document_until_it_ends_it(
    talk: Talk, script: Script, tokenizer: Tokenizer, notices: list[str]
) -> None:
    script.finish = "length"
    base = talk(chat=False)
    list(base.ask("One fox."))
    script.finish = "stop"
    list(base.ask(" Two"))
    list(base.retry())
    texts = ["One fox.", "One fox.Hello there. Two", "One fox.Hello there. Two"]
    assert script.prompts == [document_prompt(tokenizer, text) for text in texts]
    list(base.ask("New " + "fox " * 40))
    whole = document_prompt(tokenizer, "New " + "fox " * 40)
    assert script.prompts[-1] == whole[-36:]
    assert notices == [f"the context is full: the first {len(whole) - 36} tokens of the text are forgotten"]
    with pytest.raises(InputError, match="no system message"):
        base.instruct("be kind")


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("temperature=-1", "at least 0 and at most 100"),
        ("top_k=many", "of type int"),
        ("top_p=2", "at most 1"),
        ("max_tokens=0", "at least 1"),
        ("heat=3", "max_tokens"),
        ("temperature", "name=value"),
    ],
)
def test_a_setting_out_of_bounds_changes_nothing(talk: Talk, setting: str, expected: str) -> None:
    chat = talk()
    with pytest.raises(InputError, match=expected):
        chat.set(setting)
    assert chat.settings == Settings()


def test_every_setting_can_be_set_and_shown(talk: Talk, type_in: TypeIn) -> None:
    chat = talk()
    values: dict[str, Any] = {"temperature": 0.5, "top_k": 3, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.2}
    values |= {"presence_penalty": 0.4, "frequency_penalty": -0.3, "seed": 7, "max_tokens": 9}
    # A bias has token ids: it comes from programs alone.
    assert values.keys() == {field.name for field in dataclasses.fields(Settings)} - {"logit_bias"}
    shown = type_in(chat, *(f"/set {name} = {value}" for name, value in values.items()), "/set top_k=none", "/set")
    assert chat.settings == Settings(**{**values, "top_k": None})
    assert shown.splitlines()[-2].startswith("temperature=0.5  top_k=none  top_p=0.9")


def test_the_commands(talk: Talk, type_in: TypeIn, script: Script) -> None:
    chat = talk()
    screen = type_in(
        chat, "/system", "/system be kind", "hi", "/retry", "/system -", "/nope", "/help", "/reset", "/retry"
    )
    lines = screen.splitlines()
    assert lines[1:4] == ["no system message", "system: be kind", "gpt> Hello there."]
    assert "context" in lines[4] and "of 48" in lines[4] and "tokens/s" in lines[4]
    assert lines[7] == "no system message"
    assert "no command is called /nope" in lines[8] and "/system, /reset, /retry, /save" in lines[8]
    assert "/set [NAME=VALUE]" in screen and "error: there is no message to answer again" in screen
    assert chat.messages == [] and len(script.prompts) == 2
    type_in(chat, "//etc", "", "two \\", "lines", "/quit", "not read")
    assert [message.content for message in chat.messages[::2]] == ["/etc", "two \nlines"]


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(talk: Talk, type_in: TypeIn, script: Script) -> None:
    chat = talk()
    script.steps = ["Once", KeyboardInterrupt]
    screen = type_in(chat, "a story")
    assert chat.messages[-1] == Answer("assistant", "Once", "stopped")
    assert "gpt> Once\n" in screen and screen.rstrip().endswith("stopped")
    script.steps = [KeyboardInterrupt]
    assert "(no answer)" in type_in(chat, "more") and len(chat.messages) == 4


def test_ctrl_c_at_the_prompt_says_how_to_leave_and_twice_leaves(talk: Talk, type_in: TypeIn, script: Script) -> None:
    chat = talk()
    screen = type_in(chat, KeyboardInterrupt, "hi", KeyboardInterrupt, KeyboardInterrupt, "not read")
    assert screen.count("Ctrl-C again leaves") == 2 and len(chat.messages) == 2


def test_an_answer_is_text_and_commands_neither_rich_nor_the_terminal(
    talk: Talk, type_in: TypeIn, script: Script
) -> None:
    script.steps = ["[bold]x[/bold] :smile: ", "\x1b[31mred\x9b\x07", "\n\tend"]
    assert "gpt> [bold]x[/bold] :smile: [31mred\n\tend\n" in type_in(talk(), "hi")


def test_an_empty_answer_is_said_to_be_none(talk: Talk, type_in: TypeIn, script: Script) -> None:
    script.steps = []
    assert "gpt> (no answer)\n" in type_in(talk(), "hi")


def test_a_base_model_says_so_once_and_goes_on_with_enter_alone(talk: Talk, type_in: TypeIn, script: Script) -> None:
    script.finish = "length"
    base = talk(chat=False)
    screen = type_in(base, "A fox", "")
    assert screen.count("base model: it goes on from your text") == 1 and "cut short" in screen
    assert [message.content for message in base.messages] == ["A fox", "Hello there.", "", "Hello there."]
    script.finish = "stop"
    assert "end of the document" in type_in(base, "")


def test_a_conversation_is_saved_to_train_on_or_to_read(
    talk: Talk, type_in: TypeIn, script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.md").write_text("keep")
    chat = talk()
    script.steps = ["Hé", KeyboardInterrupt]
    saves = ("/save a.jsonl", "/save a.md", "/save mine.md", "/save a.txt", "/save no/a.md")
    screen = type_in(chat, "/system kind", "hi", *saves, "again", "/save a.jsonl")
    roles = ("system", "user", "assistant", "user", "assistant")
    contents = ("kind", "hi", "Hé", "again", "Hé")
    expected = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
    assert json.loads(Path("a.jsonl").read_text("utf-8")) == {"messages": expected}
    read = "**system**\n\nkind\n\n**user**\n\nhi\n\n**assistant** (stopped)\n\nHé\n"
    assert Path("a.md").read_text("utf-8") == read and Path("mine.md").read_text() == "keep"
    for error in ("mine.md exists already", "ends in .jsonl or .md", "No such file"):
        assert f"{error}" in screen
    type_in(talk(chat=False), "A fox: ", "/save b.jsonl")
    assert json.loads(Path("b.jsonl").read_text("utf-8")) == {"text": "A fox: Hé"}


def test_what_was_typed_is_there_the_next_time(talk: Talk, type_in: TypeIn, state: Path) -> None:
    readline.clear_history()
    readline.add_history("an old question")
    type_in(talk())
    readline.clear_history()
    type_in(talk())
    assert readline.get_history_item(1) == "an old question"
    readline.clear_history()


def test_no_history_is_no_error(
    talk: Talk, type_in: TypeIn, script: Script, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state.write_text("a file where the folder should be")
    assert "Hello there." in type_in(talk(), "hi")
    monkeypatch.setitem(sys.modules, "readline", None)
    assert "Hello there." in type_in(talk(), "hi")


@pytest.fixture
def saved(model: GPT, tokenizer: Tokenizer, small_config: ModelConfig, tmp_path: Path) -> Callable[..., str]:
    """saved(chat=True): the path of a run."""

    def save(*, chat: bool) -> str:
        run = Run(tmp_path / "run")
        run.write_recipe(Recipe(name="small", model=small_config, budget=BudgetConfig(steps=1), chat=chat))
        tokenizer.save(run.tokenizer)
        checkpoint.save(run.checkpoints, 1, {"model": model.state_dict()}, {"state": {"step": 1}})
        return str(run.path)

    return save


def piped(monkeypatch: pytest.MonkeyPatch, text: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text), encoding="utf-8"))


OPTIONS = ("--device", "cpu", "--precision", "fp32", "--max-tokens", "5", "--seed", "1", "--system", "kind")


def test_from_a_pipe_each_line_is_a_message_and_answers_alone_come_out(
    gpt: Gpt, saved: Callable[..., str], script: Script, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    piped(monkeypatch, b"hi\n\n/save stolen.md\r\n")
    assert gpt("chat", saved(chat=True), *OPTIONS) == (0, "Hello there.\nHello there.\n", "")
    said = [Message("system", "kind"), Message("user", "hi"), Message("assistant", "Hello there.")]
    assert script.prompts[1] == answer_prompt(tokenizer, [*said, Message("user", "/save stolen.md")])
    assert not Path("stolen.md").exists()
    script.steps = []
    piped(monkeypatch, b"hi")
    assert gpt("chat", saved(chat=True)) == (0, "\n", "(no answer)\n")


def test_from_a_pipe_a_base_model_goes_on_from_the_whole_text(
    gpt: Gpt, saved: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(chat=False)
    piped(monkeypatch, b"The fox\nwas brave\n")
    result = gpt("chat", path, *OPTIONS[:-2])
    assert result.code == 0 and result.err == "base model: it goes on from the text\n"
    assert gpt("generate", path, "The fox\nwas brave", *OPTIONS[:-2]).out == f"The fox\nwas brave{result.out}"


@pytest.mark.parametrize(
    ("text", "chat", "expected"),
    [(b"caf\xe9\n", True, "not UTF-8"), (b"fox " * 60, True, "does not fit"), (b"hi", False, "no system message")],
)
def test_what_cannot_be_answered_from_a_pipe_is_an_error(
    gpt: Gpt, saved: Callable[..., str], monkeypatch: pytest.MonkeyPatch, text: bytes, chat: bool, expected: str
) -> None:
    piped(monkeypatch, text)
    result = gpt("chat", saved(chat=chat), *OPTIONS)
    assert result.code == 2 and result.err.startswith("error: ") and expected in result.err


def test_at_a_terminal_the_command_talks(
    gpt: Gpt, saved: Callable[..., str], script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stdin", Terminal("hi\n/quit\n"))
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("NO_COLOR", "1")
    assert gpt("chat", saved(chat=True)).code == 0
    assert "you> " in screen.getvalue() and "Hello there." in screen.getvalue()
