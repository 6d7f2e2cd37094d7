"""The Triton kernels as torch.library operators: with shapes for torch.compile, and with a gradient."""

from typing import Any, Optional

import torch
from torch import Tensor

from kernels.attention.call import Call
from kernels.attention.launch import backward, forward


@torch.library.custom_op("gpt::attention_forward", mutates_args=())
def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Optional[Tensor],  # noqa: UP045 - the schema is read from these annotations, by every version of torch
    cu_seqlens_k: Optional[Tensor],  # noqa: UP045
    longest_q: int,
    longest_k: int,
    causal: bool,
    scale: float,
    window: Optional[int],  # noqa: UP045
    softcap: Optional[float],  # noqa: UP045
) -> tuple[Tensor, Tensor]:
    """(out like q, contiguous; log-sum-exp fp32 [B, H, T] or [H, tokens])."""
    call = Call(causal, scale, window, softcap, cu_seqlens_q, cu_seqlens_k, longest_q, longest_k)
    return forward(q, k, v, call)


@attention_forward.register_fake
def _(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    shape = (q.shape[0], q.shape[2], q.shape[1]) if q.ndim == 4 else (q.shape[1], q.shape[0])
    return q.new_empty(q.shape), q.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("gpt::attention_backward", mutates_args=())
def attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    d_lse: Tensor,
    cu_seqlens_q: Optional[Tensor],  # noqa: UP045
    cu_seqlens_k: Optional[Tensor],  # noqa: UP045
    longest_q: int,
    longest_k: int,
    causal: bool,
    scale: float,
    window: Optional[int],  # noqa: UP045
    softcap: Optional[float],  # noqa: UP045
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv, contiguous."""
    call = Call(causal, scale, window, softcap, cu_seqlens_q, cu_seqlens_k, longest_q, longest_k)
    return backward(q, k, v, out, lse, d_out, d_lse, call)


@attention_backward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens_q, cu_seqlens_k, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, cu_seqlens_q, cu_seqlens_k, *output)


def _gradient(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, cu_seqlens_q, cu_seqlens_k, out, lse = ctx.saved_tensors
    gradients = attention_backward(
        q, k, v, out, lse, d_out.contiguous(), d_lse.contiguous(), cu_seqlens_q, cu_seqlens_k, *ctx.options
    )
    return *gradients, *[None] * (2 + len(ctx.options))


attention_forward.register_autograd(_gradient, setup_context=_save)
