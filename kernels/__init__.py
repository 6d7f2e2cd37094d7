"""Tensors in, tensors out: attention, LayerNorm, cross-entropy. Knows nothing of models."""

from kernels.attention.decode import decode_attention
from kernels.attention.op import flash_attention
from kernels.cross_entropy.op import linear_cross_entropy, linear_log_probs
from kernels.layernorm import layer_norm
from kernels.scores import linear_scores

__all__ = [
    "decode_attention",
    "flash_attention",
    "layer_norm",
    "linear_cross_entropy",
    "linear_log_probs",
    "linear_scores",
]
