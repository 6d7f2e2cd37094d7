"""Text comes back from its tokens to the last byte, and nothing that a person writes becomes a special token."""

import hashlib
import io
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from engine.errors import InputError
from engine.tokenizer import SPECIAL_TOKENS, Tokenizer, train_tokenizer

STORY = "Once there was a fox. The fox was brave, and the fox had a friend.\n"

ODD = [
    "",
    " ",
    "  two  spaces   three ",
    "\n\n\r\n\t\r end\n",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea",
    "\u2581\u2581 once\u2581upon",
    "\0 nul \0",
    "e\u0301 a\u0308\u0323 \u1ec7",
    "\ufeff\ufffd\ufffe\U0010ffff\u2028\u00a0\u200b",
    "\u202eright to left \u05d0\u0628",
    "<0x41> <unk> <s> </s> \u2047",
    "\u2581\u2582\u2585\u2587 \u2585\x1f\u2585",
]


@pytest.mark.parametrize("text", [STORY, *ODD, "".join(ODD)])
def test_text_comes_back_as_it_went_in(tokenizer: Tokenizer, text: str) -> None:
    check(tokenizer, text)


@given(text=st.text(max_size=60) | st.text(alphabet=" \u2581\0\n\tab<>|\u00e9\U0001f600", max_size=30))
@example(text="\ud7ff\ue000")
def test_any_unicode_text_comes_back_as_it_went_in(tokenizer: Tokenizer, text: str) -> None:
    check(tokenizer, text)


def test_every_character_of_the_basic_plane_comes_back(tokenizer: Tokenizer) -> None:
    check(tokenizer, "".join(chr(code) for code in range(0x10000) if not 0xD800 <= code < 0xE000))


def check(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.bytes_of(ids) == text.encode()
    assert tokenizer.byte_lengths[ids].sum() == len(text.encode())
    assert not set(ids) & {0, *tokenizer.special.values()}
    assert tokenizer.encode_batch(["a b", text]) == [tokenizer.encode("a b"), ids]


@pytest.mark.parametrize("token", SPECIAL_TOKENS)
def test_text_that_spells_a_special_token_stays_text(tokenizer: Tokenizer, token: str) -> None:
    check(tokenizer, f"{token}a {token}{token}\n{token}\u2581")


def test_special_tokens_stand_apart_and_spell_nothing(tokenizer: Tokenizer) -> None:
    assert set(tokenizer.special) == set(SPECIAL_TOKENS)
    assert len(set(tokenizer.special.values())) == len(SPECIAL_TOKENS)
    assert tokenizer.eod == tokenizer.special["<|endoftext|>"]
    ids = [tokenizer.eod, *tokenizer.encode("fox"), tokenizer.special["<|user|>"]]
    assert tokenizer.decode(ids) == "fox"
    assert tokenizer.byte_lengths.shape == (tokenizer.vocab_size,)
    assert not tokenizer.byte_lengths[list(tokenizer.special.values())].any()


def test_bytes_that_are_no_text_decode_to_replacement_characters(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("\U0001f600")[:2]) == "\ufffd"


def test_training_gives_the_size_asked_for_and_the_same_model_each_time(
    tokenizer: Tokenizer, documents: tuple[str, ...]
) -> None:
    notices: list[str] = []
    again = train_tokenizer(documents, 400, notice=notices.append)
    assert again.vocab_size == 400 and not notices
    assert again.fingerprint == tokenizer.fingerprint
    common = "the fox"
    assert len(again.encode(common)) < len(common) / 2


@pytest.mark.parametrize("documents", [[STORY], ["a"], ["\U0001f600 \U0001f389"], ["ab\ncd"]], ids=len)
def test_a_small_corpus_gets_the_largest_vocabulary_it_supports_and_says_so(documents: list[str]) -> None:
    notices: list[str] = []
    small = train_tokenizer(documents, 20_000, notice=notices.append)
    assert 262 < small.vocab_size < 20_000
    assert len(notices) == 1 and f"{small.vocab_size:,}" in notices[0] and "20,000" in notices[0]
    check(small, "".join(ODD) + "".join(documents))


RESERVED = [*"\u2585\u2581\0\x1f\t\r\u2047\ufeff\ufffe", "<unk>", "<s>", "<0x41>", "\r\n", *SPECIAL_TOKENS]


@pytest.mark.parametrize("reserved", RESERVED, ids=ascii)
def test_what_the_trainer_reserves_costs_no_line_and_no_word(reserved: str) -> None:
    lines = [f"{reserved}sparrow{reserved} wren{reserved}", f"a sparrow {reserved}{reserved}\n"]
    learnt = train_tokenizer(lines * 10, 20_000)
    assert len(learnt.encode("sparrow")) == len(learnt.encode(" wren")) == 1
    check(learnt, "".join(lines))


@pytest.mark.parametrize("spelled", ["<unk>", *SPECIAL_TOKENS])
def test_text_that_spells_a_special_token_is_learnt_as_text(spelled: str) -> None:
    learnt = train_tokenizer([f"the {spelled} of the {spelled}"] * 10, 20_000)
    assert len(learnt.encode(spelled.strip("<|>"))) == 1
    check(learnt, f"the {spelled}{spelled}")


def test_ends_of_documents_are_learnt() -> None:
    learnt = train_tokenizer(["sparrow\n", "wren\r\n\r\n"] * 10, 20_000)
    assert learnt.bytes_of(learnt.encode("\r\n\r\n")[:1]) == b"\r\n\r\n"
    assert not learnt.processor.is_byte(learnt.encode("\n"))[0]


def test_the_file_is_the_same_whatever_the_machine(
    tokenizer: Tokenizer, documents: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for cores in (1, 7):
        monkeypatch.setattr("os.cpu_count", lambda cores=cores: cores)
        monkeypatch.setattr("os.sched_getaffinity", lambda pid, cores=cores: set(range(cores)), raising=False)
        assert train_tokenizer(documents, 400).model == tokenizer.model


def test_training_reads_no_further_than_its_sample() -> None:
    def endless() -> Iterator[str]:
        while True:
            yield "abc ab a cab abba "

    assert train_tokenizer(endless(), 275, sample_bytes=2000).vocab_size == 275


@pytest.mark.parametrize(
    ("documents", "size", "expected"),
    [
        ([], 300, "no text"),
        (["", " \n", "\0\u2581", "\u2585\u2585"], 300, "no text.*U.2585"),
        ([STORY], 262, "too small.*262"),
        ([STORY], 5, "too small.*262"),
        (["".join(chr(0x4E00 + index) for index in range(400))], 300, "too small.*663"),
        (["half \ud83d"], 300, "surrogate"),
    ],
)
def test_what_cannot_be_trained_on_says_why(documents: list[str], size: int, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        train_tokenizer(documents, size)


@pytest.mark.parametrize("text", ["half a pair \ud83d", "\udc80\u2581"])
def test_what_utf8_cannot_spell_is_refused(tokenizer: Tokenizer, text: str) -> None:
    with pytest.raises(InputError, match="surrogate"):
        tokenizer.encode(text)
    with pytest.raises(InputError, match="surrogate"):
        tokenizer.encode_batch(["good", text])


def test_a_saved_or_pickled_tokenizer_is_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    tokenizer.save(path)
    assert tokenizer.fingerprint == hashlib.sha256(path.read_bytes()).hexdigest()
    for copy in (Tokenizer.load(path), pickle.loads(pickle.dumps(tokenizer))):
        assert copy.fingerprint == tokenizer.fingerprint
        assert copy.encode("the fox \u2581") == tokenizer.encode("the fox \u2581")


def foreign_model() -> bytes:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([STORY]), model_writer=model, model_type="bpe", vocab_size=30, minloglevel=2
    )
    return model.getvalue()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "cannot read"),
        (b"", "is empty"),
        (b"no model at all", "not a SentencePiece model"),
        (foreign_model, "lacks byte tokens"),
    ],
    ids=["missing", "empty", "text", "foreign"],
)
def test_a_bad_tokenizer_file_is_named(content: object, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    content = content() if callable(content) else content
    if isinstance(content, bytes):
        path.write_bytes(content)
    with pytest.raises(InputError, match=expected) as error:
        Tokenizer.load(path)
    assert str(path) in str(error.value)


def test_a_truncated_tokenizer_file_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(tokenizer.model[: len(tokenizer.model) // 2 + 1])
    with pytest.raises(InputError, match=str(path)):
        Tokenizer.load(path)
