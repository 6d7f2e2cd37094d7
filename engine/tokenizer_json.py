"""Hugging Face's tokenizer.json: the tokenizer of an imported model, and ours written as one.

Needs the `tokenizers` package (extra "hf"), though only to read one. Two families are known: byte-level BPE, which
GPT-2, GPT-NeoX and Pythia have, and BPE over characters with byte pieces for all others, which is ours.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

from engine.errors import InputError
from engine.tokenizer import END_OF_DOCUMENT, SPACE_MARK, SPECIAL_PIECES, Tokenizer

# Of what must come back as it went in. Text that is not in Unicode's form NFC does not, where a tokenizer normalises.
PROBE = " Two  spaces,\n\ttabs; 1234, na\u00efve \u4e2d\u6587 \U0001f642 <|user|> <|endoftext|>"


class JsonTokenizer(Tokenizer):
    """A tokenizer.json with our special pieces in it, which `with_special_pieces` adds to anybody's."""

    file_name = "tokenizer.json"

    def __init__(self, model: bytes) -> None:
        self.model = model
        self.processor = _backend(model)
        # Text that spells a special piece is encoded as text.
        self.processor.encode_special_tokens = True
        self.vocab_size = self.processor.get_vocab_size()
        self.special = {piece: self.processor.token_to_id(piece) for piece in SPECIAL_PIECES}
        if None in self.special.values():
            raise InputError("this tokenizer.json lacks our special pieces, which `gpt import` adds")
        self.eod = self.special[END_OF_DOCUMENT]

    def _encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [each.ids for each in self.processor.encode_batch_fast(list(texts), add_special_tokens=False)]

    @cached_property
    def piece_bytes(self) -> list[bytes]:
        """The bytes that each id stands for; none for special pieces. What a normaliser changed stays changed."""
        content = json.loads(self.model)
        spell = _speller(content)
        pieces = [b""] * self.vocab_size
        for piece, index in content["model"]["vocab"].items():
            if piece != content["model"].get("unk_token"):
                pieces[index] = spell(piece)
        # Some stand for text: those of GPT-NeoX for runs of spaces.
        for added in content["added_tokens"]:
            pieces[added["id"]] = b"" if added["special"] else added["content"].encode()
        return pieces


def with_special_pieces(model: bytes, rows: int) -> JsonTokenizer:
    """A tokenizer.json's tokenizer with our special pieces, for a model whose embedding has `rows` rows.

    Pieces that it lacks come after its own, and names without a meaning fill the rows up; it may end up with more than
    `rows` pieces. Raises InputError where it is of no known family, or does not give text back.
    """
    backend = _backend(model)
    # Written anew: what old versions of `tokenizers` left out is there then.
    _speller(json.loads(backend.to_str()))
    ids = backend.get_vocab().values()
    if backend.token_to_id(END_OF_DOCUMENT) is None or max(ids) >= min(rows, len(ids)):
        raise InputError(
            f"it has {len(ids)} pieces with ids up to {max(ids)}, for a model of {rows}; expected ids without gaps, "
            f"and {END_OF_DOCUMENT} among the pieces"
        )
    backend.add_special_tokens(list(SPECIAL_PIECES))
    backend.add_special_tokens([f"<|reserved-{index}|>" for index in range(backend.get_vocab_size(), rows)])
    tokenizer = JsonTokenizer(backend.to_str().encode())
    if (back := tokenizer.decode(tokenizer.encode(PROBE))) != PROBE:
        raise InputError(f"it does not give text back as it was: {PROBE!r} became {back!r}")
    return tokenizer


def to_json(tokenizer: Tokenizer) -> bytes:
    """The tokenizer as a tokenizer.json that cuts every text into the same ids.

    Text that spells a special piece is the exception: there it becomes that piece, unless whoever reads the file
    forbids it (`split_special_tokens=True` in transformers).

    SentencePiece merges the two neighbours whose union is the best piece, whichever the two are; `tokenizers` merges
    the best pair on a list. So every way to cut a piece in two is on the list, the ways of one piece side by side.
    Spaces are spelled as spaces, without SentencePiece's mark: then the mark in a text needs no special care.
    """
    if isinstance(tokenizer, JsonTokenizer):
        return tokenizer.model
    processor = tokenizer.processor
    names: list[str] = []
    merging: list[str] = []
    for index in range(tokenizer.vocab_size):
        name = processor.id_to_piece(index)
        if not (processor.is_control(index) or processor.is_unknown(index) or processor.is_byte(index)):
            name = name.replace(SPACE_MARK, " ")
            # A byte-pair model scores its pieces 0, -1, -2 and so on; the other kind of SentencePiece does not merge.
            if processor.get_score(index) != -len(merging):
                raise InputError("only a byte-pair tokenizer can be exported; this SentencePiece model is another kind")
            merging.append(name)
        names.append(name)
    known = set(merging)
    cuts = ((name[:cut], name[cut:]) for name in merging for cut in range(1, len(name)))
    begin = {"id": END_OF_DOCUMENT, "ids": [tokenizer.eod], "tokens": [END_OF_DOCUMENT]}
    document = [{"SpecialToken": {"id": END_OF_DOCUMENT, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": index, "content": piece, "special": True}
            | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            for piece, index in sorted(tokenizer.special.items(), key=lambda item: item[1])
        ],
        "normalizer": None,
        "pre_tokenizer": None,
        # A document begins as our models have learnt that it does.
        "post_processor": {
            "type": "TemplateProcessing",
            "single": document,
            "pair": [*document, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {END_OF_DOCUMENT: begin},
        },
        "decoder": {"type": "ByteFallback"},
        "model": {
            "type": "BPE",
            "unk_token": processor.id_to_piece(processor.unk_id()),
            "byte_fallback": True,
            "vocab": {name: index for index, name in enumerate(names)},
            "merges": [cut for cut in cuts if known.issuperset(cut)],
        },
    }
    return json.dumps(content, ensure_ascii=False).encode()


def _backend(model: bytes) -> Any:
    try:
        import tokenizers
    except ImportError:
        raise InputError("a tokenizer.json needs the tokenizers package: pip install 'gpt[hf]'") from None
    try:
        backend = tokenizers.Tokenizer.from_str(model.decode())
    except Exception as error:  # tokenizers raises nothing more precise
        raise InputError(f"it is not a tokenizer.json: {error}") from None
    backend.no_truncation()
    backend.no_padding()
    return backend


def _speller(content: dict[str, Any]) -> Callable[[str], bytes]:
    """What turns a piece of this tokenizer into the bytes that it stands for. InputError for a family not known."""
    model, decoder = content["model"], content["decoder"]
    kinds = [each["type"] for each in (decoder or {}).get("decoders", [decoder]) if each]
    if model["type"] == "BPE" and "ByteLevel" in kinds:
        byte_of = dict(_byte_characters())
        return lambda piece: b"".join(byte_of.get(character) or character.encode() for character in piece)
    if model["type"] == "BPE" and model.get("byte_fallback"):
        space = SPACE_MARK if SPACE_MARK in str(decoder) else " "

        def spell(piece: str) -> bytes:
            byte = re.fullmatch("<0x([0-9A-F]{2})>", piece)
            return bytes.fromhex(byte[1]) if byte else piece.replace(space, " ").encode()

        return spell
    raise InputError(
        f"its model is {model['type']}, decoded by {', '.join(kinds) or 'nothing'}; expected BPE, either byte-level or "
        "with byte fallback"
    )


def _byte_characters() -> Iterator[tuple[str, bytes]]:
    """The character that stands for each byte in byte-level BPE (bytes_to_unicode in GPT-2's encoder.py).

    Printable bytes stand for themselves, and the others are counted from U+0100 on.
    """
    others = 0x100
    for byte in range(256):
        if byte in range(0x21, 0x7F) or (byte >= 0xA1 and byte != 0xAD):
            yield chr(byte), bytes([byte])
        else:
            yield chr(others), bytes([byte])
            others += 1
