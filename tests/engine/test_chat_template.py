import pytest

from engine.chat_template import END, ROLES, Message, answer_ends, answer_prompt, render, trim
from engine.errors import InputError
from engine.tokenizer import SPECIAL_TOKENS, Tokenizer, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["the cat sat on the mat and told a story to the rabbit"] * 20, 300)


CONVERSATION = [
    Message("system", "be brief"),
    Message("user", "a story"),
    Message("assistant", "the cat sat"),
    Message("user", "more"),
    Message("assistant", "the end"),
]


def test_a_conversation_is_its_tokens_and_texts_in_order(tokenizer: Tokenizer) -> None:
    ids, _ = render(tokenizer, CONVERSATION)
    expected = [tokenizer.eod]
    for message in CONVERSATION:
        expected.append(tokenizer.special[f"<|{message.role}|>"])
        expected += tokenizer.encode(message.content)
        expected.append(tokenizer.special[END])
    assert ids == expected


def test_only_what_the_assistant_says_and_its_end_is_learnt(tokenizer: Tokenizer) -> None:
    ids, learn = render(tokenizer, CONVERSATION)
    assert len(ids) == len(learn)
    learnt = [token for token, wanted in zip(ids, learn, strict=True) if wanted]
    end = tokenizer.special[END]
    assert learnt == [*tokenizer.encode("the cat sat"), end, *tokenizer.encode("the end"), end]


def test_a_prompt_is_the_beginning_of_the_conversation_that_answers_it(tokenizer: Tokenizer) -> None:
    ids, _ = render(tokenizer, CONVERSATION)
    prompt = answer_prompt(tokenizer, CONVERSATION[:-1])
    assert ids[: len(prompt)] == prompt
    assert ids[len(prompt) :] == [*tokenizer.encode("the end"), tokenizer.special[END]]
    begun = answer_prompt(tokenizer, CONVERSATION, unfinished=True)
    assert begun == ids[:-1]
    with pytest.raises(InputError, match="must be the assistant's"):
        answer_prompt(tokenizer, CONVERSATION[:-1], unfinished=True)
    assert answer_ends(tokenizer) == {tokenizer.special[END], tokenizer.eod}


@pytest.mark.parametrize("token", SPECIAL_TOKENS)
def test_text_that_spells_a_special_token_stays_text(tokenizer: Tokenizer, token: str) -> None:
    ids, _ = render(tokenizer, [Message("user", f"a{token}b")])
    assert [token for token in ids if token in tokenizer.special.values()] == [
        tokenizer.eod,
        tokenizer.special["<|user|>"],
        tokenizer.special[END],
    ]
    assert tokenizer.decode(ids) == f"a{token}b"


def test_the_oldest_turns_go_first_and_the_system_message_stays(tokenizer: Tokenizer) -> None:
    messages = CONVERSATION[:-1]
    whole = len(answer_prompt(tokenizer, messages))
    assert trim(tokenizer, messages, whole) == (messages, 0)
    # One token less: the first question goes, and its answer with it.
    assert trim(tokenizer, messages, whole - 1) == ([messages[0], messages[-1]], 2)
    with pytest.raises(InputError, match="does not fit"):
        trim(tokenizer, messages, 5)


def test_an_unknown_role_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="'tool'.*" + ", ".join(ROLES)):
        Message("tool", "text")
