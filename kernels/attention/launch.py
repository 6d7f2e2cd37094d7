"""From tensors to kernel launches: shapes, strides, scales, grids."""

import torch
import triton
from torch import Tensor

from kernels.attention.backward import delta_kernel, dk_dv_kernel, dq_kernel
from kernels.attention.call import Call
from kernels.attention.forward import forward_kernel
from kernels.tiles import Tile, tile

LOG2_E = 1.4426950408889634


def scales(call: Call) -> tuple[float, float]:
    """What the kernels multiply scores with, and the cap: both in units of log2 (see forward.py)."""
    if call.softcap is None:
        return call.scale * LOG2_E, 0.0
    return call.scale / call.softcap, call.softcap * LOG2_E


def switches(call: Call, head_dim: int, size: Tile, loaded: tuple[Tensor, ...]) -> dict[str, int | bool]:
    """The constants of a kernel that walks over the tensors `loaded`."""
    descriptors = size.descriptors and all(map(suits_the_copy_engine, loaded))
    if descriptors:
        # Descriptors are made on the device and live in memory that Triton asks for. The setting is the thread's own,
        # and autograd has threads of its own: set it at every launch.
        triton.set_allocator(lambda bytes, _alignment, _stream: torch.empty(bytes, dtype=torch.int8, device="cuda"))
    return {
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "BLOCK_T": size.queries,
        "BLOCK_S": size.keys,
        "CAUSAL": call.causal,
        "WINDOW": call.window is not None,
        "SOFTCAP": call.softcap is not None,
        "PACKED": call.cu_seqlens_q is not None,
        "DESCRIPTOR": descriptors,
        "num_warps": size.warps,
        "num_stages": size.stages,
    }


def suits_the_copy_engine(tensor: Tensor) -> bool:
    """Its rows begin at multiples of 16 bytes."""
    starts = (tensor.data_ptr(), *(stride * tensor.element_size() for stride in tensor.stride()[:-1]))
    return all(start % 16 == 0 for start in starts)


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
    size = tile("forward", q.device, head_dim, q.element_size())
    constants = switches(call, head_dim, size, (q, k, v))
    programs = triton.cdiv(call.longest_q, size.queries) * sequences(call, q) * heads
    if programs:
        forward_kernel[(programs,)](
            q, k, v, out, lse, call.cu_seqlens_q, call.cu_seqlens_k,
            *strides(q), *strides(k), *strides(v), *strides(out), *lse_strides(lse),
            call.longest_q, call.longest_k, heads, heads // k.shape[-2], *scales(call), call.window or 0,
            SPECIALIZE=size.specialize and constants["DESCRIPTOR"], **constants,
        )  # fmt: skip
    return out, lse


def backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, d_out: Tensor, d_lse: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv, contiguous."""
    dq, dk, dv = (torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) for tensor in (q, k, v))
    delta = torch.empty_like(lse)
    heads, head_dim = q.shape[-2:]
    key_heads, count = k.shape[-2], sequences(call, q)
    options = (heads // key_heads, call.scale, *scales(call), call.window or 0)
    if call.longest_q * count * heads:
        block = tile("delta", q.device, head_dim, q.element_size()).queries
        size = tile("queries", q.device, head_dim, q.element_size())
        constants = switches(call, head_dim, size, (k, v))
        delta_kernel[(triton.cdiv(call.longest_q, block) * count * heads,)](
            out, d_out, d_lse, delta, call.cu_seqlens_q, *strides(out), *strides(d_out), *lse_strides(lse),
            call.longest_q, heads, HEAD_DIM=head_dim, BLOCK_D=constants["BLOCK_D"], BLOCK_T=block,
            PACKED=constants["PACKED"],
        )  # fmt: skip
        dq_kernel[(triton.cdiv(call.longest_q, size.queries) * count * heads,)](
            q, k, v, d_out, dq, lse, delta, call.cu_seqlens_q, call.cu_seqlens_k,
            *strides(q), *strides(k), *strides(v), *strides(d_out), *strides(dq), *lse_strides(lse),
            call.longest_q, call.longest_k, heads, *options, **constants,
        )  # fmt: skip
    if call.longest_k * count * key_heads:
        size = tile("keys", q.device, head_dim, q.element_size())
        dk_dv_kernel[(triton.cdiv(call.longest_k, size.keys) * count * key_heads,)](
            q, k, v, d_out, dk, dv, lse, delta, call.cu_seqlens_q, call.cu_seqlens_k,
            *strides(q), *strides(k), *strides(v), *strides(d_out), *strides(dk), *strides(dv), *lse_strides(lse),
            call.longest_q, call.longest_k, key_heads, *options, SPLIT=size.split,
            **switches(call, head_dim, size, (q, k, v, d_out)),
        )  # fmt: skip
    return dq, dk, dv
