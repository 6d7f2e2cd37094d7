"""Write a model as GGUF, the file of weights and vocabulary that llama.cpp reads, and with it Ollama and LM Studio.

As GPT-NeoX, llama.cpp stacks query, key and value as we do and rotates as we do. It wants a bias everywhere, and
computes GELU in its tanh form, which moves scores by some thousandths. Of Llama and its relatives it wants each map by
itself, and the rows of queries and keys in another order where it rotates neighbours instead of halves.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from engine import disk
from engine.chat_template import PLAIN_JINJA
from engine.errors import InputError
from engine.families import family_of, parted
from engine.model import GPT, rotary_frequencies
from engine.run import Run
from engine.runtime import Runtime
from engine.tokenizer import SPACE_MARK, JsonTokenizer, Tokenizer
from engine.tokenizer_json import merged

NAMES = {
    "embedding": "token_embd",
    "blocks": "blk",
    "attention_norm": "attn_norm",
    "attention.qkv": "attn_qkv",
    "attention.output": "attn_output",
    "mlp_norm": "ffn_norm",
    "mlp.expand": "ffn_up",
    "mlp.contract": "ffn_down",
    "final_norm": "output_norm",
    "head": "output",
}
LLAMA = NAMES | {
    "attention.qkv": "attn_{q,k,v}",
    "attention.q_norm": "attn_q_norm",
    "attention.k_norm": "attn_k_norm",
    "mlp.expand": "ffn_{gate,up}",
}
# What llama.cpp calls a family, where that is another name, and which rotate neighbours.
ARCHITECTURES = {"gpt_neox": "gptneox", "mistral": "llama"}
NEIGHBOURS = ("llama", "smollm3")
# How GGUF holds the matrices of a model in each of our precisions. Q8_0 has a scale for each 32 numbers of a row.
KINDS = {"fp32": "F32", "fp16": "F16", "bf16": "BF16", "int8": "Q8_0"}
# How a byte-level tokenizer may cut a text before it merges, by the names that llama.cpp has for it.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT_2 = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
CUTTERS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [GPT_2],
    "smollm": [{"type": "Digits", "individual_digits": True}, GPT_2],
    **{
        name: [{"type": "Split", "pattern": {"Regex": WORDS % digits}, "behavior": "Isolated", "invert": False},
               GPT_2 | {"use_regex": False}]
        for name, digits in {"llama-bpe": "{1,3}", "qwen2": ""}.items()
    },
}  # fmt: skip


def export(run: Run, out: Path, which: str, precision: str, notice: Callable[[str], None]) -> bool:
    """Write a checkpoint of a run into the file `out`, and return whether the model chats. See `write`."""
    if precision not in KINDS:
        raise InputError(f"--precision is {precision!r}; it must be {', '.join(KINDS)}")
    if out.exists():
        raise InputError(f"{out} is there already; choose another file with --out")
    model, tokenizer = run.load_model(Runtime(torch.device("cpu"), "fp32"), which, notice)
    recipe = run.read_recipe()
    with disk.replacing(out) as new:
        write(model, new, precision, tokenizer, name=recipe.name, chat=recipe.chat)
    return recipe.chat


def write(
    model: GPT, path: Path, precision: str, tokenizer: Tokenizer | None = None, *, name: str = "", chat: bool = False
) -> None:
    """Write a model, its matrices in `precision`. Without a tokenizer, llama.cpp takes and gives ids of tokens.

    A model that has learnt to chat takes its template along. Raises InputError for what llama.cpp cannot hold: 8 bits
    of a width that is no multiple of 32, and tokenizers that cut a text by rules that it does not know.
    """
    import gguf

    config = model.config
    family = family_of(config)
    kind = ARCHITECTURES.get(family, family)
    for name_of, size in {"width": config.width, "head": config.attended, "MLP": config.mlp_columns}.items():
        if precision == "int8" and size % 32:
            raise InputError(f"the {name_of} is {size}; 8 bits in llama.cpp need a multiple of 32: choose fp16")
    pattern = "".join(config.kind_of(layer) for layer in range(config.blocks))
    if pattern != ("fffn" * config.blocks if family == "smollm3" else "f" * config.blocks)[: config.blocks]:
        raise InputError(f"model.pattern is {config.pattern!r}; llama.cpp knows {kind} without windows alone")
    writer = gguf.GGUFWriter(path, kind)
    if name:
        writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if precision == "fp32" else f"MOSTLY_{KINDS[precision]}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.width)
    writer.add_block_count(config.blocks)
    writer.add_feed_forward_length(config.mlp_columns)
    writer.add_head_count(config.heads)
    writer.add_rope_dimension_count(config.rotary_dim)
    writer.add_rope_freq_base(config.rotary_base)
    tensors: dict[str, torch.Tensor] = {}
    if family == "gpt_neox":
        writer.add_parallel_residual(config.parallel_residual)
        writer.add_layer_norm_eps(config.norm_eps)
    else:
        writer.add_head_count_kv(config.kv_heads)
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_layer_norm_rms_eps(config.norm_eps)
    if config.rotary_scaling == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rotary_factor)
    elif config.rotary_scaling == "llama3":
        unscaled = dataclasses.replace(config, rotary_scaling="none")
        tensors["rope_freqs.weight"] = rotary_frequencies(unscaled) / rotary_frequencies(config)
    writer.add_vocab_size(config.vocab_size)
    if tokenizer is None:
        writer.add_tokenizer_model("none")
    else:
        _add_vocabulary(writer, tokenizer)
        # What ends a turn of a chat ends nothing in a model that has never seen one.
        writer.add_eot_token_id(tokenizer.ends[0] if chat else tokenizer.eod)
    if chat:
        writer.add_chat_template(tokenizer.foreign.chat_template if tokenizer and tokenizer.foreign else PLAIN_JINJA)
    for name, tensor in model.state_dict().items():
        for theirs, piece in parted(name, tensor, config, NAMES if family == "gpt_neox" else LLAMA).items():
            if kind in NEIGHBOURS and ("attn_q." in theirs or "attn_k." in theirs):
                # Halves of a head, one after the other, become neighbours.
                halves = piece.reshape(-1, 2, config.head_dim // 2, *piece.shape[1:])
                piece = halves.transpose(1, 2).reshape(piece.shape)
            tensors[theirs] = piece
    if family == "gpt_neox" and not config.biases:
        for name in [name for name in tensors if name.startswith(("blk", "output_norm"))]:
            tensors[name.replace("weight", "bias")] = torch.zeros(len(tensors[name]))
    for name, tensor in tensors.items():
        number = gguf.GGMLQuantizationType[KINDS[precision] if tensor.ndim == 2 else "F32"]
        writer.add_tensor(name, gguf.quantize(tensor.float().cpu().numpy(), number), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_vocabulary(writer: Any, tokenizer: Tokenizer) -> None:
    """Add the tokens, and how to cut a text into them."""
    from gguf import TokenType

    names = [tokenizer.name(index) for index in range(tokenizer.vocab_size)]
    content = json.loads(tokenizer.json) if isinstance(tokenizer, JsonTokenizer) else None
    if content is not None and not content["model"].get("byte_fallback"):
        types = [TokenType.NORMAL] * len(names)
        for added in content["added_tokens"]:
            # A control token is found in a text only where that is asked for, and one of the user always.
            types[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        cutter = content["pre_tokenizer"] or {}
        said = [
            {key: each[key] for key in each if key != "trim_offsets"} for each in cutter.get("pretokenizers", [cutter])
        ]
        rules = next((name for name, steps in CUTTERS.items() if said == steps), None)
        if rules is None or bool(content["model"].get("ignore_merges")) != (rules == "llama-bpe"):
            raise InputError(
                f"this tokenizer.json cuts text into words by rules that llama.cpp has no name for: {cutter}"
            )
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(rules)
        writer.add_token_merges([" ".join(pair) for pair in content["model"]["merges"]])
    else:
        # SentencePiece merges what has the highest score first.
        types = [TokenType.BYTE if spelled else TokenType.CONTROL for spelled in tokenizer.token_bytes]
        unknown = names.index(content["model"]["unk_token"]) if content else tokenizer.processor.unk_id()
        # Byte tokens make it unreachable. Text that spells it stays text.
        types[unknown] = TokenType.UNUSED
        scores = [0.0] * len(names)
        for rank, (index, text) in enumerate(merged(tokenizer).items()):
            names[index], types[index], scores[index] = text.replace(" ", SPACE_MARK), TokenType.NORMAL, float(-rank)
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(scores)
        writer.add_unk_token_id(unknown)
    if len(set(names)) < len(names):
        raise InputError("two tokens have one name, at which llama.cpp would end")
    writer.add_token_list(names)
    writer.add_token_types(types)
    writer.add_add_space_prefix(False)
    writer.add_bos_token_id(tokenizer.begin)
    for add in (writer.add_eos_token_id, writer.add_pad_token_id):
        add(tokenizer.eod)
    # Where their tokenizer puts nothing before a text, their chat template says all (Qwen).
    writer.add_add_bos_token(tokenizer.foreign is None or tokenizer.begin != tokenizer.eod)
    writer.add_add_eos_token(False)
