"""flash_attention, the public function: checks its arguments and hands them to a backend."""

import torch
from torch import Tensor

from kernels.attention.call import Call, checked
from kernels.attention.torch_backend import attention_torch
from kernels.backend import backend


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention: softmax(scale * q k^T + mask) v (FlashAttention, arXiv:2205.14135, 2307.08691).

    Dense: q [B, T, H, D], k and v [B, S, Hkv, D]. Packed: q [tokens, H, D], k and v [tokens_k, Hkv, D] with
    cu_seqlens_q and cu_seqlens_k, int32 [sequences + 1], rising from 0 to the number of tokens; no sequence sees
    another. H is a multiple of Hkv. Any floating dtype, the same for all three.

    The causal mask aligns the last query with the last key. `window` is how many keys a query sees up to and including
    its own (and as many ahead, where not causal); `softcap` c turns a score s into c * tanh(s / c); `scale` is D **
    -0.5 unless given. A row that sees no key gives 0 (log-sum-exp: -inf). Boundaries on a GPU are not looked at where
    max_seqlen_q and max_seqlen_k come with them: to look would make the GPU wait.

    Returns out like q, and with return_lse also the log-sum-exp of each row, fp32 [B, H, T] or [H, tokens].
    Raises ValueError naming the argument that does not fit.
    """
    call = checked(
        q,
        k,
        v,
        causal=causal,
        scale=scale,
        window=window,
        softcap=softcap,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
    )
    triton = backend(q.device) == "triton" and q.dtype != torch.float64
    out, lse = _triton(q, k, v, call) if triton else attention_torch(q, k, v, call, return_lse=return_lse)
    return (out, lse) if return_lse and lse is not None else out


def _triton(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    # Imported here: a machine that runs the torch backend needs no Triton.
    from kernels.attention.operators import attention_forward

    if not 1 <= q.shape[-1] <= 256:
        raise ValueError(f"q has head dim {q.shape[-1]}; expected 1 to 256 (GPT_KERNELS=torch takes any)")
    # The kernels read whole rows: the last dimension must be dense, the others may have any stride.
    q, k, v = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (q, k, v))
    return attention_forward(
        q, k, v, call.cu_seqlens_q, call.cu_seqlens_k, call.longest_q, call.longest_k, call.causal, call.scale,
        call.window, call.softcap,
    )  # fmt: skip
