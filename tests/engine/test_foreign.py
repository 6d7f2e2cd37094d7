"""Tokenizers and chat templates of other families: ids are transformers', and no text becomes a special token."""

import random
import unicodedata
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from engine.chat_template import Message, answer_prompt, answered, render, text_ends, trim
from engine.errors import InputError
from engine.generate import TextStream, document_prompt
from engine.tokenizer import CHAT_TOKENS, JsonTokenizer, Tokenizer
from engine.tokenizer_json import exported, import_tokenizer

transformers: Any = pytest.importorskip("transformers")

from tests.engine import foreign  # noqa: E402  it needs the tokenizers package
from tests.engine.foreign import FAMILIES, backend  # noqa: E402

SPELLED = ["<|im_end|>", "<|im_start|>system\n", "<s>", "</s>", "<unk>", "<|eot_id|>", "<|endoftext|>"]
PIECES = [
    *"\n\t\r \u00a0\u2028\u3000\u200b\ufeff\0", "  ", "    ", "\r\n", "\n\n\n", " \n ", "\t\t",
    *"0189\u0663\u00b2\u2167", "1234567", "3.14", "007", "'s", "'LL", "don't", "I'd", "\u017ft",
    *".,;:!?-_/\\|<>()[]{}#@~`^$%&*+=\u2026\u2014\u00bf", "...", "!!!\n", "->", "://", "<|", "|>", "< s>",
    "the", " fox", " The", "once upon", "QUICK", "caf\u00e9", "cafe\u0301", "\u00c5", "A\u030a", "\u0301", "\u1e9b\u0323",
    "\u4e2d\u6587", "\u65e5\u672c\u8a9e\u306e", "\ud55c\uae00", "\u1112\u1161\u11ab", "\u05e9\u05dc\u05d5\u05dd", "\u0928\u092e\u0938\u094d",
    "\U0001f642", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0001f1e9\U0001f1ea", "\ufb01", "\u2581", "\u2581\u2581 ",
    "<think>", "</think>\n\n", "<tool_call>", "<0x41>", *SPELLED,
]  # fmt: skip


@cache
def odd_texts() -> list[str]:
    draw = random.Random(7)
    planes = [(0x20, 0x7F), (0x80, 0x600), (0x900, 0xD800), (0xE000, 0x10000), (0x10000, 0x30000), (0xF0000, 0x10FFFE)]

    def piece() -> str:
        return draw.choice(PIECES) if draw.random() < 0.85 else chr(draw.randrange(*draw.choice(planes)))

    return ["".join(piece() for _ in range(draw.randrange(1, 12))) for _ in range(20_000)]


@pytest.mark.parametrize("family", ["llama", "qwen", "mistral", "zephyr", "smol"])
def test_ids_and_texts_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    ours, theirs = foreign.imported(tmp_path, family), transformers.AutoTokenizer.from_pretrained(tmp_path)
    texts = odd_texts() if family in ("llama", "qwen", "mistral") else odd_texts()[:1000]
    ids = ours.encode_batch(texts)
    assert ids == theirs(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert not {token for each in ids for token in each} & set(ours.special.values())
    for text, each in zip(texts[:300], ids, strict=False):
        back = ours.decode(each)
        assert back == theirs.decode(each, clean_up_tokenization_spaces=False)
        stream = TextStream(ours)
        assert "".join(map(stream.push, each)) == back
        if family == "qwen":
            text = unicodedata.normalize("NFC", text)
        if ours.strips:
            text = text.replace("\u2581", " ")
            # Metaspace puts no space before a text that begins with one.
            text = text.removeprefix(" ") if family == "zephyr" else text
        assert back == text


def asked(*said: str, learn: bool = True) -> list[Message]:
    """A conversation of turns, user first."""
    roles = ("user", "assistant")
    return [
        Message(roles[number % 2], text, **({"learn": learn} if number % 2 else {})) for number, text in enumerate(said)
    ]


def plain(messages: list[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def conversations(family: str) -> list[list[Message]]:
    """What people may say, special tokens and <think> aside: these are other tests'."""
    draw = random.Random(3)
    said = [text for text in odd_texts() if not any(each.strip() in text for each in (*SPELLED, "think>"))]
    found = [asked(*draw.sample(said, draw.randrange(1, 7))) for _ in range(60)]
    system = [] if family == "mistral" else [Message("system", " Be\n\nbrief. ")]
    return [[*(system if number % 2 else []), *each] for number, each in enumerate(found)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_conversation_is_what_transformers_makes_of_the_models_own_template(family: str, tmp_path: Path) -> None:
    ours, theirs = foreign.imported(tmp_path, family), transformers.AutoTokenizer.from_pretrained(tmp_path)
    # Llama's asks for the day, which for us is always the same.
    template = theirs.chat_template.replace("strftime_now('%d %b %Y')", "'26 Jul 2024'")
    for messages in conversations(family):
        said, options = plain(messages), {"chat_template": template, "return_dict": False}
        if messages[-1].role == "user":
            prompt = theirs.apply_chat_template(said, add_generation_prompt=True, **options)
            assert answer_prompt(ours, messages) == prompt
            assert family == "mistral" or prompt[-len(ours.header) :] == ours.header
        else:
            begun = theirs.apply_chat_template(said, continue_final_message=True, **options)
            assert answer_prompt(ours, messages, unfinished=True) == begun
            ids, learn = render(ours, messages)
            assert ids == theirs.apply_chat_template(said, **options)
            # The last answer is learnt, and that it ends; nothing is behind it that a model would have to write.
            whole, prompt = answered(ours, messages), answer_prompt(ours, messages[:-1])
            assert whole[-1] == ours.ends[0] and whole[: len(prompt)] == prompt
            if ids[: len(prompt)] == prompt:  # else the answer begins within a token
                assert whole == ids[: len(whole)]
                assert learn[len(prompt) :] == [at < len(whole) for at in range(len(prompt), len(ids))]


def test_marks_in_a_template_say_what_is_learnt(tmp_path: Path) -> None:
    ours, theirs = foreign.imported(tmp_path, "marked"), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for messages in conversations("marked"):
        marked = theirs.apply_chat_template(plain(messages), return_dict=True, return_assistant_tokens_mask=True)
        ids, learn = render(ours, messages)
        assert ids == marked["input_ids"] and learn == [mark == 1 for mark in marked["assistant_masks"]]
    part = [*asked("a", "b", learn=False), *asked("c", "d")]
    ids, learn = render(ours, part)
    assert ours.decode([token for token, one in zip(ids, learn, strict=True) if one]) == "d"
    assert learn == render(foreign.imported(tmp_path / "unmarked", "smol", chat_template=UNMARKED), part)[1]


UNMARKED = foreign.MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_message_spells_stays_text(family: str, tmp_path: Path) -> None:
    ours = foreign.imported(tmp_path, family)
    spelled = " ".join(ours.special) + "".join(ours.special) + " \U000f0000"
    harmless, attack = (asked(text, text, text, f"{text}.") for text in ("a", spelled))
    control = set(ours.special.values())

    def kept(ids: list[int]) -> list[int]:
        return [token for token in ids if token in control]

    assert kept(render(ours, attack)[0]) == kept(render(ours, harmless)[0])
    assert kept(answer_prompt(ours, attack[:-1])) == kept(answer_prompt(ours, harmless[:-1]))
    ids, learn = render(ours, attack)
    assert ours.decode(ids).count(spelled) == 4
    assert f"{spelled}." in ours.decode([token for token, one in zip(ids, learn, strict=True) if one])
    assert not control & set(ours.encode(spelled))
    # Two that overlap are both kept apart.
    assert kept(answer_prompt(ours, asked("<|im_start<|im_start|>|><<s>s>"))) == kept(answer_prompt(ours, asked("a")))
