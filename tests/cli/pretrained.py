"""Small random models of every family that can be imported, in folders as transformers writes them."""

from pathlib import Path
from typing import Any

import torch

SIZES = {"vocab_size": 960, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
GATED: dict[str, Any] = {"intermediate_size": 48, "num_key_value_heads": 2}
# What each has of its own, and in whose manner it cuts words and takes turns.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt_neox": ("smol", {"intermediate_size": 128, "rotary_pct": 0.5}),
    "llama": (
        "llama",
        GATED | {"tie_word_embeddings": True, "rope_parameters": LLAMA3 | {"original_max_position_embeddings": 64}},
    ),
    "mistral": ("mistral", GATED | {"sliding_window": 24}),
    "qwen2": ("qwen", GATED | {"tie_word_embeddings": True}),
    "qwen3": ("qwen", GATED | {"head_dim": 16}),
    "smollm3": ("marked", GATED | {"no_rope_layers": [1, 0]}),
}
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def pretrained(name: str, folder: Path) -> None:
    """Write a model of a family, its tokenizer and its chat template into a folder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from tests.engine import foreign  # it needs the tokenizers package

    manner, own = FAMILIES[name]
    torch.manual_seed(0)
    settings = SIZES | {"max_position_embeddings": 128} | dict.fromkeys(IDS) | own
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            # Choices are far apart, and no bias is zero.
            parameter.mul_(5) if parameter.ndim == 2 else parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    foreign.write(folder, manner)
