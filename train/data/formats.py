"""The formats of texts and conversations, recognised by their columns: rows in, documents out.

README.md lists the columns, and what else in a row is supported, or refused because it changes what the row means. For
a new format of conversations, write a reader (from rows to conversations, each with its file and line), and let
`recognise` return it.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import takewhile
from typing import Any

from engine.chat_template import Message
from engine.config import DataConfig
from engine.errors import InputError
from engine.tokenizer import END_OF_DOCUMENT
from train.data.rows import MESSAGES, PROMPTS, Columns, Row, Skipped, cell, clean, column_names, list_of, peek, text_of

TEXTS = ("text", "contents", "content", "story", "document")
CONTEXTS = ("context", "input")
RESPONSES = ("response", "output", "completion", "answer")
ANSWERS = ("chosen", "rejected")
SYSTEMS = ("system", "system_prompt", "system_message")
HISTORY = "history"
LABELS = ("label", "kto_tag")
WEIGHTS = ("weight", "train", "loss")
# A row or a turn with a value in one of these columns is refused: a conversation of texts cannot express its meaning.
REFUSED = ("tools", "tool_calls", "functions", "function_call", "image", "images", "audio", "audios", "video", "videos")
ROLES = {"human": "user", "prompter": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
STORY_KEY = re.compile("^(Features|Words|Summary|Random sentence|Story):", re.MULTILINE)
UNANSWERED, UNASKED = "without an answer to learn", "without a question"

Conversation = list[Message]
# Each conversation comes with its file and line.
Found = Iterator[tuple[str, Conversation | Skipped]]
Read = Callable[[Iterable[Row]], Found]


def read_texts(
    rows: Iterable[Row], head: Sequence[object] | None = None, column: str | None = None
) -> Iterator[str | Skipped]:
    """Read the text of every row, from the column asked for or the one that the first rows, `head`, suggest."""
    if head is None:
        # A column that is named needs no look ahead, which at the Hub may cost a request for each file.
        head, rows = ([], rows) if column else peek(rows)
    for where, row in rows:
        text = row
        if not isinstance(row, str | Mapping):
            raise InputError(f"{where}: a JSON object with a text column was expected, not {str(row)[:40]!r}")
        if isinstance(row, Mapping):
            column = column or _text_column(Columns(head), where)
            if column not in row:
                there = column_names(row)
                raise InputError(f"{where}: no column {column!r}; there are {there}: choose one with --column")
            text = row[column]
        if not isinstance(text, str | None):
            what = type(text).__name__
            raise InputError(f"{where}: column {column!r} holds {what}, not text; choose another with --column")
        yield clean(text) or Skipped(where, "empty")


def _text_column(columns: Columns, where: str) -> str:
    if known := columns.first(TEXTS, str):
        return known
    asked = f"{where}: which column is the text? There are {', '.join(columns.names)}: choose one with --column"
    # A question alone, or an id beside a conversation, is a text too, but not what anybody wants to learn.
    if {*columns.names} & {*MESSAGES, *PROMPTS, *RESPONSES, *ANSWERS}:
        raise InputError(f"{asked}; conversations are learnt by `gpt finetune`, preferences by `gpt reward`")
    texts = [name for name in columns.names if columns.holds(name, str)]
    if len(texts) != 1:
        raise InputError(asked)
    return texts[0]


def read_conversations(
    rows: Iterable[Row], data: DataConfig, *, answers: bool = True
) -> Iterator[Conversation | Skipped]:
    """Read the conversations of rows of one format, in the columns that `data` names.

    Without `answers` each is a prompt (prompt_of); whether anything answers it does not matter.
    """
    head, rows = peek(rows)
    read = recognise(head, data, answers=answers)
    if read is None:
        for where, row in rows:
            named = "--prompt-column and --response-column, or --messages-column" if answers else "--prompt-column"
            raise InputError(f"{where}: where is the conversation? There are {column_names(row)}: name {named}")
        return
    for where, messages in read(rows):
        if isinstance(messages, Skipped):
            yield messages
        elif answers:
            yield messages if has_answer(messages) else Skipped(where, UNANSWERED)
        else:
            before = prompt_of(messages)
            yield before if any(message.role == "user" for message in before) else Skipped(where, UNASKED)


def recognise(rows: Sequence[object], data: DataConfig, *, answers: bool = True) -> Read | None:
    """Return the reader for rows like these, or None if they are no conversations, nor prompts without `answers`.

    The first test that fits decides. A list of messages comes first, since it holds the whole conversation, unless a
    prompt column is named. Then come trees (message_id, replies), since they may have a column "prompt", too, and then
    a prompt with its response.
    """
    if any(isinstance(row, list) for row in rows):
        return lambda rows: ((where, turns_of(turns, where)) for where, turns in rows)
    if any(isinstance(row, str) for row in rows):
        return _read_story_instructions if any(isinstance(row, str) and STORY_KEY.match(row) for row in rows) else None
    columns = Columns(rows)
    prompt = data.prompt_column or columns.first(PROMPTS, str, list)
    response = data.response_column or columns.first(RESPONSES, str, list)
    # A column with such a name is the response whatever it holds: a row in which it holds no text is refused later.
    response = response or next((name for name in RESPONSES if name in columns.names), None)
    listed = (name for name in MESSAGES if any(list_of(value) is not None for value in columns.values(name)))
    messages = data.messages_column or next(listed, None)
    if messages and not data.prompt_column:
        return partial(_read_columns, columns=[messages], make=_from_turns)
    if "message_id" in columns.names or any("replies" in tree for tree in columns.values("prompt") if is_mapping(tree)):
        return _read_trees
    if prompt and (response or not answers):
        named = [prompt, response] if answers and response else [prompt]
        return partial(_read_columns, columns=named, make=partial(_from_pair, prompt=prompt))
    if any(isinstance(text, str) and STORY_KEY.match(text) for text in columns.values("text")):
        return _read_story_instructions
    there = f"{data.source}: there are {', '.join(columns.names)}"
    if answers and {*columns.names} >= {*ANSWERS}:
        raise InputError(f"{there}: these are preferences; learn from them with `gpt reward` or `gpt rlhf dpo`")
    if answers and prompt and not data.column:
        raise InputError(
            f"{there}: {prompt} holds questions, and nothing answers them; name the answers with --prompt-column and "
            "--response-column, or the text to learn with --column"
        )
    return None


def is_mapping(value: object) -> bool:
    return isinstance(value, Mapping)


def prompt_of(messages: Conversation) -> Conversation:
    """Return the prompt: the whole conversation if it ends with a question, else what comes before the first answer."""
    if messages and messages[-1].role == "user":
        return messages
    return list(takewhile(lambda message: message.role != "assistant", messages))


def has_answer(messages: Conversation) -> bool:
    """Return whether there is an answer to learn, and none is empty."""
    answers = [message for message in messages if message.role == "assistant"]
    return any(answer.learn for answer in answers) and all(answer.content.strip() for answer in answers)


def unwanted(row: Mapping[str, Any], where: str) -> Skipped | None:
    """Return the row as skipped if one of its columns says that it is not to be learnt, else None.

    Raises InputError for a column whose meaning is not supported.
    """
    refuse(row, where)
    if any(row.get(name) is False for name in LABELS):
        return Skipped(where, "labelled as bad answers")
    return None if _is_learnt(row, WEIGHTS[:1], where) else Skipped(where, "of weight 0")


def refuse(row: Mapping[str, Any], where: str) -> None:
    """Raise InputError if a row or a turn has a value in one of the columns REFUSED."""
    for name in REFUSED:
        if row.get(name) not in (None, "", "[]", "{}", [], {}):
            raise InputError(
                f"{where}: there are {name}, which a model of texts cannot learn from; leave such rows out, or the "
                "column if it does not matter"
            )


def _is_learnt(part: Mapping[str, Any], names: Iterable[str], where: str) -> bool:
    for name in names:
        weight = part.get(name)
        if weight not in (None, 0, 1):
            raise InputError(
                f"{where}: {name} is {repr(weight)[:40]}; a turn is learnt (1) or not (0), nothing between"
            )
        if weight == 0:
            return False
    return True


def asked(
    row: Mapping[str, Any], prompt: str | None, where: str, turns: Callable[[object], Conversation]
) -> Conversation:
    """Return what precedes an answer: the system text, earlier turns, and the prompt, which `turns` reads."""
    earlier: Conversation = []
    for said in list_of(row.get(HISTORY)) or ():
        if isinstance(said, Mapping):
            earlier.append(_message(said, where))
        elif (pair := list_of(said)) is not None and len(pair) == 2:
            earlier += [Message("user", text_of(pair[0], where)), Message("assistant", text_of(pair[1], where))]
        else:
            raise InputError(f"{where}: history holds pairs of a question and its answer, not {str(said)[:40]!r}")
    question = turns(row.get(prompt)) if prompt else []
    beside = [text for name in CONTEXTS if name != prompt and (text := text_of(row.get(name), where))]
    if len(question) == 1:
        question = [Message(question[0].role, "\n\n".join(filter(None, [question[0].content, *beside])))]
    if not any(message.role == "system" for message in question):
        earlier = [Message("system", text) for name in SYSTEMS if (text := text_of(row.get(name), where))] + earlier
    return earlier + question


def are_turns(value: object) -> bool:
    """Return whether a cell holds a list of turns, or its JSON text. [1, 2] is a text, and holds no turns."""
    listed = list_of(value)
    return listed is not None and all(map(is_mapping, listed)) and bool(listed or not isinstance(value, str))


def turns_of(value: object, where: str) -> Conversation:
    """Return the turns in a cell: a list of them, or one alone. Raises InputError where there are none."""
    turns = [value] if isinstance(value, Mapping) else list_of(value)
    if turns is None or not all(isinstance(turn, Mapping) for turn in turns):
        raise InputError(f"{where}: a list of turns with role and content was expected, not {str(value)[:40]!r}")
    return [_message(turn, where) for turn in turns]


def _read_columns(rows: Iterable[Row], columns: list[str], make: Callable[..., Conversation | Skipped]) -> Found:
    """Read one conversation per row: `make` gets the row, its file and line, and the values of these columns."""
    for where, row in rows:
        cells = [cell(row, column, where) for column in columns]
        assert isinstance(row, Mapping)
        yield where, unwanted(row, where) or make(row, where, *cells)


def _from_turns(row: Mapping[str, Any], where: str, value: object) -> Conversation | Skipped:
    """Return the turns in a cell, after the system text, if another column has one."""
    if value is None:
        return Skipped(where, UNANSWERED)
    turns = turns_of(value, where)
    system = [] if any(turn.role == "system" for turn in turns) else asked(row, None, where, lambda value: [])
    return system + turns


def _from_pair(row: Mapping[str, Any], where: str, _: object, *answer: object, prompt: str) -> Conversation | Skipped:
    """Return a prompt and its response, each a text or turns, or the prompt alone where no response is read."""

    def turns(value: object, role: str = "user") -> Conversation:
        return turns_of(value, where) if are_turns(value) else [Message(role, text_of(value, where))]

    messages = asked(row, prompt, where, turns)
    if not messages or not messages[-1].content.strip():
        return Skipped(where, UNASKED)
    return messages + [turn for value in answer for turn in turns(value, "assistant")]


def _read_trees(rows: Iterable[Row]) -> Found:
    """Read the path of best-ranked replies of every English tree, up to the assistant's last."""
    roots: list[tuple[str, Mapping[str, Any]]] = []
    replies: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for where, row in rows:
        for message in _flat(row.get("prompt", row) if isinstance(row, Mapping) else row, where):
            if message.get("deleted"):
                continue
            if (parent := message.get("parent_id")) is None:
                roots.append((where, message))
            else:
                replies[parent].append(message)
    for place, root in roots:
        if root.get("lang", "en") != "en":
            yield place, Skipped(place, "in another language than English")
            continue
        path = [root]
        while below := replies.get(path[-1]["message_id"]):
            if len(path) > len({message["message_id"] for message in path}):
                raise InputError(f"{place}: message {path[-1]['message_id']} answers itself; fix it or leave it out")
            path.append(min(below, key=lambda reply: float("inf") if reply.get("rank") is None else reply["rank"]))
        where = f"message {path[-1]['message_id']}"
        messages = [_message(message, where) for message in path]
        while messages and messages[-1].role != "assistant":
            messages.pop()
        yield where, messages or [_message(root, where)]


def _flat(message: object, where: str) -> Iterator[Mapping[str, Any]]:
    """Yield a message and all replies below it. Raises InputError for what is none."""
    if not isinstance(message, Mapping) or not isinstance(message.get("message_id"), str | int):
        raise InputError(f"{where}: a message with message_id was expected, not {str(message)[:40]!r}")
    replies = message.get("replies") or []
    kinds = {"parent_id": str | int | None, "rank": float | int | None}
    if not isinstance(replies, list) or not all(isinstance(message.get(name), kinds[name]) for name in kinds):
        raise InputError(f"{where}: message {message['message_id']} has a parent_id, rank or replies of another type")
    yield message
    for reply in replies:
        yield from _flat(reply, where)


def _read_story_instructions(rows: Iterable[Row]) -> Found:
    """Read stories: each is a bare text, or the rows up to one that says <|endoftext|>."""
    lines: list[str] = []
    for where, row in rows:
        text = row if isinstance(row, str) else text_of(cell(row, "text", where), where)
        ends = isinstance(row, str) or END_OF_DOCUMENT in text or STORY_KEY.search(text, 1) is not None
        lines.append(text.replace(END_OF_DOCUMENT, ""))
        if ends:
            yield where, _story_instruction("\n".join(lines), where)
            lines = []
    if lines:
        yield "the last story", _story_instruction("\n".join(lines), "the last story")


def _story_instruction(document: str, where: str) -> Conversation | Skipped:
    _, *parts = STORY_KEY.split(document)
    said = {key: text.strip() for key, text in zip(parts[::2], parts[1::2], strict=True)}
    story = said.pop("Story", "")
    request = "\n".join(f"{key}: {text}" for key, text in said.items()) or "Write a story."
    return [Message("user", request), Message("assistant", story)] if story else Skipped(where, "without a story")


def _message(turn: Mapping[str, Any], where: str) -> Message:
    refuse(turn, where)
    role = str(turn.get("role", turn.get("from")))
    said = [turn[key] for key in ("content", "value", "text") if key in turn]
    if not said:
        raise InputError(f"{where}: a turn has no content; there are {column_names(turn)}: give it one, or null")
    content = said[0]
    if (parts := list_of(content)) is not None and all(map(is_mapping, parts)) and not isinstance(content, str):
        # This is content in parts, as in OpenAI's format: texts are put together, and anything else is refused.
        if other := [part.get("type") for part in parts if not isinstance(part.get("text"), str)]:
            raise InputError(f"{where}: a turn holds {other[0]!r}; texts alone are learnt: leave such rows out")
        content = "\n".join(part["text"] for part in parts)
    try:
        return Message(ROLES.get(role, role), text_of(content, where), learn=_is_learnt(turn, WEIGHTS, where))
    except InputError as error:
        raise InputError(f"{where}: {str(error).removeprefix(f'{where}: ')}") from None
