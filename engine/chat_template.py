"""Conversations as token ids: one template for finetuning, chat, server and rollouts, so that they cannot differ.

    <|endoftext|><|system|>text<|end|><|user|>text<|end|><|assistant|>text<|end|><|user|>...

A message is encoded as text between special tokens, which text cannot spell: nothing in it can end a turn or begin
another.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.errors import InputError
from engine.tokenizer import CHAT_TOKENS, END_OF_DOCUMENT, Tokenizer

ROLES = ("system", "user", "assistant")
END = "<|end|>"
assert (*(f"<|{role}|>" for role in ROLES), END) == CHAT_TOKENS

# The same template for transformers: an exported model carries it along. As in our API, a developer speaks as the
# system, and a content in parts is their texts. Between the marks of `generation` is what `render` learns; only
# transformers knows those marks, so that for others there is a template without.
_CONTENT = (
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] != 'text' %}{{ raise_exception('every part of a content must be of type text') }}{% endif %}"
    "{{ part['text'] }}{% endfor %}{% endif %}{{ '" + END + "' }}"
)
JINJA = (
    "{{ '" + END_OF_DOCUMENT + "' }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ '<|assistant|>' }}{% generation %}" + _CONTENT + "{% endgeneration %}"
    "{% elif message['role'] in ['system', 'developer'] %}{{ '<|system|>' }}" + _CONTENT + "{% elif message['role'] == "
    "'user' %}{{ '<|user|>' }}" + _CONTENT + "{% else %}"
    "{{ raise_exception('a role must be one of system, developer, user, assistant') }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
PLAIN_JINJA = JINJA.replace("{% generation %}", "").replace("{% endgeneration %}", "")
# What exports of older versions carry.
OLD_JINJA = (
    "{{ '" + END_OF_DOCUMENT + "' }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '" + END + "' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True)
class Message:
    role: str
    content: str
    # Is what the assistant says here to be learnt, or only to be gone on from?
    learn: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise InputError(f"a message's role is {self.role!r}; it must be one of {', '.join(ROLES)}")


def render(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
    """Return a conversation's ids, and which of them to learn: what the assistant says, and that it ends there."""
    ids, learn = [tokenizer.eod], [False]
    encoded = tokenizer.encode_batch([message.content for message in messages])
    for message, text in zip(messages, encoded, strict=True):
        ids += [tokenizer.special[f"<|{message.role}|>"], *text, tokenizer.special[END]]
        learn += [False] + [message.role == "assistant" and message.learn] * (len(text) + 1)
    return ids, learn


def answer_prompt(tokenizer: Tokenizer, messages: Sequence[Message], *, unfinished: bool = False) -> list[int]:
    """Return the ids after which the assistant's next answer comes, or the rest of its `unfinished` last one.

    Raises InputError where the last message is not the assistant's, and should be.
    """
    ids = render(tokenizer, messages)[0]
    if not unfinished:
        return [*ids, tokenizer.special["<|assistant|>"]]
    if not messages or messages[-1].role != "assistant":
        raise InputError("the last message must be the assistant's, to be gone on with")
    return ids[:-1]


def answer_ends(tokenizer: Tokenizer) -> frozenset[int]:
    """Return the ids that end an answer."""
    return text_ends(tokenizer, chat=True)


def text_ends(tokenizer: Tokenizer, *, chat: bool) -> frozenset[int]:
    """Return the ids that end what a run writes: a document, or an answer where it has learnt to chat (recipe.chat)."""
    return frozenset((tokenizer.special[END], tokenizer.eod) if chat else (tokenizer.eod,))


def trim(tokenizer: Tokenizer, messages: Sequence[Message], room: int) -> tuple[list[Message], int]:
    """Return the messages whose prompt takes at most `room` tokens, and how many were dropped.

    The oldest go first, an answer with its question; a system message stays. Raises InputError where not even the last
    message fits.
    """
    system = [message for message in messages[:1] if message.role == "system"]
    turns = list(messages[len(system) :])
    for first in range(len(turns)):
        kept = [*system, *turns[first:]]
        # A conversation that began with an answer would be like none that the model has learnt from.
        if turns[first].role != "assistant" and len(answer_prompt(tokenizer, kept)) <= room:
            return kept, first
    raise InputError(f"the message does not fit: with the system message it takes more than {room} tokens")
