"""Tokenizers and chat templates in the manner of other families, made small, as their models' folders hold them."""

import json
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers, processors, trainers

from engine.tokenizer import SPACE_MARK, JsonTokenizer
from engine.tokenizer_json import import_tokenizer
from train.data.stories import stories

WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Each is said in the manner of a family: with another order of turns, other ends, other contents left out.
CHATML = """{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system
You are helpful.<|im_end|>
{% endif %}<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
MARKED = """{%- for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}
{%- if message.role == 'assistant' %}{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}
{%- else %}{{ message.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
QWEN = """{%- set last = namespace(user=-1) %}
{%- for message in messages %}{% if message.role == 'user' %}{% set last.user = loop.index0 %}{% endif %}{% endfor %}
{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' }}
{%- if message.role == 'assistant' %}
  {%- set thought = '' %}{%- set content = message.content %}
  {%- if '</think>' in content %}
    {%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}
    {%- set content = content.split('</think>')[-1].lstrip('\n') %}
  {%- endif %}
  {%- if loop.index0 > last.user %}{{- '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}
{%- else %}{%- set content = message.content %}{% endif %}
{{- content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"""
LLAMA = """{{- bos_token }}
{%- if messages[0].role == 'system' %}{% set system = messages[0].content | trim %}{% set messages = messages[1:] %}
{%- else %}{% set system = '' %}{% endif %}
{{- '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + strftime_now('%d %b %Y') + '\n\n' }}
{{- system + '<|eot_id|>' }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + message.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""
MISTRAL = """{{ bos_token }}{% for message in messages %}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('roles must alternate: user, assistant') }}{% endif %}
{%- if message.role == 'user' %}{{ '[INST] ' + message.content + ' [/INST]' }}
{%- else %}{{ ' ' + message.content + eos_token }}{% endif %}{% endfor %}"""
ZEPHYR = """{% for message in messages %}
{{- '<|' + message.role + '|>\n' + message.content + eos_token + '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"""

LLAMA_TOKENS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
CHATML_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SENTENCEPIECE_TOKENS = ["<unk>", "<s>", "</s>"]
# The kind of tokenizer, its special tokens, what ends an answer, and the template.
FAMILIES = {
    "smol": ("smol", CHATML_TOKENS, "<|im_end|>", CHATML),
    "marked": ("smol", CHATML_TOKENS, "<|im_end|>", MARKED),
    "qwen": ("qwen", CHATML_TOKENS, "<|im_end|>", QWEN),
    "llama": ("llama", LLAMA_TOKENS, "<|eot_id|>", LLAMA),
    "mistral": ("prepend", SENTENCEPIECE_TOKENS, "</s>", MISTRAL),
    "zephyr": ("first", SENTENCEPIECE_TOKENS, "</s>", ZEPHYR),
}


@cache
def backend(kind: str) -> str:
    """Return a tokenizer.json, trained on the built-in stories."""
    texts = [story.text for story in islice(stories("train"), 60)]
    made = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=(spaced := kind in ("prepend", "first", "always"))))
    special = SENTENCEPIECE_TOKENS if spaced else LLAMA_TOKENS if kind == "llama" else CHATML_TOKENS
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    if spaced:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        made.decoder = decoders.Sequence(
            [decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    else:
        words = WORDS if kind == "llama" else WORDS.replace("{1,3}", "")
        cut = (
            pre_tokenizers.Digits(individual_digits=True)
            if kind == "smol"
            else pre_tokenizers.Split(Regex(words), "isolated")
        )
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "smol")
        made.pre_tokenizer, made.decoder = pre_tokenizers.Sequence([cut, level]), decoders.ByteLevel()
        made.normalizer = normalizers.NFC() if kind == "qwen" else None
    trainer = trainers.BpeTrainer(
        vocab_size=800,
        special_tokens=[*special, *(alphabet if spaced else ())],
        initial_alphabet=[] if spaced else pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    if kind in ("llama", "prepend", "first", "always"):
        begin = [f"{special[0 if kind == 'llama' else 1]}", "$A"]
        made.post_processor = processors.TemplateProcessing(
            single=" ".join(begin), special_tokens=[(begin[0], made.token_to_id(begin[0]))]
        )
    if kind == "qwen":
        made.add_tokens([AddedToken(name, normalized=False) for name in ("<think>", "</think>", "<tool_call>")])
    content = json.loads(made.to_str())
    content["model"]["ignore_merges"] = kind == "llama"
    if spaced:
        content["added_tokens"] = [each for each in content["added_tokens"] if each["content"] in special]
        content["model"] |= {"unk_token": "<unk>", "fuse_unk": True}
        if kind == "prepend":
            replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK}
            content["normalizer"] = {
                "type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE_MARK}, replace],
            }  # fmt: skip
            content["pre_tokenizer"] = None
        else:
            content["pre_tokenizer"] |= {"prepend_scheme": kind, "split": False}
    return json.dumps(content, ensure_ascii=False)


def write(folder: Path, family: str, **changes: Any) -> None:
    """Write the tokenizer of a family into a folder, but for the model."""
    kind, special, end, template = FAMILIES[family]
    bos = "<|endoftext|>" if special is CHATML_TOKENS else special[0 if kind == "llama" else 1]
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(backend(kind), encoding="utf-8")
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": end,
        "chat_template": template,
    }
    if kind in ("smol", "qwen"):
        config["add_bos_token"] = False
    (folder / "tokenizer_config.json").write_text(json.dumps(config | changes))


def imported(folder: Path, family: str, rows: int = 1000, **changes: Any) -> JsonTokenizer:
    write(folder, family, **changes)
    return import_tokenizer(folder, {}, rows)[0]
