"""tokenizer.json: ours is written as one, and that of another model becomes a run's tokenizer and goes back."""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from engine.chat_template import JINJA, OLD_JINJA, PLAIN_JINJA, TemplateError, learn_template, text_ends
from engine.errors import InputError
from engine.records import parse
from engine.tokenizer import (
    CHAT_TOKENS,
    END_OF_DOCUMENT,
    SPACE_MARK,
    SPECIAL_TOKENS,
    Foreign,
    JsonTokenizer,
    Tokenizer,
    json_speller,
    open_json,
    read_tokenizer,
)

# What a folder may hold of a tokenizer, and goes back as it was.
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
FILES = ("tokenizer.json", *SETTINGS, "chat_template.jinja", "chat_template.json")
OURS = (JINJA, PLAIN_JINJA, OLD_JINJA)

# An imported tokenizer must give this text back. (One that normalises changes text that is not in Unicode's form NFC.)
PROBE = " Two  spaces,\n\ttabs; 1234, na\u00efve \u4e2d\u6587 \U0001f642 <|user|> <|endoftext|>"


def import_tokenizer(
    folder: Path, values: dict[str, Any], rows: int, say: Callable[[str], None] = lambda message: None
) -> tuple[JsonTokenizer, bool]:
    """Return the tokenizer of a model's folder, and whether the model has learnt to chat.

    `values` is what config.json holds, `rows` are those of the embedding. With a chat template of its own a tokenizer
    stays as it is; any other gets our chat tokens, and may then have more tokens than rows. `say` is told which of many
    templates is taken, or why none. Raises InputError where it is of no known family, or does not give text back.
    """
    return read_tokenizer(folder / FILES[0], partial(_import, folder=folder, values=values, rows=rows, say=say))


def _import(
    model: bytes, folder: Path, values: dict[str, Any], rows: int, say: Callable[[str], None]
) -> tuple[JsonTokenizer, bool]:
    files = {name: (folder / name).read_text("utf-8", "replace") for name in FILES if (folder / name).exists()}
    held = {name: read_json(folder / name) if name in files else {} for name in SETTINGS}
    config = held["special_tokens_map.json"] | held["tokenizer_config.json"]
    named = {name: token.get("content") if isinstance(token, dict) else token for name, token in config.items()}
    texts = {name: text for name, text in named.items() if name.endswith("_token") and isinstance(text, str)}
    template = _template(folder, config.get("chat_template"), say)

    backend = open_json(model)
    if (most := max(backend.get_vocab().values(), default=0)) >= rows:
        raise InputError(f"it has {backend.get_vocab_size()} tokens with ids up to {most}, for a model of {rows}")
    plain, marked = (backend.encode("a", add_special_tokens=add).ids for add in (False, True))
    bos = marked[0] if marked[:1] != plain[:1] else None
    if (adds := config.get("add_bos_token")) is not None:
        bos = backend.token_to_id(texts.get("bos_token", "")) if adds else None
    # A chat model may have a token that ends an answer as its eos, and beside it one that ends a document.
    closing = (backend.token_to_id(name) for name in (END_OF_DOCUMENT, "<|end_of_text|>", texts.get("eos_token", "")))
    eod = next((index for index in closing if index is not None), None)
    if eod is None:
        return with_special_tokens(model, rows), False  # which says what is missing
    begin = eod if bos is None else bos
    ours = [each.replace(END_OF_DOCUMENT, backend.id_to_token(begin)) for each in OURS]
    ids = {name: values.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if template and template not in ours:
        said = (values | held["generation_config.json"]).get("eos_token_id")
        ends = [
            each for each in (said if isinstance(said, list) else [said]) if type(each) is int and 0 <= each <= most
        ]
        foreign = Foreign(files, rows, begin, eod, [*dict.fromkeys([*ends, eod])], [], template, texts, ids)
        try:
            return _probed(JsonTokenizer(learn_template(foreign).dumps())), True
        except TemplateError as error:
            say(f"{folder}: its chat template is not used: {error}")
    if begin == backend.token_to_id(END_OF_DOCUMENT):
        return with_special_tokens(model, rows), template in ours
    backend.add_special_tokens(list(CHAT_TOKENS))
    header, end = (backend.token_to_id(name) for name in CHAT_TOKENS[2:])
    files["tokenizer.json"], rows = backend.to_str(), max(rows, *(index + 1 for index in backend.get_vocab().values()))
    foreign = Foreign(files, rows, begin, eod, [end, eod], [header], ours[0], texts, ids)
    return _probed(JsonTokenizer(foreign.dumps())), template in ours


def _probed(tokenizer: JsonTokenizer) -> JsonTokenizer:
    if short := [name for name in tokenizer.special if len(name) < 2]:
        raise InputError(f"its special token {short[0]!r} is one character, which no text could hold then")
    # Where a space is put before a text, the space that it begins with may count as that.
    probe = PROBE.lstrip() if tokenizer.strips else PROBE
    if (back := tokenizer.decode(tokenizer.encode(probe))) != probe:
        raise InputError(f"it does not give text back as it was: {probe!r} became {back!r}")
    return tokenizer


def _template(folder: Path, inside: Any, say: Callable[[str], None]) -> str | None:
    """Return a folder's chat template, of which tokenizer_config.json may hold some `inside`, by their names."""
    # transformers 5 keeps it in a file of its own. What is no text is another template than ours, too.
    if (alone := folder / "chat_template.jinja").exists():
        return alone.read_text(encoding="utf-8", errors="replace")
    if (alone := folder / "chat_template.json").exists():
        inside = read_json(alone).get("chat_template")
    if isinstance(inside, list):
        named = {str(each.get("name")): each.get("template") for each in inside if isinstance(each, dict)}
        name = "default" if "default" in named else next(iter(named), "")
        say(f"{folder}: of its chat templates {', '.join(named)} it is {name} that is used")
        inside = named.get(name)
    return inside if isinstance(inside, str) else None


def exported(tokenizer: Tokenizer, context: int, *, chat: bool) -> tuple[dict[str, str], dict[str, Any]]:
    """Return the files of a tokenizer, as transformers reads them, and the ids that config.json names.

    Those that came with an imported model go back unchanged, unless it has learnt our way to chat since.
    """
    ends = sorted(text_ends(tokenizer, chat=chat))
    if foreign := tokenizer.foreign:
        learnt = chat and foreign.header == [tokenizer.special.get(CHAT_TOKENS[2])]
        ids = foreign.ids | ({"eos_token_id": ends} if learnt else {})
        new = {"generation_config.json": json.dumps(ids), "chat_template.jinja": foreign.chat_template}
        return foreign.files | (new if learnt else {}), ids
    ids = {
        **dict.fromkeys(("bos_token_id", "pad_token_id"), tokenizer.eod),
        "eos_token_id": ends if chat else tokenizer.eod,
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_DOCUMENT),
        "additional_special_tokens": list(CHAT_TOKENS),
        "model_max_length": context,
        # What a model goes on from must come last. Token types are what version 4 makes unless told, and refuses.
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    } | ({"chat_template": JINJA} if chat else {})
    contents = {"generation_config.json": ids, "tokenizer_config.json": config}
    files = {name: json.dumps(content, indent=2) + "\n" for name, content in contents.items()}
    return files | {"tokenizer.json": tokenizer_json(tokenizer).decode()}, ids


def with_special_tokens(model: bytes, rows: int) -> JsonTokenizer:
    """Return a tokenizer.json's tokenizer with our special tokens, for a model whose embedding has `rows` rows.

    Those that it lacks come after its own, and names without a meaning fill the rows up; it may end up with more than
    `rows` tokens. Raises InputError where it is of no known family, or does not give text back.
    """
    backend = open_json(model)
    # Written anew: what old versions of `tokenizers` left out is there then.
    json_speller(json.loads(backend.to_str()))
    ids = [*backend.get_vocab().values()]
    if backend.token_to_id(END_OF_DOCUMENT) is None or max(ids) >= min(rows, len(ids)):
        raise InputError(
            f"it has {len(ids)} tokens with ids up to {max(ids, default=0)}, for a model of {rows}; expected ids "
            f"without gaps, and {END_OF_DOCUMENT} among the tokens"
        )
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    backend.add_special_tokens([f"<|reserved-{index}|>" for index in range(backend.get_vocab_size(), rows)])
    return _probed(JsonTokenizer(backend.to_str().encode()))


def tokenizer_json(tokenizer: Tokenizer) -> bytes:
    """Return the tokenizer as a tokenizer.json that cuts every text into the same ids.

    Text that spells a special token is the exception: there it becomes that token, unless whoever reads the file
    forbids it (`split_special_tokens=True` in transformers).

    SentencePiece merges the two neighbours whose union is the best token, whichever the two are; `tokenizers` merges
    the best pair on a list. So every way to cut a token in two is on the list, the ways of one token side by side.
    Spaces are spelled as spaces, without SentencePiece's mark: then the mark in a text needs no special care.
    """
    if isinstance(tokenizer, JsonTokenizer):
        return tokenizer.json
    names = {index: tokenizer.name(index) for index in range(tokenizer.vocab_size)} | (tokens := merged(tokenizer))
    begin = {"id": END_OF_DOCUMENT, "ids": [tokenizer.eod], "tokens": [END_OF_DOCUMENT]}
    document = [{"SpecialToken": {"id": END_OF_DOCUMENT, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": index, "content": name, "special": True, **plain}
            for name, index in sorted(tokenizer.special.items(), key=lambda item: item[1])
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
            "unk_token": tokenizer.name(tokenizer.processor.unk_id()),
            "byte_fallback": True,
            "vocab": {name: index for index, name in names.items()},
            "merges": _cuts(list(tokens.values())),
        },
    }
    return json.dumps(content, ensure_ascii=False).encode()


def merged(tokenizer: Tokenizer) -> dict[int, str]:
    """Return the text of each token that SentencePiece's byte pairs merge, by its id, the best first.

    Raises InputError for a tokenizer of another kind, and for one that changes a text before it cuts it.
    """
    found: dict[int, str] = {}
    if isinstance(tokenizer, JsonTokenizer):
        # One of ours, which was exported and imported again, has its tokens in the order of their merges.
        for index, spelled in enumerate(tokenizer.token_bytes):
            if spelled and not re.fullmatch("<0x[0-9A-F]{2}>", tokenizer.name(index)):
                found[index] = spelled.decode()
        content = json.loads(tokenizer.json)
        merges = [tuple(cut) for cut in content["model"]["merges"]]
        if content["normalizer"] or content["pre_tokenizer"] or merges != _cuts(list(found.values())):
            raise InputError("this tokenizer.json does not cut text as the byte pairs of SentencePiece do")
        return found
    processor = tokenizer.processor
    for index in range(tokenizer.vocab_size):
        if not (processor.is_control(index) or processor.is_unknown(index) or processor.is_byte(index)):
            # A byte-pair model scores its tokens 0, -1, -2 and so on; the other kind of SentencePiece does not merge.
            if processor.get_score(index) != -len(found):
                raise InputError("only a byte-pair tokenizer can be exported; this SentencePiece model is another kind")
            found[index] = tokenizer.name(index).replace(SPACE_MARK, " ")
    probe = PROBE + "\ufb01"  # of which NFKC makes two letters
    if (changed := processor.normalize(probe).replace(SPACE_MARK, " ")) != probe:
        raise InputError(f"this SentencePiece model changes text before it cuts it: {probe!r} became {changed!r}")
    return found


def _cuts(tokens: list[str]) -> list[tuple[str, str]]:
    """Return every way to cut a token into two others."""
    known = set(tokens)
    cuts = ((token[:cut], token[cut:]) for token in tokens for cut in range(1, len(token)))
    return [cut for cut in cuts if known.issuperset(cut)]


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no settings")
    return content
