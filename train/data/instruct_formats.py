"""The formats in which conversations come, recognised by their columns: rows in, conversations out.

a list of turns                  {"role": "user", "content": ...} or {"from": "human", "value": ...}
messages, conversations          a column that holds such a list
instruction and response         or prompt, question; output, completion, answer; with context or input beside it
message_id and parent_id         one message a row, as in OpenAssistant: of every tree the best-ranked path
prompt.replies                   the same trees, one a row
Features: Words: ... Story:      TinyStories-Instruct, line by line: the story answers what is said beside it
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

from engine.chat_template import Message
from engine.config import DataConfig
from engine.errors import InputError
from train.data.files import SEPARATOR, Row, column_names, readable

MESSAGES = ("messages", "conversations", "conversation")
PROMPTS = ("instruction", "prompt", "question")
CONTEXTS = ("context", "input")
RESPONSES = ("response", "output", "completion", "answer")
ROLES = {"human": "user", "prompter": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
STORY_KEY = re.compile("^(Features|Words|Summary|Random sentence|Story):", re.MULTILINE)

Conversation = list[Message]
# What is read, with where it stands; None where there is no conversation.
Found = Iterator[tuple[str, Conversation | None]]
Read = Callable[[Iterable[Row]], Found]


def read_conversations(
    rows: Iterable[Row], data: DataConfig, *, lenient: bool = False
) -> Iterator[Conversation | None]:
    """The conversations of rows of one format, in the columns that `data` names; None where a row, or a tree, has none.

    Raises InputError where the assistant says nothing; `lenient` leaves that out, for data that nobody here can mend.
    """
    rows = iter(rows)
    for where, row in rows:
        read = recognise(row, data)
        if read is None:
            raise InputError(
                f"{where}: where is the conversation? There are {column_names(row)}: name --prompt-column and "
                "--response-column, or --messages-column"
            )
        for place, messages in read(chain([(where, row)], rows)):
            if messages is None or (lenient and not has_answer(messages)):
                yield None
            else:
                yield require_answer(messages, place)


def recognise(row: object, data: DataConfig) -> Read | None:
    """How to read rows like this one. None: they are no conversations."""
    if isinstance(row, str):
        return read_story_instructions if STORY_KEY.match(row) else None
    if isinstance(row, list):
        return read_turns
    if not isinstance(row, Mapping):
        return None
    listed = data.messages_column or next((name for name in MESSAGES if isinstance(row.get(name), list)), None)
    prompt = data.prompt_column or next((name for name in PROMPTS if isinstance(row.get(name), str)), None)
    response = data.response_column or next((name for name in RESPONSES if isinstance(row.get(name), str)), None)
    if listed and not data.prompt_column:
        return lambda rows: read_turns((where, _cell(row, listed, where)) for where, row in rows)
    if "message_id" in row or (isinstance(row.get("prompt"), Mapping) and "replies" in row["prompt"]):
        return read_trees
    if prompt and response:
        return lambda rows: read_pairs(rows, prompt, response)
    if isinstance(row.get("text"), str) and STORY_KEY.match(row["text"]):
        return read_story_instructions
    return None


def has_answer(messages: Conversation) -> bool:
    return any(message.role == "assistant" and message.content.strip() for message in messages)


def require_answer(messages: Conversation, where: str) -> Conversation:
    """The same, if there is something in it to learn."""
    if not has_answer(messages):
        raise InputError(f"{where}: the assistant says nothing, so nothing would be learnt; mend it or leave it out")
    return messages


def read_turns(rows: Iterable[Row]) -> Found:
    for where, turns in rows:
        if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
            raise InputError(f"{where}: a list of turns with role and content was expected, not {str(turns)[:40]!r}")
        yield where, [_message(turn, where) for turn in turns]


def read_pairs(rows: Iterable[Row], prompt: str, response: str) -> Found:
    for where, row in rows:
        beside = [name for name in CONTEXTS if isinstance(row, Mapping) and row.get(name) and name != prompt]
        asked = [_text(_cell(row, name, where), where) for name in (prompt, *beside)]
        answer = Message("assistant", _text(_cell(row, response, where), where))
        yield where, [Message("user", "\n\n".join(filter(None, asked))), answer]


def read_trees(rows: Iterable[Row]) -> Found:
    """Of every English tree the path of best-ranked replies, up to the assistant's last; None where it has none."""
    roots: list[Mapping[str, Any]] = []
    replies: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for where, row in rows:
        tree = row.get("prompt", row) if isinstance(row, Mapping) else None
        if not isinstance(tree, Mapping) or "message_id" not in tree:
            raise InputError(f"{where}: a message with message_id was expected, not {str(row)[:40]!r}")
        for message in _flat(tree):
            parent = message.get("parent_id")
            (roots if parent is None else replies[parent]).append(message)
    for root in roots:
        path = [root]
        while below := replies.get(path[-1]["message_id"]):
            path.append(min(below, key=lambda reply: float("inf") if reply.get("rank") is None else reply["rank"]))
        where = f"message {path[-1]['message_id']}"
        messages = [_message(message, where) for message in path]
        while messages and messages[-1].role != "assistant":
            messages.pop()
        yield where, messages if messages and root.get("lang", "en") == "en" else None


def _flat(message: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield message
    for reply in message.get("replies") or ():
        yield from _flat(reply)


def read_story_instructions(rows: Iterable[Row]) -> Found:
    """A story a document: a bare text, or the rows up to one that says <|endoftext|>."""
    lines: list[str] = []
    for where, row in rows:
        text = row if isinstance(row, str) else _text(_cell(row, "text", where), where)
        ends = isinstance(row, str) or SEPARATOR in text or STORY_KEY.search(text, 1) is not None
        lines.append(text.replace(SEPARATOR, ""))
        if ends:
            yield where, _story_instruction("\n".join(lines))
            lines = []
    if lines:
        yield "the last story", _story_instruction("\n".join(lines))


def _story_instruction(document: str) -> Conversation | None:
    _, *parts = STORY_KEY.split(document)
    said = {key: text.strip() for key, text in zip(parts[::2], parts[1::2], strict=True)}
    story = said.pop("Story", "")
    request = "\n".join(f"{key}: {text}" for key, text in said.items()) or "Write a story."
    return [Message("user", request), Message("assistant", story)] if story else None


def _message(turn: Mapping[str, Any], where: str) -> Message:
    role = str(turn.get("role", turn.get("from")))
    content = next((turn[key] for key in ("content", "value", "text") if key in turn), None)
    try:
        return Message(ROLES.get(role, role), _text(content, where))
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _cell(row: object, column: str, where: str) -> Any:
    if not isinstance(row, Mapping) or column not in row:
        raise InputError(f"{where}: no column {column!r}; there are {column_names(row)}")
    return row[column]


def _text(value: object, where: str) -> str:
    if not isinstance(value, str | None):
        raise InputError(f"{where}: text was expected, not {type(value).__name__}: {str(value)[:40]!r}")
    return readable(value) or ""
