"""LayerNorm, with the residual addition before it fused in."""

from kernels.layernorm.op import layer_norm

__all__ = ["layer_norm"]
