"""Tensors in, tensors out: attention, LayerNorm, cross-entropy. Knows nothing of models."""

from kernels.attention.op import decode_attention, flash_attention
from kernels.cross_entropy import linear_cross_entropy, linear_log_probs, linear_scores
from kernels.layernorm import layer_norm

__all__ = [
    "decode_attention",
    "flash_attention",
    "layer_norm",
    "linear_cross_entropy",
    "linear_log_probs",
    "linear_scores",
]
