"""Weights as the micro-kernel reads them (see tile.py), made by PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cpu.tile import GROUP, GROUP_BYTES, STRIP


def strips(columns: int) -> int:
    return -(-columns // STRIP)


def strip_size(depth: int, kind: str) -> int:
    """Return the elements of a strip of so many rows."""
    return -(-depth // GROUP) * GROUP_BYTES if kind == "int8" else depth * STRIP


def pack(weight_NK: Tensor, kind: str) -> Tensor:
    """Return the strips of x @ weight.T one after the other, [elements]: float32, uint16 (bf16) or int8, by `kind`.

    In int8 each 32 numbers of a row of the weight have a scale (bf16): the largest becomes 127.
    """
    columns, depth = weight_NK.shape
    padded = F.pad(weight_NK.detach().float(), (0, 0, 0, -columns % STRIP))
    weight = padded.view(strips(columns), STRIP, depth)
    if kind != "int8":
        packed = weight.transpose(1, 2).contiguous().flatten()
        return packed if kind == "fp32" else packed.bfloat16().view(torch.uint16)
    # [strips, STRIP, groups, GROUP]
    grouped = F.pad(weight, (0, -depth % GROUP)).view(strips(columns), STRIP, -1, GROUP)
    scales = (grouped.abs().amax(dim=-1) / 127).clamp(min=1e-30).bfloat16()
    values = (grouped / scales[..., None].float()).round().clamp(-127, 127).to(torch.int8)
    parts = scales.transpose(1, 2).contiguous().view(torch.int8), values.permute(0, 2, 3, 1).flatten(2)
    return torch.cat(parts, dim=-1).flatten()
