"""tokenizer.json: ours written as one cuts text as we do, and an imported one does all that ours does."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import InputError
from engine.generate import TextStream
from engine.tokenizer import (
    CHAT_TOKENS,
    END_OF_DOCUMENT,
    SPECIAL_TOKENS,
    JsonTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    tokenizer_file,
)
from engine.tokenizer_json import tokenizer_json, with_special_tokens

tokenizers: Any = pytest.importorskip("tokenizers")

TEXTS = [
    "Once upon a time there was a fox.",
    "  two spaces before, and   three within; one after ",
    "\n\n\tif x:\n\t\treturn 12345\n",
    "na\u00efve caf\u00e9 \U0001f642\u200d\u2764\ufe0f \u4e2d\u6587 \u0301",
    "the mark \u2581 of a space, \u2581\u2581, and a NUL \0",
    "<0x41> <unk> <|unknown|>",
    "a" * 1000,
    "",
]
# Few characters, so that tokens meet and compete.
CLOSE = st.lists(st.sampled_from([*" aetho\n.", "the", "  ", "\u2581", "\U0001f642"]), max_size=40).map("".join)


def neox_like(documents: tuple[str, ...], **changes: Any) -> Any:
    """A byte-level tokenizer such as Pythia's: special tokens first, runs of spaces added last."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.normalizer = tokenizers.normalizers.NFC()
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    for name, value in changes.items():
        setattr(backend, name, value)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=350,
        special_tokens=[END_OF_DOCUMENT, "<|padding|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(documents, trainer)
    backend.add_tokens(["    ", "   ", "  "])
    return backend


def as_bytes(backend: Any) -> bytes:
    content: bytes = backend.to_str().encode()
    return content


@pytest.fixture(scope="session")
def exported(tokenizer: Tokenizer) -> JsonTokenizer:
    return JsonTokenizer(tokenizer_json(tokenizer))


@pytest.fixture(scope="session")
def imported(documents: tuple[str, ...]) -> JsonTokenizer:
    backend = neox_like(documents)
    return with_special_tokens(as_bytes(backend), backend.get_vocab_size() + 10)


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text[:12])
def test_ours_as_json_cuts_text_as_it_does_itself(tokenizer: Tokenizer, exported: JsonTokenizer, text: str) -> None:
    assert exported.encode(text) == tokenizer.encode(text)
    assert exported.decode(exported.encode(text)) == text
    # What decodes there is their code, not ours.
    assert exported.processor.decode(exported.encode(text), skip_special_tokens=False) == text


@given(st.one_of(st.text(), CLOSE))
def test_ours_as_json_cuts_any_text_as_it_does_itself(tokenizer: Tokenizer, exported: JsonTokenizer, text: str) -> None:
    assert exported.encode(text) == tokenizer.encode(text)


def test_ours_as_json_keeps_every_token(tokenizer: Tokenizer, exported: JsonTokenizer) -> None:
    assert exported.token_bytes == tokenizer.token_bytes
    assert (exported.vocab_size, exported.special, exported.eod) == (
        tokenizer.vocab_size, tokenizer.special, tokenizer.eod,
    )  # fmt: skip
    assert tokenizer_json(exported) == exported.model


def test_there_special_tokens_are_recognised_and_a_document_begins_as_ours(tokenizer: Tokenizer) -> None:
    backend = tokenizers.Tokenizer.from_str(tokenizer_json(tokenizer).decode())
    assert backend.encode("the fox").ids == [tokenizer.eod, *tokenizer.encode("the fox")]
    ids = backend.encode("<|user|> hi<|end|>", add_special_tokens=False).ids
    assert ids == [tokenizer.special["<|user|>"], *tokenizer.encode(" hi"), tokenizer.special["<|end|>"]]


@given(st.one_of(st.text(alphabet=st.characters(codec="ascii")), CLOSE, st.sampled_from(TEXTS)))
def test_an_imported_tokenizer_gives_text_back(imported: JsonTokenizer, text: str) -> None:
    ids = imported.encode(text)
    assert imported.decode(ids) == text
    stream = TextStream(imported)
    assert "".join(stream.push(index) for index in ids) == text
    assert sum(imported.byte_lengths[ids]) == len(text.encode())


def test_an_imported_tokenizer_cuts_text_as_its_own_code_does(
    documents: tuple[str, ...], imported: JsonTokenizer
) -> None:
    backend = neox_like(documents)
    assert imported.encode_batch(documents) == [backend.encode(text).ids for text in documents]
    assert imported.encode("a    b")[1] == backend.token_to_id("    ")


def test_our_tokens_take_the_ids_after_an_imported_tokenizers_own(
    documents: tuple[str, ...], imported: JsonTokenizer
) -> None:
    own = neox_like(documents).get_vocab_size()
    assert imported.eod == 0
    assert [imported.special[token] for token in CHAT_TOKENS] == list(range(own, own + 4))
    assert imported.vocab_size == own + 10
    assert imported.bytes_of([0, 1, *range(own, own + 10)]) == b""
    assert with_special_tokens(imported.model, own + 10).model == imported.model


@pytest.mark.parametrize("kind", ["exported", "imported"])
def test_text_that_spells_a_special_token_stays_text(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer: JsonTokenizer = request.getfixturevalue(kind)
    text = "".join(SPECIAL_TOKENS) + "<|reserved-370|><|padding|>"
    ids = tokenizer.encode(text)
    assert not set(ids) & set(tokenizer.special.values())
    assert tokenizer.decode(ids) == text


def test_a_folder_says_which_tokenizer_it_has(tokenizer: Tokenizer, imported: JsonTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / tokenizer.file_name)
    assert type(Tokenizer.load(tmp_path)) is SentencePieceTokenizer
    imported.save(tmp_path / imported.file_name)
    loaded = Tokenizer.load(tmp_path)
    assert tokenizer_file(tmp_path).name == "tokenizer.json" and type(loaded) is JsonTokenizer
    assert loaded.fingerprint == imported.fingerprint
    again = pickle.loads(pickle.dumps(loaded))
    assert again.encode("the fox") == imported.encode("the fox")


def test_half_a_surrogate_pair_is_refused(imported: JsonTokenizer) -> None:
    with pytest.raises(InputError, match="surrogate"):
        imported.encode("a\ud800")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"decoder": tokenizers.decoders.WordPiece()}, "BPE, decoded by WordPiece"),
        ({"decoder": None}, "decoded by nothing"),
        ({"normalizer": tokenizers.normalizers.Lowercase()}, "does not give text back"),
        ({"pre_tokenizer": tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)}, "does not give text back"),
    ],
    ids=str,
)
def test_a_tokenizer_of_another_family_is_refused_by_name(
    documents: tuple[str, ...], changes: dict[str, Any], expected: str
) -> None:
    with pytest.raises(InputError, match=expected):
        with_special_tokens(as_bytes(neox_like(documents, **changes)), 400)


def test_what_is_no_tokenizer_or_does_not_fit_is_refused(documents: tuple[str, ...], tmp_path: Path) -> None:
    model = as_bytes(neox_like(documents))
    with pytest.raises(InputError, match="353 tokens with ids up to 352, for a model of 300"):
        with_special_tokens(model, 300)
    other = json.loads(model)
    other["model"] = {"type": "WordLevel", "vocab": {END_OF_DOCUMENT: 0, "a": 1}, "unk_token": "a"}
    other["added_tokens"] = []
    with pytest.raises(InputError, match="WordLevel"):
        with_special_tokens(json.dumps(other).encode(), 300)
    (tmp_path / "tokenizer.json").write_bytes(b'{"model": 3}')
    with pytest.raises(InputError, match=r"tokenizer\.json: it is not a tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(model)
    with pytest.raises(InputError, match="lacks our special tokens"):
        Tokenizer.load(tmp_path)


def test_without_the_package_it_is_said_how_to_get_it(exported: JsonTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(InputError, match=r"pip install 'tokenizers>=0.21'"):
        JsonTokenizer(exported.model)
