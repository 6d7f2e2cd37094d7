"""Rotary position embedding (Su et al., arXiv:2104.09864)."""

import torch
from torch import Tensor


def rotary_angles(positions: Tensor, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosine and signed sine of each position's rotation: fp32 [..., 1, head_dim] for positions [...].

    The sign of the first half is that of a rotation's matrix, so that `rotate` is x * cos + swapped x * sin.
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions[..., None, None].float() * base**-exponents
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x [..., H, D] by the angles of its positions. Halves are paired, as in GPT-NeoX."""
    swapped = x.roll(x.shape[-1] // 2, dims=-1)
    # The angles stay in fp32: rounded to bf16, a rotation would no longer keep lengths.
    return torch.addcmul(x * cos, swapped, sin).to(x.dtype)
