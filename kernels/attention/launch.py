"""From tensors to kernel launches: shapes, strides, scales, grids."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from kernels.attention.backward import delta_kernel, dk_dv_kernel, dq_kernel
from kernels.attention.forward import forward_kernel
from kernels.tiles import tile

LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class Call:
    """The arguments of one attention that are no tensors of its layer."""

    causal: bool
    scale: float
    window: int | None
    softcap: float | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    longest_q: int
    longest_k: int

    @property
    def packed(self) -> bool:
        return self.cu_seqlens_q is not None

    def scales(self) -> tuple[float, float]:
        """What the kernels multiply scores with, and the cap: both in units of log2 (see forward.py)."""
        if self.softcap is None:
            return self.scale * LOG2_E, 0.0
        return self.scale / self.softcap, self.softcap * LOG2_E

    def switches(self, head_dim: int) -> dict[str, int | bool]:
        return {
            "HEAD_DIM": head_dim,
            "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
            "CAUSAL": self.causal,
            "WINDOW": self.window is not None,
            "SOFTCAP": self.softcap is not None,
            "PACKED": self.packed,
        }


def strides(tensor: Tensor) -> tuple[int, int, int]:
    """Of batch, token and head; a packed tensor has no batch."""
    if tensor.ndim == 4:
        return tensor.stride(0), tensor.stride(1), tensor.stride(2)
    return 0, tensor.stride(0), tensor.stride(1)


def lse_strides(lse: Tensor) -> tuple[int, int]:
    """Of batch and head."""
    return (lse.stride(0), lse.stride(1)) if lse.ndim == 3 else (0, lse.stride(0))


def sequences(call: Call, q: Tensor) -> int:
    return q.shape[0] if call.cu_seqlens_q is None else len(call.cu_seqlens_q) - 1


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """out like q, contiguous; lse fp32 [B, H, T] or [H, tokens]."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    shape = (q.shape[0], q.shape[2], q.shape[1]) if q.ndim == 4 else (q.shape[1], q.shape[0])
    lse = torch.empty(shape, dtype=torch.float32, device=q.device)
    heads, head_dim = q.shape[-2:]
    scale, softcap = call.scales()
    size = tile("forward", q.device, head_dim)
    grid = (triton.cdiv(call.longest_q, size.queries), sequences(call, q) * heads)
    if 0 in grid:
        return out, lse
    forward_kernel[grid](
        q, k, v, out, lse, call.cu_seqlens_q, call.cu_seqlens_k,
        *strides(q), *strides(k), *strides(v), *strides(out), *lse_strides(lse),
        call.longest_q, call.longest_k, heads, heads // k.shape[-2], scale, softcap, call.window or 0,
        BLOCK_T=size.queries, BLOCK_S=size.keys, num_warps=size.warps, num_stages=size.stages,
        **call.switches(head_dim),
    )  # fmt: skip
    return out, lse


def backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, d_out: Tensor, d_lse: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv, contiguous."""
    dq, dk, dv = (torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) for tensor in (q, k, v))
    delta = torch.empty_like(lse)
    heads, head_dim = q.shape[-2:]
    key_heads = k.shape[-2]
    scale, softcap = call.scales()
    switches = call.switches(head_dim)
    count = sequences(call, q)
    key_tile, query_tile = tile("keys", q.device, head_dim), tile("queries", q.device, head_dim)
    options = (heads // key_heads, call.scale, scale, softcap, call.window or 0)
    if call.longest_q and count:
        delta_kernel[(triton.cdiv(call.longest_q, 64), count * heads)](
            out, d_out, d_lse, delta, call.cu_seqlens_q, *strides(out), *strides(d_out), *lse_strides(lse),
            call.longest_q, heads, HEAD_DIM=head_dim, BLOCK_D=switches["BLOCK_D"], BLOCK_T=64, PACKED=call.packed,
        )  # fmt: skip
        dq_kernel[(triton.cdiv(call.longest_q, query_tile.queries), count * heads)](
            q, k, v, d_out, dq, lse, delta, call.cu_seqlens_q, call.cu_seqlens_k,
            *strides(q), *strides(k), *strides(v), *strides(d_out), *strides(dq), *lse_strides(lse),
            call.longest_q, call.longest_k, heads, *options, BLOCK_T=query_tile.queries, BLOCK_S=query_tile.keys,
            num_warps=query_tile.warps, num_stages=query_tile.stages, **switches,
        )  # fmt: skip
    if call.longest_k and count:
        dk_dv_kernel[(triton.cdiv(call.longest_k, key_tile.keys), count * key_heads)](
            q, k, v, d_out, dk, dv, lse, delta, call.cu_seqlens_q, call.cu_seqlens_k,
            *strides(q), *strides(k), *strides(v), *strides(d_out), *strides(dk), *strides(dv), *lse_strides(lse),
            call.longest_q, call.longest_k, key_heads, *options, BLOCK_T=key_tile.queries, BLOCK_S=key_tile.keys,
            num_warps=key_tile.warps, num_stages=key_tile.stages, **switches,
        )  # fmt: skip
    return dq, dk, dv
