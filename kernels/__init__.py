"""Tensors in, tensors out: attention, norms, the gated MLP's activation, cross-entropy. Knows nothing of models."""

from kernels.attention.op import decode_attention, flash_attention
from kernels.cross_entropy import linear_cross_entropy, linear_log_probs, linear_scores
from kernels.norm import layer_norm, rms_norm
from kernels.silu_mul import silu_mul

__all__ = [
    "decode_attention",
    "flash_attention",
    "layer_norm",
    "linear_cross_entropy",
    "linear_log_probs",
    "linear_scores",
    "rms_norm",
    "silu_mul",
]
