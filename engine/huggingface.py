"""Export to Hugging Face's format and import from it, without transformers: weights, settings and tokenizers."""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine import checkpoint, disk
from engine.chat_template import JINJA, OLD_JINJA, PLAIN_JINJA, text_ends
from engine.config import IMPORTED, BudgetConfig, DataConfig, Recipe, override
from engine.errors import InputError
from engine.families import our_config, our_tensors, their_config, their_tensors
from engine.records import parse
from engine.run import Run
from engine.runtime import Runtime
from engine.tokenizer import (
    CHAT_TOKENS,
    END_OF_DOCUMENT,
    SPACE_MARK,
    SPECIAL_TOKENS,
    JsonTokenizer,
    Tokenizer,
    json_speller,
    open_json,
    read_tokenizer,
)

# An imported tokenizer must give this text back. (One that normalises changes text that is not in Unicode's form NFC.)
PROBE = " Two  spaces,\n\ttabs; 1234, na\u00efve \u4e2d\u6587 \U0001f642 <|user|> <|endoftext|>"

EXPORTED_FILES = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config)\.json|model\.safetensors|README\.md"
)


def export(
    run: Run, out: Path, which: str = "latest", notice: Callable[[str], None] = lambda message: None, card: str = ""
) -> list[Path]:
    """Write a checkpoint of a run into the folder `out`, for transformers and what else reads its files.

    `card` is the text of its README.md, if it is to have one.
    """
    from safetensors.torch import save_file

    model, tokenizer = run.load_model(Runtime(torch.device("cpu"), "fp32"), which, notice)
    chat = run.read_recipe().chat
    ends = sorted(text_ends(tokenizer, chat=chat))
    ids = {
        **dict.fromkeys(("bos_token_id", "pad_token_id"), tokenizer.eod),
        "eos_token_id": ends if chat else tokenizer.eod,
    }
    contents: dict[str, dict[str, Any]] = {
        "config.json": their_config(model.config) | ids,
        "generation_config.json": ids,
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_DOCUMENT),
            "additional_special_tokens": list(CHAT_TOKENS),
            "model_max_length": model.config.context,
            # What a model goes on from must come last. Token types are what version 4 makes unless told, and refuses.
            "padding_side": "left",
            "model_input_names": ["input_ids", "attention_mask"],
            "clean_up_tokenization_spaces": False,
        }
        | ({"chat_template": JINJA} if chat else {}),
    }
    tokenizer_content = tokenizer_json(tokenizer)
    with disk.writing(out, 4 * model.config.parameters):
        out.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            (out / name).write_text(json.dumps(content, indent=2) + "\n")
        (out / "tokenizer.json").write_bytes(tokenizer_content)
        if card:
            (out / "README.md").write_text(card, encoding="utf-8", errors="backslashreplace")
        save_file(their_tensors(model), out / "model.safetensors", metadata={"format": "pt"})
        disk.share_as(out / "model.safetensors", out / "config.json")
    return sorted(path for path in out.iterdir() if EXPORTED_FILES.fullmatch(path.name))


def import_(folder: Path, out: Path) -> Recipe:
    """Make a run, with one checkpoint of step 0, of a folder of one of the FAMILIES: config, safetensors, tokenizer.

    A special token of ours that the tokenizer lacks takes a spare row of the embedding, or else a new one. Raises
    InputError for what the model cannot be, or the folder lacks.
    """
    described = folder / "config.json"
    try:
        config = our_config(_read_json(described))
    except InputError as error:
        raise InputError(f"{described}: {error}") from None
    # A run has a whole recipe; data and budget of this one say nothing of how the model came to be.
    recipe = Recipe(
        name=folder.resolve().name,
        model=config,
        data=DataConfig(source=IMPORTED),
        budget=BudgetConfig(steps=1),
        chat=_chat_template(folder) in (JINJA, PLAIN_JINJA, OLD_JINJA),
    )
    tensors = our_tensors(_read_tensors(folder), recipe.model)
    biases = [name for name in tensors if name.endswith("bias")]
    if recipe.model.biases and not any(tensors[name].any() for name in biases):
        # Ours had none before they were exported: GPT-NeoX cannot do without those of norms and MLPs.
        recipe = override(recipe, "model.biases", False)
        tensors = {name: tensor for name, tensor in tensors.items() if name not in biases}
    tokenizer = read_tokenizer(folder / "tokenizer.json", partial(with_special_tokens, rows=recipe.model.vocab_size))
    for name in {"embedding.weight", "head.weight"} & tensors.keys():
        # A new token's row is the mean of all, which hardly shifts a prediction (Hewitt 2021, "Initializing new word
        # embeddings for pretrained language models").
        old = tensors[name]
        tensors[name] = torch.cat([old, old.mean(0, keepdim=True).expand(tokenizer.vocab_size - len(old), -1)])
    recipe = override(recipe, "model.vocab_size", tokenizer.vocab_size)
    run = Run(out)
    with disk.writing(out):
        run.write_recipe(recipe)
        tokenizer.save(run.path / tokenizer.file_name)
        checkpoint.save(run.checkpoints, 0, {"model": tensors}, {}, identity=run.identity(recipe))
    return recipe


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
    tokenizer = JsonTokenizer(backend.to_str().encode())
    if (back := tokenizer.decode(tokenizer.encode(PROBE))) != PROBE:
        raise InputError(f"it does not give text back as it was: {PROBE!r} became {back!r}")
    return tokenizer


def tokenizer_json(tokenizer: Tokenizer) -> bytes:
    """Return the tokenizer as a tokenizer.json that cuts every text into the same ids.

    Text that spells a special token is the exception: there it becomes that token, unless whoever reads the file
    forbids it (`split_special_tokens=True` in transformers).

    SentencePiece merges the two neighbours whose union is the best token, whichever the two are; `tokenizers` merges
    the best pair on a list. So every way to cut a token in two is on the list, the ways of one token side by side.
    Spaces are spelled as spaces, without SentencePiece's mark: then the mark in a text needs no special care.
    """
    if isinstance(tokenizer, JsonTokenizer):
        return tokenizer.model
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
        content = json.loads(tokenizer.model)
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


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    # The weights are in one file, or in numbered parts.
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        pickled = next(iter(sorted(folder.glob("*.bin"))), None)
        if pickled is None:
            raise InputError(f"{folder} has no model.safetensors")
        raise InputError(
            f"{pickled} is a pickle, which may run any code when it is read; where you trust it, convert it with "
            f"transformers: AutoModelForCausalLM.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
        )
    index = folder / "model.safetensors.index.json"
    parts = _read_json(index).get("weight_map") if index.exists() else {}
    named = set(map(str, parts.values())) if isinstance(parts, dict) else {"a weight_map"}
    if missing := named - {file.name for file in files}:
        raise InputError(f"{index} names {min(missing)}, which is not there; copy or download the whole folder again")
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            found = load_file(file)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file} is damaged: {error}") from None
        if twice := next(iter(found.keys() & tensors.keys()), None):
            raise InputError(f"{file} and another file both hold the tensor {twice}; leave one model in {folder}")
        tensors |= found
    return tensors


def _chat_template(folder: Path) -> str | None:
    # transformers 5 keeps it in a file of its own.
    if (alone := folder / "chat_template.jinja").exists():
        # What is no text is another template than ours, too.
        return alone.read_text(encoding="utf-8", errors="replace")
    beside = folder / "tokenizer_config.json"
    return _read_json(beside).get("chat_template") if beside.exists() else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no settings")
    return content
