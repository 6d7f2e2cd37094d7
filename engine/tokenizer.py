"""Text to token ids and back, without losing a byte.

All other code knows only `Tokenizer`. There are two kinds of it: SentencePieceTokenizer, which we train, and
JsonTokenizer, which an imported model brings along. In both, special tokens stand apart from text: text that merely
spells one stays text.
"""

import hashlib
import io
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np

from engine import records
from engine.disk import write_atomically
from engine.errors import InputError
from engine.progress import listener

END_OF_DOCUMENT = "<|endoftext|>"
CHAT_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
SPECIAL_TOKENS = (END_OF_DOCUMENT, *CHAT_TOKENS)

# SentencePiece writes a space as this character. Text that really holds the character would come back as a space, so
# `encode` spells it in byte tokens instead; and so it does NUL, which SentencePiece drops.
SPACE_MARK = "\u2581"
UNSAFE = re.compile(f"([{SPACE_MARK}\0])")

# The trainer leaves out every line that holds U+2585, which is its mark for unknown characters, and takes SPACE_MARK
# for a space. NUL, which it never makes a token of, stands for both: the words on either side are learnt.
RESERVED = re.compile(f"[{SPACE_MARK}\u2585]")
BOUNDARY = "\0"
# It removes text that spells a token of its own, such as <unk> in WikiText. Cut in two, the spelling is learnt as text.
SPELLED = re.compile("(<unk|<0x[0-9A-F]{2}|" + "|".join(re.escape(token[:-1]) for token in SPECIAL_TOKENS) + ")(?=>)")

FOREIGN = b'{"files": '  # what the file of a Foreign begins with

SAMPLE_BYTES = 24_000_000
SENTENCE_BYTES = 4192


def tokenizer_file(folder: str | os.PathLike[str]) -> Path:
    """Return the file where a run, or prepared data, keeps its tokenizer: tokenizer.json where it was imported."""
    imported = Path(folder) / JsonTokenizer.file_name
    return imported if imported.exists() else Path(folder) / SentencePieceTokenizer.file_name


Made = TypeVar("Made")


def read_tokenizer(path: Path, make: Callable[[bytes], Made]) -> Made:
    """Return what `make` makes of a tokenizer file. Raises InputError, which names the file."""
    try:
        return make(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read the tokenizer {path}: {error.strerror or error}") from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


@dataclass(frozen=True)
class Foreign:
    """A tokenizer of another family as a run keeps it: its files, unchanged, and what follows from them."""

    files: dict[str, str]  # their texts, by their names
    rows: int  # of the model's embedding, which may be more than there are tokens
    begin: int  # begins a text
    eod: int  # ends a document
    ends: list[int]  # each ends an answer; the first is what the chat template writes
    header: list[int]  # ends a prompt: after it an answer begins
    chat_template: str
    texts: dict[str, str]  # of special tokens, by the names that a chat template knows: bos_token, eos_token
    ids: dict[str, int | list[int] | None]  # what their config.json says of bos, eos and pad

    def dumps(self) -> bytes:
        return json.dumps(asdict(self)).encode()


class Tokenizer(ABC):
    """A vocabulary and the way to cut text into it. Get one with `Tokenizer.load` or `train_tokenizer`."""

    file_name: ClassVar[str]
    model: bytes  # what the file holds
    processor: Any  # the library's own tokenizer
    vocab_size: int
    special: dict[str, int]  # the ids of special tokens: SPECIAL_TOKENS, or what a foreign tokenizer has
    foreign: Foreign | None = None
    # As in Foreign.
    begin: int
    eod: int
    ends: list[int]
    header: list[int]
    strips = False  # does a text begin with the token of a space that is none of its own?

    @staticmethod
    def load(path: str | os.PathLike[str]) -> "Tokenizer":
        """Read a tokenizer file of either kind, or the one in a folder. Raises InputError where it is not one."""
        path = tokenizer_file(path) if Path(path).is_dir() else Path(path)
        return read_tokenizer(path, _open)

    def save(self, path: str | os.PathLike[str]) -> None:
        write_atomically(Path(path), self.model)

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[bytes]]:
        return type(self), (self.model,)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the model file: what shards and checkpoints remember it by."""
        return hashlib.sha256(self.model).hexdigest()

    def _name(self, special: dict[str, int]) -> None:
        self.special, (*_, assistant, end) = special, special.values()
        self.begin = self.eod = special[END_OF_DOCUMENT]
        self.header, self.ends = [assistant], [end, self.eod]

    def document(self, ids: Sequence[int]) -> list[int]:
        """Return a text's ids as a document: with what begins and ends it, up to where the next one begins."""
        return [self.begin, *ids, *([self.eod] if self.eod != self.begin else []), self.begin]

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text. None of them is a special token, whatever the text spells."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of many texts, by one call into the library. Raises InputError for what UTF-8 cannot spell."""
        for text in texts:
            _check_unicode(text)
        return self._encode(list(texts))

    @abstractmethod
    def _encode(self, texts: list[str]) -> list[list[int]]: ...

    @abstractmethod
    def name(self, index: int) -> str:
        """Return what the vocabulary calls a token, such as <|user|>."""

    @property
    @abstractmethod
    def token_bytes(self) -> list[bytes]:
        """The UTF-8 bytes that each id stands for; none for special tokens."""

    @cached_property
    def byte_lengths(self) -> np.ndarray:
        """The number of UTF-8 bytes that each id stands for, int64 [vocab]. Bits per byte are counted with it."""
        return np.array([len(spelled) for spelled in self.token_bytes], dtype=np.int64)

    def bytes_of(self, ids: Iterable[int]) -> bytes:
        """Return the bytes that the ids spell. Special tokens spell nothing."""
        return b"".join(map(self.token_bytes.__getitem__, ids))

    def decode(self, ids: Iterable[int], errors: str = "replace") -> str:
        """Return the text that the ids spell. Bytes that are no UTF-8 (a model may write any) become U+FFFD."""
        text = self.bytes_of(ids).decode("utf-8", errors)
        return text.removeprefix(" ") if self.strips else text


def _open(model: bytes) -> Tokenizer:
    try:
        tokenizer = JsonTokenizer(model) if model.startswith(b"{") else SentencePieceTokenizer(model)
        if len(tokenizer.token_bytes) != tokenizer.vocab_size:
            raise ValueError(f"{len(tokenizer.token_bytes)} pieces for {tokenizer.vocab_size} ids")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError, MemoryError) as error:
        # The libraries take damaged files that they cannot work with.
        raise _damaged(f"{type(error).__name__}: {error}") from None
    return tokenizer


def _damaged(what: str) -> InputError:
    return InputError(f"it is damaged ({what}); bring it back from a copy")


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model (Kudo & Richardson 2018, arXiv:1808.06226) that changes nothing in a text.

    There is no normalisation, no added and no merged space, and byte tokens for whatever the vocabulary does not hold.
    """

    file_name = "tokenizer.model"

    def __init__(self, model: bytes) -> None:
        import sentencepiece

        if not model:
            # SentencePiece takes no bytes for no model yet, and fails later.
            raise InputError("it is empty; expected a SentencePiece model")
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError:
            raise InputError("it is not a SentencePiece model") from None
        self.model, self.vocab_size = model, self.processor.vocab_size()
        self._name({token: self.processor.piece_to_id(token) for token in SPECIAL_TOKENS})
        self.byte_ids = [self.processor.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        if self.processor.unk_id() in (*self.special.values(), *self.byte_ids):
            raise InputError(
                "this SentencePiece model lacks byte tokens or our special tokens; train one with `gpt tokenizer train`"
            )

    def _encode(self, texts: list[str]) -> list[list[int]]:
        if any(UNSAFE.search(text) for text in texts):
            return [self._encode_unsafe(text) for text in texts]
        if len(texts) == 1:  # for a list it starts a thread, which takes ten times as long as a short text
            return [self.processor.encode(texts[0])]
        encoded: list[list[int]] = self.processor.encode(texts, num_threads=1)
        return encoded

    def _encode_unsafe(self, text: str) -> list[int]:
        ids: list[int] = []
        for number, part in enumerate(UNSAFE.split(text)):
            # Every other part is an unsafe character.
            ids += [self.byte_ids[byte] for byte in part.encode()] if number % 2 else self.processor.encode(part)
        return ids

    def name(self, index: int) -> str:
        return str(self.processor.id_to_piece(index))

    @cached_property
    def token_bytes(self) -> list[bytes]:
        spelled = [b""] * self.vocab_size
        for index in range(self.vocab_size):
            if not (self.processor.is_control(index) or self.processor.is_unknown(index)):
                spelled[index] = self.name(index).replace(SPACE_MARK, " ").encode()
        for byte, index in enumerate(self.byte_ids):
            spelled[index] = bytes([byte])
        return spelled


class JsonTokenizer(Tokenizer):
    """A tokenizer.json, Hugging Face's kind of file, with our special tokens in it. Needs the `tokenizers` package.

    Two families are known: byte-level BPE, which GPT-2, Llama 3 and Qwen have, and BPE over characters with byte tokens
    for all others, which Llama 2 and Mistral have, and ours. What a normaliser changes in a text stays changed.

    Of a model that begins a text, or chats, in a way of its own, the file holds a Foreign: `tokenizers` refuses a
    tokenizer.json with anything beside.
    """

    file_name = "tokenizer.json"

    def __init__(self, model: bytes) -> None:
        self.model = self.json = model
        if model.startswith(FOREIGN):
            self.foreign = records.conform(records.parse(model.decode()), Foreign, _damaged)
            self.json = self.foreign.files[self.file_name].encode()
            self.begin, self.eod = self.foreign.begin, self.foreign.eod
            self.ends, self.header = self.foreign.ends, self.foreign.header
        self.processor = self._open()
        # Text that spells a special token is encoded as text.
        self.processor.encode_special_tokens = True
        self.vocab_size = self.foreign.rows if self.foreign else self.processor.get_vocab_size()
        if self.foreign:
            added = self.processor.get_added_tokens_decoder().items()
            self.special = {token.content: index for index, token in added if token.special}
            unknown = self.processor.model.unk_token
            self.control = frozenset(index for name, index in self.special.items() if name != unknown)
            space = self.bytes_of(once := self.encode("a"))[:1] == b" "
            self.strips = space and self.processor.decode(once) == "a"
            return
        self._name({token: self.processor.token_to_id(token) for token in SPECIAL_TOKENS})
        if None in self.special.values():
            raise InputError("this tokenizer.json lacks our special tokens, which `gpt import` adds")

    def _open(self) -> Any:
        backend = open_json(self.json)
        if self.foreign:
            # What begins or ends an answer is no text, even where they forgot to say so.
            added = backend.get_added_tokens_decoder()
            control = {self.begin, self.eod, *self.ends, *(added.keys() & self.header)}
            control -= {index for index, token in added.items() if token.special}
            backend.add_special_tokens([backend.id_to_token(index) for index in control])
        return backend

    @cached_property
    def reader(self) -> Any:
        """The library's tokenizer that recognises special tokens in a text."""
        return self._open()

    def read(self, text: str, mark: str) -> list[tuple[int, int, int]]:
        """Return the ids of a text, special tokens recognised but where `mark` is in them, and where each is in it.

        The mark itself, which `shield` has put there, leaves no token.
        """
        found = self.reader.encode(text, add_special_tokens=False)
        spans = [(index, *span) for index, span in zip(found.ids, found.offsets, strict=True)]
        kept = [(index, start, end) for index, start, end in spans if text[start:end] != mark]
        # One that is spelled by other characters, which a normaliser makes the same, comes from a message, too.
        forged = (index in self.control and self.name(index) not in text[start:end] for index, start, end in kept)
        if any(forged) or any(mark in text[start:end] for _, start, end in kept):
            raise InputError("this tokenizer cannot keep text that spells a special token apart from that token")
        return kept

    def shield(self, texts: Sequence[str], beside: str = "") -> tuple[list[str], str]:
        """Return the texts with a mark within all that spells a special token, and the mark.

        It is a character that neither they nor `beside` hold, of no script, and no white space.
        """
        for text in texts:
            _check_unicode(text)
        mark = next(mark for mark in map(chr, range(0xF0000, 0x10FFFE)) if mark not in beside.join(["", *texts, ""]))
        spelled = re.compile(f"(?=(?:{'|'.join(map(re.escape, self.special))}))(?s:.)")
        return [spelled.sub(rf"\g<0>{mark}", text) for text in texts], mark

    def _encode(self, texts: list[str]) -> list[list[int]]:
        found = [each.ids for each in self.processor.encode_batch_fast(texts, add_special_tokens=False)]
        # A vocabulary that holds a special token as a word, too, gives it for text where nothing cuts the text there.
        for number, ids in enumerate(found):
            if self.foreign and not self.control.isdisjoint(ids):
                (text,), mark = self.shield([texts[number]])
                found[number] = [index for index, _, _ in self.read(text, mark)]
        return found

    def name(self, index: int) -> str:
        return self.processor.id_to_token(index) or f"<|unused-{index}|>"

    @cached_property
    def token_bytes(self) -> list[bytes]:
        # Written anew: what old versions of `tokenizers` left out is there then.
        content = json.loads(self.processor.to_str())
        spell = json_speller(content)
        spelled = [b""] * self.vocab_size
        for name, index in content["model"]["vocab"].items():
            if name != content["model"].get("unk_token"):
                spelled[index] = spell(name)
        # Some of these stand for text: those of GPT-NeoX for runs of spaces.
        for added in content["added_tokens"]:
            spelled[added["id"]] = b"" if added["special"] else added["content"].encode()
        for index in self.special.values():
            spelled[index] = b""
        return spelled


def open_json(model: bytes) -> Any:
    """Return a tokenizer.json's tokenizer from the `tokenizers` package. Raises InputError where it is not one."""
    try:
        import tokenizers
    except ImportError:
        raise InputError("a tokenizer.json needs the tokenizers package: pip install 'tokenizers>=0.21'") from None
    try:
        backend = tokenizers.Tokenizer.from_str(model.decode())
    except Exception as error:  # tokenizers raises nothing more precise
        raise InputError(f"it is not a tokenizer.json: {error}") from None
    backend.no_truncation()
    backend.no_padding()
    return backend


def json_speller(content: dict[str, Any]) -> Callable[[str], bytes]:
    """Return what turns a token's name in this tokenizer.json into its bytes. Raises InputError for another family."""
    model, decoder = content["model"], content["decoder"]
    kinds = [each["type"] for each in (decoder or {}).get("decoders", [decoder]) if each]
    if model["type"] == "BPE" and "ByteLevel" in kinds:
        # A character stands for each byte (bytes_to_unicode in GPT-2's encoder.py): printable bytes for themselves,
        # the others counted from U+0100 on.
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = [byte for byte in range(256) if byte not in printable]
        characters = [*map(chr, printable), *(chr(0x100 + number) for number in range(len(others)))]
        byte_of = {character: bytes([byte]) for character, byte in zip(characters, [*printable, *others], strict=True)}
        return lambda name: b"".join(byte_of.get(character) or character.encode() for character in name)
    if model["type"] == "BPE" and model.get("byte_fallback"):
        space = SPACE_MARK if SPACE_MARK in str(decoder) else " "

        def spell(name: str) -> bytes:
            byte = re.fullmatch("<0x([0-9A-F]{2})>", name)
            return bytes.fromhex(byte[1]) if byte else name.replace(space, " ").encode()

        return spell
    raise InputError(
        f"its model is {model['type']}, decoded by {', '.join(kinds) or 'nothing'}; expected BPE, either byte-level or "
        "with byte fallback"
    )


def train_tokenizer(
    documents: Iterable[str],
    vocab_size: int,
    *,
    sample_bytes: int = SAMPLE_BYTES,
    notice: Callable[[str], None] = lambda message: None,
) -> SentencePieceTokenizer:
    """Train a byte-pair tokenizer on the first `sample_bytes` of the documents.

    Where there is too little text for `vocab_size` tokens, it makes as many as it can, and `notice` is told.
    Raises InputError where there is no text, or where vocab_size leaves no room for bytes and special tokens.
    """
    fixed = 256 + len(SPECIAL_TOKENS) + 1
    if vocab_size <= fixed:
        raise InputError(f"a vocabulary of {vocab_size} is too small: bytes and special tokens alone take {fixed}")
    sample = list(_sample(documents, sample_bytes))
    if not sample:
        raise InputError(
            "no text to train a tokenizer on: every document is empty, or holds only white space, NUL, U+2581 or U+2585"
        )
    try:
        return _train(sample, vocab_size)
    except RuntimeError as error:
        # The trainer says how many tokens the text supports, or needs at least, and only in words.
        supported = re.search(r"value <= (\d+)", str(error))
        needed = re.search(r"required_chars\. \d+ vs (\d+)", str(error))
        if needed is not None:
            raise InputError(
                f"a vocabulary of {vocab_size:,} tokens is too small: bytes, special tokens and the characters of "
                f"this text take {int(needed[1]):,}"
            ) from None
        if supported is None:
            raise
    size = int(supported[1])
    notice(f"the text supports {size:,} tokens, not {vocab_size:,}: the vocabulary is {size:,}")
    return _train(sample, size)


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"a text holds {text[error.start]!r} at character {error.start:,}, half of a surrogate pair, which UTF-8 "
            "cannot spell; remove it, or replace it by U+FFFD"
        ) from None


def _sample(documents: Iterable[str], sample_bytes: int) -> Iterator[str]:
    """Yield stretches of text that the trainer accepts: not too long, and with nothing in them that it reserves."""
    taken = 0
    for document in documents:
        _check_unicode(document)
        for start in range(0, len(document), SENTENCE_BYTES // 4):
            stretch = RESERVED.sub(BOUNDARY, document[start : start + SENTENCE_BYTES // 4])
            if re.search(rf"[^\s{BOUNDARY}]", stretch):
                # Without the last one the trainer would take line ends away.
                yield SPELLED.sub(rf"\1{BOUNDARY}", stretch) + BOUNDARY
        taken += len(document.encode())
        if taken >= sample_bytes:
            return


def _train(sample: list[str], vocab_size: int) -> SentencePieceTokenizer:
    import sentencepiece

    model = io.BytesIO()
    with listener.get()("training a tokenizer", None, ""):
        sentencepiece.SentencePieceTrainer.train(
            # SentencePiece 0.2.1 counts on it that the text holds each of required_chars.
            sentence_iterator=iter([*sample, " "]),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.9999,
            # Even where the text holds no space: spelled in bytes it would come back as its mark.
            required_chars=SPACE_MARK,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=SENTENCE_BYTES * 2,
            control_symbols=list(SPECIAL_TOKENS),
            # The ids of the trainer's own three are fixed; only "unknown" stays, and byte tokens make it unreachable.
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            # It is stored in the file, whose SHA-256 must not depend on the machine, and does not speed byte pairs up.
            num_threads=1,
            minloglevel=2,
        )
    return SentencePieceTokenizer(model.getvalue())
