"""Small models of every family that can be imported, and of what the settings allow beyond these."""

from engine.config import ModelConfig

LLAMA = {"norm": "rms", "mlp": "gated", "mlp_width": 48, "key_heads": 2}


def relative(**settings: object) -> ModelConfig:
    """A decoder of three blocks, 32 wide, with four heads over a context of 48 tokens."""
    return ModelConfig(**({"vocab_size": 64, "width": 32, "blocks": 3, "heads": 4, "context": 48} | settings))  # type: ignore[arg-type]


RELATIVES = {
    "llama": relative(**LLAMA, rotary_scaling="llama3", rotary_factor=8.0, rotary_original=16),
    "smollm2": relative(**LLAMA, tied=True, rotary_base=100_000.0),
    "mistral": relative(**LLAMA, window=5, pattern="w"),
    "qwen2": relative(**LLAMA, qkv_biases=True, tied=True, window=4, pattern="ffw"),
    "qwen3": relative(**LLAMA, qk_norm=True, head_width=16),
    "smollm3": relative(**LLAMA, pattern="ffn", rotary_scaling="linear", rotary_factor=2.0),
    "capped": relative(**LLAMA, score_cap=2.0, window=6, pattern="wf"),
    "one key head": relative(mlp="gated", key_heads=1, head_width=6),
}
