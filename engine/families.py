"""The families of models that transformers knows and we can be: their config.json and their tensors, and ours.

One table, no class for each: their models and ours compute the same in the same order. Only names differ, and how maps
are stacked. We keep all queries, then all keys, then all values in one matrix, and a gated MLP's gate above what it
gates; GPT-NeoX keeps query, key and value of one head together, Llama and its relatives keep each map by itself.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from engine.config import ModelConfig, from_dict
from engine.errors import InputError
from engine.model import GPT

# What they call our parameters. Braces name the maps whose rows one matrix of ours holds, in their order.
NEOX = {
    "embedding": "gpt_neox.embed_in",
    "blocks": "gpt_neox.layers",
    "attention_norm": "input_layernorm",
    "attention.qkv": "attention.query_key_value",
    "attention.output": "attention.dense",
    "mlp_norm": "post_attention_layernorm",
    "mlp.expand": "mlp.dense_h_to_4h",
    "mlp.contract": "mlp.dense_4h_to_h",
    "final_norm": "gpt_neox.final_layer_norm",
    "head": "embed_out",
}
LLAMA = {
    "embedding": "model.embed_tokens",
    "blocks": "model.layers",
    "attention_norm": "input_layernorm",
    "attention.qkv": "self_attn.{q,k,v}_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "attention.output": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp.expand": "mlp.{gate,up}_proj",
    "mlp.contract": "mlp.down_proj",
    "final_norm": "model.norm",
    "head": "lm_head",
}
# What old versions kept beside the weights, and nobody reads.
IGNORED = r".*\.(rotary_emb\.inv_freq|attention\.(masked_)?bias)"

FULL, SLIDING = "full_attention", "sliding_attention"  # layer_types

# Our settings by the names of config.json.
SETTINGS = {
    "vocab_size": "vocab_size",
    "hidden_size": "width",
    "intermediate_size": "mlp_width",
    "num_hidden_layers": "blocks",
    "num_attention_heads": "heads",
    "max_position_embeddings": "context",
    "num_key_value_heads": "key_heads",
    "head_dim": "head_width",
    "layer_norm_eps": "norm_eps",
    "rms_norm_eps": "norm_eps",
    "use_parallel_residual": "parallel_residual",
    "tie_word_embeddings": "tied",
    "rotary_emb_base": "rotary_base",
    "rope_theta": "rotary_base",
    "rotary_pct": "rotary_share",
}
# What rope_parameters say of each rope_type, besides the base and the share that rotates.
ROPE: dict[str, dict[str, str]] = {
    "default": {},
    "linear": {"factor": "rotary_factor"},
    "llama3": {
        "factor": "rotary_factor",
        "low_freq_factor": "rotary_low",
        "high_freq_factor": "rotary_high",
        "original_max_position_embeddings": "rotary_original",
    },
}


def _family(architecture: str, *sizes: int, **others: Any) -> dict[str, Any]:
    named: dict[str, Any] = {"tie_word_embeddings": False, "quantization_config": None, "hidden_act": "silu"}
    gated = {"num_key_value_heads": None, "head_dim": None, "rms_norm_eps": 1e-6, "rope_theta": 1e4}
    named |= dict(zip(SETTINGS, sizes, strict=False)) | ({} if "rotary_pct" in others else gated)
    return {"architectures": [architecture]} | named | others


NO_BIASES = {"attention_bias": False, "mlp_bias": False}
QWEN: dict[str, Any] = {
    "num_key_value_heads": 32, "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28,
    "layer_types": None,
}  # fmt: skip
# What config.json means where it is silent, as transformers has it. A family knows no settings but its own.
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt_neox": _family(
        "GPTNeoXForCausalLM", 50_432, 6144, 24_576, 44, 64, 2048, hidden_act="gelu", attention_bias=True,
        layer_norm_eps=1e-5, rotary_emb_base=1e4, rotary_pct=0.25, use_parallel_residual=True,
    ),
    "llama": _family("LlamaForCausalLM", 32_000, 4096, 11_008, 32, 32, 2048, **NO_BIASES),
    "qwen2": _family("Qwen2ForCausalLM", 151_936, 4096, 22_016, 32, 32, 32_768, **QWEN),
    "qwen3": _family(
        "Qwen3ForCausalLM", 151_936, 4096, 22_016, 32, 32, 32_768, **QWEN, head_dim=128, attention_bias=False
    ),
    "mistral": _family(
        "MistralForCausalLM", 32_000, 4096, 14_336, 32, 32, 131_072, num_key_value_heads=8, sliding_window=4096
    ),
    "smollm3": _family(
        "SmolLM3ForCausalLM", 128_256, 2048, 11_008, 36, 16, 32_768, **NO_BIASES, num_key_value_heads=4, rope_theta=2e6,
        tie_word_embeddings=True, use_sliding_window=False, sliding_window=None, layer_types=None, no_rope_layers=None,
        no_rope_layer_interval=4,
    ),
}  # fmt: skip


def our_config(values: dict[str, Any]) -> ModelConfig:
    """Return the settings of the model that a config.json describes, as transformers 4 or 5 spells it.

    Raises InputError, naming the setting, for what our model cannot be.
    """
    name = values.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise InputError(f"model_type {name!r} is not known; it must be one of {', '.join(map(repr, FAMILIES))}")
    silent, neox = FAMILIES[name], name == "gpt_neox"
    given = {key: values.get(key, silent[key]) for key in silent}
    # GPT-NeoX has biases elsewhere in any case.
    for key in ("hidden_act", "quantization_config", "mlp_bias", "" if neox else "attention_bias"):
        if key in silent and given[key] != silent[key]:
            raise InputError(f"{key} {given[key]!r} is not known in {name}; it must be {silent[key]!r}")
    for key in ("hidden_size", "num_hidden_layers", "max_window_layers", "no_rope_layer_interval"):
        if key in silent and (type(given[key]) is not int or given[key] < 0):
            raise InputError(f"{key} {given[key]!r}; it must be a whole number")
    ours = {ours: given[theirs] for theirs, ours in SETTINGS.items() if theirs in given}
    ours |= {"norm": "layer" if neox else "rms", "mlp": "gelu" if neox else "gated", "biases": neox}
    ours |= {"qkv_biases": name == "qwen2", "qk_norm": name == "qwen3", "family": name}
    config: ModelConfig = from_dict(ours | _our_rotary(name, values, given) | _our_pattern(given), ModelConfig, "model")
    if name == "llama" and config.width % config.heads:
        raise InputError(f"hidden_size {config.width} is no multiple of num_attention_heads, as llama has it")
    if values.get("layer_types") and "layer_types" not in silent:
        raise InputError(f"layer_types {values['layer_types']!r} are not known in {name}; all its layers are alike")
    usual = {"mlp_width": 4 * config.width, "key_heads": config.heads, "head_width": config.width / config.heads}
    unsaid: dict[str, Any] = {key: None for key in usual if getattr(config, key) == usual[key]}
    return dataclasses.replace(config, **unsaid)


def _our_rotary(name: str, values: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Return what is said of rotary positions: since version 5 in one place, before in several."""
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise InputError(f"rope_parameters or rope_scaling {rope!r}; they must be an object, or null")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPE:
        raise InputError(f"rope_type {kind!r} is not known; it must be one of {', '.join(map(repr, ROPE))}")
    if unknown := rope.keys() - {"rope_type", "type", "rope_theta", "partial_rotary_factor", *ROPE["llama3"]}:
        raise InputError(f"{min(unknown)} {rope[min(unknown)]!r} is not known of rotary positions")
    share = rope.get("partial_rotary_factor", given.get("rotary_pct", values.get("partial_rotary_factor", 1.0)))
    if name != "gpt_neox" and share != 1.0:
        raise InputError(f"partial_rotary_factor {share!r} is not known in {name}; it must be 1.0")
    base = rope.get("rope_theta", given.get("rope_theta", given.get("rotary_emb_base")))
    # Version 5 takes the context where nothing is said of the original one.
    rope = {"original_max_position_embeddings": given["max_position_embeddings"]} | rope
    found = {ours: rope.get(theirs) for theirs, ours in ROPE[kind].items()}
    return found | {"rotary_scaling": kind if found else "none", "rotary_base": base, "rotary_share": share}


def _our_pattern(given: dict[str, Any]) -> dict[str, Any]:
    """Return which layers have a window and which no rotary positions, as the shortest pattern that says it."""
    layers = range(min(given["num_hidden_layers"], 1000))  # there is no model of more
    window = given.get("sliding_window") if given.get("use_sliding_window", True) else None
    rotates, kinds = given.get("no_rope_layers"), given.get("layer_types")
    if rotates is None:
        interval = given.get("no_rope_layer_interval") or len(layers) + 1
        rotates = [int((layer + 1) % interval > 0) for layer in layers]
    elif isinstance(rotates, list):
        rotates = rotates[: len(layers)]  # it may be said of more
    if kinds is None:
        # Qwen's last layers have the window, SmolLM3's without rotary positions, and all of Mistral's.
        slides = [layer >= given.get("max_window_layers", 0) for layer in layers]
        if "no_rope_layers" in given:
            slides = [not turns for turns in rotates] if isinstance(rotates, list) else []
        kinds = [SLIDING if window is not None and each else FULL for each in slides]
    for key, found in (("no_rope_layers", rotates), ("layer_types", kinds)):
        if not isinstance(found, list) or len(found) != len(layers):
            raise InputError(f"{key} {found!r}; it must be a list with one entry a layer, and there are {len(layers)}")
    letters = ""
    for kind, turns in zip(kinds, rotates, strict=True):
        if kind not in (FULL, SLIDING) or (kind == SLIDING and (window is None or not turns)):
            where = f"sliding_window {window}, no_rope_layers {turns!r}"
            raise InputError(f"layer_types has {kind!r} with {where}: not known")
        letters += "w" if kind == SLIDING else "f" if turns else "n"
    period = next((size for size in layers if size and (letters[:size] * len(layers)).startswith(letters)), len(layers))
    return {"pattern": letters[:period], "window": window if "w" in letters else None}


def family_of(config: ModelConfig) -> str:
    """Return the family that such a model is written as.

    Raises InputError, naming the settings, where the one that it is to be, or the nearest, does not have them.
    """
    names = FAMILIES if config.family == "auto" else (config.family,)
    lost = {name: _lost(config, name) for name in names}
    name = min(names, key=lambda each: len(lost[each]))
    if lost[name]:
        said = ", ".join(f"model.{key} is {getattr(config, key)!r}" for key in lost[name])
        raise InputError(f"{said}: transformers has no such model; the nearest is {name}")
    return name


def _lost(config: ModelConfig, family: str) -> list[str]:
    """Return the settings that are others once a config.json of this family has been read."""
    try:
        back = our_config(_their_config(config, family))
    except InputError:  # its heads divide the width
        return ["head_width"]
    mine, found = _in_full(config), _in_full(back)
    # Zeros stand for the biases that GPT-NeoX cannot do without.
    free = {"family", "came_with", "start", *(["biases"] if family == "gpt_neox" else [])}
    return [key for key in mine if mine[key] != found[key] and key not in free]


def _in_full(config: ModelConfig) -> dict[str, Any]:
    """Return the settings with what stands behind None, and a letter for each block."""
    derived = {"mlp_width": config.mlp_columns, "key_heads": config.kv_heads, "head_width": config.head_dim}
    return dataclasses.asdict(config) | derived | {"pattern": [config.kind_of(each) for each in range(config.blocks)]}


def their_config(config: ModelConfig) -> dict[str, Any]:
    """Return the config.json of a model of this shape. Raises InputError where no family has such models."""
    return _their_config(config, family_of(config))


def _their_config(config: ModelConfig, family: str) -> dict[str, Any]:
    settings = _in_full(config)
    pattern, scaling = settings["pattern"], config.rotary_scaling.replace("none", "default")
    rope = {"rope_type": scaling} | {theirs: settings[ours] for theirs, ours in ROPE[scaling].items()}
    share = {"partial_rotary_factor": config.rotary_share} if family == "gpt_neox" else {}
    said = {theirs: settings[ours] for theirs, ours in SETTINGS.items()}
    said |= {"attention_bias": config.biases, "sliding_window": config.window}
    said |= {"use_sliding_window": config.window is not None, "max_window_layers": len("".join(pattern).split("w")[0])}
    said |= {"layer_types": [SLIDING if each == "w" else FULL for each in pattern]}
    said |= {"no_rope_layers": [int(each != "n") for each in pattern]}
    silent = {key: value for key, value in FAMILIES[family].items() if value is not None or key in said}
    # As transformers 4 spells it, llama.cpp's converter and others; and as version 5 does, and will alone some day.
    parameters = rope | {"rope_theta": config.rotary_base} | share
    spelled = {"rope_parameters": parameters, "torch_dtype": "float32"} | (
        {"rope_scaling": rope} if ROPE[scaling] else {}
    )
    return {"model_type": family} | {key: said.get(key, silent[key]) for key in silent} | spelled


def renamed(name: str, names: Mapping[str, str]) -> str:
    """Return what others call our parameter `name`."""
    for ours, theirs in names.items():
        name = re.sub(rf"(^|\.){re.escape(ours)}\.", rf"\g<1>{theirs}.", name)
    return name


def parted(name: str, tensor: Tensor, config: ModelConfig, names: Mapping[str, str]) -> dict[str, Tensor]:
    """Return a parameter of ours by others' `names`: as it is, or the maps that are stacked in it, which are views."""
    theirs = renamed(name, names)
    if not (stack := re.search("{(.+)}", theirs)):
        return {theirs: tensor}
    rows = next(rows for ours, (rows, _) in config.maps().items() if f".{ours}." in name)
    parts = torch.split(tensor, list(rows))
    return {theirs.replace(stack[0], each): part for each, part in zip(stack[1].split(","), parts, strict=True)}


def _names(family: str) -> Mapping[str, str]:
    return NEOX if family == "gpt_neox" else LLAMA


def their_tensors(model: GPT) -> dict[str, Tensor]:
    """Return the model's weights by its family's names, and zeros for the biases that GPT-NeoX cannot do without."""
    config, family = model.config, family_of(model.config)
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if family == "gpt_neox" and "qkv" in name:
            tensor = _restack(tensor, 3, config.heads)
        pieces = parted(name, tensor, config, _names(family))
        tensors |= {theirs: piece.contiguous() for theirs, piece in pieces.items()}
        if family == "gpt_neox" and not config.biases and ("norm" in name or "mlp" in name):
            tensors[renamed(name, NEOX).replace("weight", "bias")] = torch.zeros(len(tensor))
    return tensors


def our_tensors(theirs: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Return the parameters of our model of this configuration, in fp32, and take them out of `theirs`.

    Attention without biases gets zeros in GPT-NeoX. Raises InputError for a tensor that is missing, damaged, of another
    shape, or more than the model has a place for.
    """
    tensors, names, neox = {}, _names(config.family), config.family == "gpt_neox"
    with torch.device("meta"):
        wanted = GPT(config).state_dict()
    head = renamed("head.weight", names)
    if "lm_head.weight" in theirs:  # which transformers 5 calls GPT-NeoX's, too
        theirs[head] = theirs.pop("lm_head.weight")
    for name, like in wanted.items():
        pieces = []
        for their_name, piece in parted(name, like, config, names).items():
            if neox and "attention." in name and name.endswith("bias"):
                theirs.setdefault(their_name, torch.zeros(piece.shape))
            found = theirs.pop(their_name, None)
            if found is None or found.shape != piece.shape:
                shape = "missing" if found is None else tuple(found.shape)
                raise InputError(f"the tensor {their_name} is {shape}; by config.json it is {tuple(piece.shape)}")
            pieces.append(found.float())
            if not (found.is_floating_point() and pieces[-1].isfinite().all()):
                raise InputError(f"the tensor {their_name} holds NaN, infinity, or no fp32, fp16 or bf16")
        tensors[name] = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
        if neox and "qkv" in name:
            tensors[name] = _restack(tensors[name], config.heads, 3)
    if config.tied and head in theirs and torch.equal(theirs[head].float(), tensors["embedding.weight"]):
        del theirs[head]
    if left := [name for name in theirs if not re.fullmatch(IGNORED, name)]:
        raise InputError(f"the tensor {left[0]} has no place in the model that config.json describes")
    return tensors


def _restack(tensor: Tensor, outer: int, inner: int) -> Tensor:
    """Return the outputs of the qkv layer, stacked [outer, inner, D], as [inner, outer, D]."""
    return tensor.view(outer, inner, -1, *tensor.shape[1:]).transpose(0, 1).reshape(tensor.shape)
