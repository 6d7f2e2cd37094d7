"""Conversations as token ids: one template for finetuning, chat, server and rollouts, so that they cannot differ.

    <|endoftext|><|system|>text<|end|><|user|>text<|end|><|assistant|>text<|end|><|user|>...

A message is encoded as text between special tokens, which text cannot spell: nothing in it can end a turn or begin
another. An imported model may have a template of its own (Tokenizer.foreign), a program in Jinja, which transformers
runs in a sandbox. There, too, no message spells a special token.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any

from engine.errors import InputError
from engine.tokenizer import CHAT_TOKENS, END_OF_DOCUMENT, Foreign, JsonTokenizer, Tokenizer

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
    """Return a conversation's ids, and which of them to learn: what the assistant says, and that it ends there.

    Raises InputError where a foreign template refuses the messages, or does not tell what there is to learn.
    """
    if tokenizer.foreign:
        return _Template(tokenizer, messages).learnt()
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
    if unfinished and (not messages or messages[-1].role != "assistant"):
        raise InputError("the last message must be the assistant's, to be gone on with")
    if tokenizer.foreign:
        options = {"add_generation_prompt": not unfinished, "continue_final_message": unfinished}
        return _Template(tokenizer, messages).ids(**options)
    ids = render(tokenizer, messages)[0]
    if not unfinished:
        return [*ids, tokenizer.special["<|assistant|>"]]
    return ids[:-1]


def answer_ends(tokenizer: Tokenizer) -> frozenset[int]:
    """Return the ids that end an answer."""
    return text_ends(tokenizer, chat=True)


def answered(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Return the ids of a conversation up to the end of its last answer, as if a model had written that."""
    if not tokenizer.foreign:
        return render(tokenizer, messages)[0]
    return _Template(tokenizer, messages).answered()


def text_ends(tokenizer: Tokenizer, *, chat: bool) -> frozenset[int]:
    """Return the ids that end what a run writes: a document, or an answer where it has learnt to chat (recipe.chat)."""
    return frozenset(tokenizer.ends if chat else (tokenizer.eod,))


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


# A template may ask for the day. The same conversation must be the same tokens tomorrow, so that it is always this one.
DAY = "{% macro strftime_now(format) %}{{ format | replace('%d', '26') | replace('%b', 'Jul') | replace('%B', 'July')"
DAY += " | replace('%Y', '2024') }}{% endmacro %}\n"
UNTOLD = "the model's own chat template does not tell which tokens of a conversation are the answers"
MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")


class TemplateError(InputError):
    """A foreign chat template does not take these messages, or does not tell what of them is the answers."""


class _Template:
    """Messages in a foreign template: a text, of which the tokenizer makes ids as transformers does.

    What a message holds becomes no special token: see JsonTokenizer.shield.
    """

    def __init__(self, tokenizer: Tokenizer, messages: Sequence[Message]) -> None:
        assert isinstance(tokenizer, JsonTokenizer) and tokenizer.foreign is not None
        self.tokenizer, self.foreign, self.messages = tokenizer, tokenizer.foreign, messages
        template = self.foreign.chat_template
        contents, self.mark = tokenizer.shield([message.content for message in messages], template)
        self.said = [{"role": message.role, "content": text} for message, text in zip(messages, contents, strict=True)]
        self.template = (DAY if "strftime_now" in template else "") + template

    def text(self, messages: int | None = None, **options: Any) -> tuple[str, list[tuple[int, int]]]:
        """Return the text of the first messages, and where in it marks of `generation` begin and end, if asked for."""
        try:
            # It takes more than a second, and no model of ours needs it.
            from transformers.utils.chat_template_utils import render_jinja_template

            render: Any = render_jinja_template
            texts, spans = render([self.said[:messages]], chat_template=self.template, **self.foreign.texts, **options)
        except ImportError as error:
            lacks = f"a model's own chat template needs transformers and jinja2 ({error})"
            raise InputError(f"{lacks}: pip install -U 'transformers>=4.56' 'jinja2>=3.1.6'") from None
        except Exception as error:  # a template is a program, and may fail in any way
            raise TemplateError(f"the model's chat template refuses the conversation: {error}") from None
        return texts[0], spans[0] if spans else []

    def ids(self, **options: Any) -> list[int]:
        return [index for index, _, _ in self.tokenizer.read(self.text(**options)[0], self.mark)]

    def learnt(self) -> tuple[list[int], list[bool]]:
        marked = MARKED.search(self.template) is not None
        text, spans = self.text(return_assistant_tokens_mask=marked)
        answers = [n for n, message in enumerate(self.messages) if message.role == "assistant"]
        wanted = [n for n in answers if self.messages[n].learn]
        if not marked:
            spans = [span for n in wanted if (span := self.answer(n, text))]
        elif len(spans) == len(answers):
            spans = [span for n, span in zip(answers, spans, strict=True) if n in wanted]
        if (wanted and not spans) or (marked and wanted != answers and len(spans) != len(wanted)):
            raise TemplateError(UNTOLD)
        found = self.tokenizer.read(text, self.mark)
        learn = [any(start < last and first < end for first, last in spans) for _, start, end in found]
        return [index for index, _, _ in found], learn

    def answer(self, number: int, whole: str) -> tuple[int, int] | None:
        """Return where the answer that is this message begins and ends in the text of all, without marks.

        It is what follows the prompt for it, up to its end. None where the text of all shows it in another way, as when
        a template leaves out what earlier answers thought.
        """
        try:
            (begun, _), (said, _) = self.text(number, add_generation_prompt=True), self.text(number + 1)
        except TemplateError:
            return None
        ends = "|".join(re.escape(self.tokenizer.name(index)) for index in self.foreign.ends)
        end = re.compile(ends).search(said, len(begun)) if said.startswith(begun) else None
        return (len(begun), end.end()) if end and whole.startswith(said[: end.end()]) else None

    def answered(self) -> list[int]:
        text, _ = self.text()
        if not (span := self.answer(len(self.messages) - 1, text)):
            raise TemplateError(UNTOLD)
        prompt = self.tokenizer.read(text[: span[0]], self.mark)
        # What an answer begins with may be one token with what comes before it; no model writes that.
        said = [each for each in self.tokenizer.read(text[: span[1]], self.mark) if each[1] >= span[0]]
        return [index for index, _, _ in prompt + said]


def learn_template(foreign: Foreign) -> Foreign:
    """Return it with what its template tells: the header that ends a prompt, and the token that ends an answer first.

    Raises TemplateError where nothing tells a prompt from other text.
    """
    tokenizer, texts = JsonTokenizer(foreign.dumps()), ("a", "7", "7 ", "a\n")
    prompts = [answer_prompt(tokenizer, [Message("user", text)]) for text in texts]
    # As far back as all of them are alike.
    alike = takewhile(lambda tokens: len({*tokens}) == 1, zip(*(prompt[::-1] for prompt in prompts), strict=False))
    if not (header := [tokens[0] for tokens in alike][::-1]):
        raise TemplateError("it does not say where an answer begins")
    whole = _Template(tokenizer, [Message("user", "a"), Message("assistant", "b")]).ids()
    ends = [index for index in whole[len(prompts[0]) :] if index in tokenizer.special.values()][:1]
    return replace(foreign, header=header, ends=[*dict.fromkeys([*ends, *foreign.ends])])
