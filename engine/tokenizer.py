"""Text to token ids and back, without losing a byte.

A SentencePiece model, set up so that any UTF-8 text comes back exactly as it went in: no normalisation, no added
space, no merged spaces, and byte pieces for whatever the vocabulary does not hold (Kudo & Richardson 2018,
arXiv:1808.06226). Special pieces are control symbols: text that merely spells one stays text.
"""

import hashlib
import io
import os
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import InputError

END_OF_DOCUMENT = "<|endoftext|>"
CHAT_PIECES = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
SPECIAL_PIECES = (END_OF_DOCUMENT, *CHAT_PIECES)

# SentencePiece writes a space as this character. Text that really holds the character would come back as a space, so
# `encode` spells it in byte pieces instead.
SPACE_MARK = "\u2581"
# SentencePiece drops or rewrites these in its own way; spelled in bytes they survive.
UNSAFE = re.compile(f"[{SPACE_MARK}\0]")

# The trainer leaves out every line that holds U+2585, which is its mark for unknown characters, and takes SPACE_MARK
# for a space. NUL, which it never makes a piece of, stands for both: the words on either side are learnt.
RESERVED = re.compile(f"[{SPACE_MARK}\u2585]")
BOUNDARY = "\0"
# It blots out what spells a piece of its own, such as <unk> in WikiText. Cut in two, the spelling is learnt as text.
SPELLED = re.compile("(<unk|<0x[0-9A-F]{2}|" + "|".join(re.escape(piece[:-1]) for piece in SPECIAL_PIECES) + ")(?=>)")

SAMPLE_BYTES = 24_000_000
SENTENCE_BYTES = 4192


def tokenizer_file(folder: str | os.PathLike[str]) -> Path:
    """Where a run, or prepared data, keeps its tokenizer: tokenizer.json if it is an imported one, tokenizer.model."""
    imported = Path(folder) / "tokenizer.json"
    return imported if imported.exists() else Path(folder) / "tokenizer.model"


class Tokenizer:
    """A trained SentencePiece model. Build one with `load` or `train_tokenizer`.

    engine/tokenizer_json.py has the other kind, which an imported model brings along.
    """

    file_name = "tokenizer.model"

    def __init__(self, model: bytes) -> None:
        import sentencepiece

        self.model = model
        self.processor: Any = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab_size: int = self.processor.vocab_size()
        self.special: dict[str, int] = {piece: self.processor.piece_to_id(piece) for piece in SPECIAL_PIECES}
        self.eod = self.special[END_OF_DOCUMENT]
        self._byte_ids = [self.processor.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        unknown = self.processor.unk_id()
        if unknown in self.special.values() or unknown in self._byte_ids:
            raise InputError(
                "this SentencePiece model lacks byte pieces or our special pieces; train one with `gpt tokenizer train`"
            )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Tokenizer":
        """Read a tokenizer file of either kind, or the one in a folder. Raises InputError where it is not one."""
        path = tokenizer_file(path) if Path(path).is_dir() else path
        try:
            model = Path(path).read_bytes()
        except OSError as error:
            raise InputError(f"cannot read the tokenizer {path}: {error.strerror or error}") from None
        if not model:
            # SentencePiece takes no bytes for no model yet, and fails later.
            raise InputError(f"{path} is empty; expected a SentencePiece model")
        try:
            if model.startswith(b"{"):
                from engine.tokenizer_json import JsonTokenizer

                return JsonTokenizer(model)
            return cls(model)
        except RuntimeError:
            raise InputError(f"{path} is not a SentencePiece model") from None
        except InputError as error:
            raise InputError(f"{path}: {error}") from None

    def save(self, path: str | os.PathLike[str]) -> None:
        Path(path).write_bytes(self.model)

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[bytes]]:
        return type(self), (self.model,)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the model file: what shards and checkpoints remember it by."""
        return hashlib.sha256(self.model).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Token ids of a text. Never a special piece, whatever the text spells."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of many texts, in one call into SentencePiece. Raises InputError for what UTF-8 cannot spell."""
        try:
            return self._encode_batch(texts)
        except (RuntimeError, TypeError, UnicodeError):
            for text in texts:
                _check_unicode(text)
            raise

    def _encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        if any(UNSAFE.search(text) for text in texts):
            return [self._encode_unsafe(text) for text in texts]
        encoded: list[list[int]] = self.processor.encode(list(texts), num_threads=1)
        return encoded

    def _encode_unsafe(self, text: str) -> list[int]:
        ids: list[int] = []
        last = 0
        for match in UNSAFE.finditer(text):
            ids += self.processor.encode(text[last : match.start()])
            ids += [self._byte_ids[byte] for byte in match.group().encode()]
            last = match.end()
        return ids + list(self.processor.encode(text[last:]))

    @cached_property
    def piece_bytes(self) -> list[bytes]:
        """The UTF-8 bytes that each id stands for; none for special pieces."""
        pieces = [b""] * self.vocab_size
        for index in range(self.vocab_size):
            if not (self.processor.is_control(index) or self.processor.is_unknown(index)):
                pieces[index] = self.processor.id_to_piece(index).replace(SPACE_MARK, " ").encode()
        for byte, index in enumerate(self._byte_ids):
            pieces[index] = bytes([byte])
        return pieces

    @cached_property
    def byte_lengths(self) -> np.ndarray:
        """How many UTF-8 bytes each id stands for. [vocab], int64. What bits per byte are counted with."""
        return np.array([len(piece) for piece in self.piece_bytes], dtype=np.int64)

    def bytes_of(self, ids: Iterable[int]) -> bytes:
        """The bytes that the ids spell. Special pieces spell nothing."""
        pieces = self.piece_bytes
        return b"".join(pieces[index] for index in ids)

    def decode(self, ids: Iterable[int]) -> str:
        """The text that the ids spell. Bytes that are no UTF-8 (a model may write any) become U+FFFD."""
        return self.bytes_of(ids).decode("utf-8", errors="replace")


def train_tokenizer(
    documents: Iterable[str],
    vocab_size: int,
    *,
    sample_bytes: int = SAMPLE_BYTES,
    notice: Callable[[str], None] = lambda message: None,
) -> Tokenizer:
    """Train a byte-pair tokenizer on the first `sample_bytes` of the documents.

    A corpus too small for `vocab_size` pieces gets the largest vocabulary that it supports, and `notice` is told.
    Raises InputError where there is no text, or where vocab_size leaves no room for bytes and special pieces.
    """
    fixed = 256 + len(SPECIAL_PIECES) + 1
    if vocab_size <= fixed:
        raise InputError(
            f"a vocabulary of {vocab_size} pieces is too small: bytes and special pieces alone take {fixed}"
        )
    sample = list(_sample(documents, sample_bytes))
    if not sample:
        raise InputError(
            "no text to train a tokenizer on: every document is empty, or holds only white space, NUL, U+2581 or U+2585"
        )
    try:
        return _train(sample, vocab_size)
    except RuntimeError as error:
        # The trainer says how many pieces the corpus supports, or needs at least, and only in words.
        supported = re.search(r"value <= (\d+)", str(error))
        needed = re.search(r"required_chars\. \d+ vs (\d+)", str(error))
        if needed is not None:
            raise InputError(
                f"a vocabulary of {vocab_size:,} pieces is too small: bytes, special pieces and the characters of "
                f"this text take {int(needed.group(1)):,}"
            ) from None
        if supported is None:
            raise
    size = int(supported.group(1))
    notice(f"the text supports {size:,} pieces, not {vocab_size:,}: the vocabulary is {size:,}")
    return _train(sample, size)


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"a text holds {text[error.start]!r} at character {error.start:,}, half of a surrogate pair, which UTF-8 "
            "cannot spell; remove it, or replace it by U+FFFD"
        ) from None


def _sample(documents: Iterable[str], sample_bytes: int) -> Iterable[str]:
    """Stretches of text that the trainer accepts: not too long, and with nothing in them that it reserves."""
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


def _train(sample: list[str], vocab_size: int) -> Tokenizer:
    import sentencepiece

    model = io.BytesIO()
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
        control_symbols=list(SPECIAL_PIECES),
        # The ids of the trainer's own three are fixed; only "unknown" stays, and byte pieces make it unreachable.
        bos_id=-1,
        eos_id=-1,
        pad_id=-1,
        # It is stored in the file, whose SHA-256 must not depend on the machine, and does not speed byte pairs up.
        num_threads=1,
        minloglevel=2,
    )
    return Tokenizer(model.getvalue())
