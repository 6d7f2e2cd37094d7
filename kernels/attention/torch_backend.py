"""The same attention in PyTorch, where no Triton kernel can be launched: every argument, every dtype."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention.call import Call
from kernels.attention.reference import attention_reference, visible


def attention_torch(q: Tensor, k: Tensor, v: Tensor, call: Call, *, return_lse: bool) -> tuple[Tensor, Tensor | None]:
    """(out, log-sum-exp where it is asked for), as flash_attention gives them."""
    if call.cu_seqlens_q is None:
        return dense(q, k, v, call, return_lse)
    return _packed(q, k, v, call, return_lse)


# The loop over sequences depends on data: torch.compile would unroll it, and compile anew for every batch.
@torch.compiler.disable
def _packed(q: Tensor, k: Tensor, v: Tensor, call: Call, return_lse: bool) -> tuple[Tensor, Tensor | None]:
    assert call.cu_seqlens_q is not None and call.cu_seqlens_k is not None
    lengths_q = [end - start for start, end in pairwise(call.cu_seqlens_q.tolist())]
    lengths_k = [end - start for start, end in pairwise(call.cu_seqlens_k.tolist())]
    # One split for all sequences: its backward is a single concatenation, where slicing would add up one full-size
    # gradient per sequence.
    parts = zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True)
    results = [dense(q_part[None], k_part[None], v_part[None], call, return_lse) for q_part, k_part, v_part in parts]
    out = torch.cat([out[0] for out, _ in results]) if results else torch.empty_like(q)
    if not return_lse:
        return out, None
    none = torch.empty(q.shape[1], 0, device=q.device)
    return out, torch.cat([none, *(lse[0] for _, lse in results if lse is not None)], dim=-1)


def dense(q_BTHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, call: Call, return_lse: bool) -> tuple[Tensor, Tensor | None]:
    causal, scale, window, softcap = call.causal, call.scale, call.window, call.softcap
    queries, keys = q_BTHD.shape[1], k_BSHD.shape[1]
    # SDPA gives NaN for a row without keys, and knows neither softcap nor log-sum-exp.
    rows_without_keys = keys == 0 or (queries > keys and (causal or window is not None))
    if return_lse or softcap is not None or rows_without_keys or queries == 0:
        out, lse = attention_reference(
            q_BTHD, k_BSHD, v_BSHD, causal=causal, scale=scale, window=window, softcap=softcap
        )
        return out, lse.float()
    square = causal and queries == keys and (window is None or window >= keys)
    mask = None if square else visible(queries, keys, causal=causal, window=window, device=q_BTHD.device)
    out_BHTD = F.scaled_dot_product_attention(
        q_BTHD.transpose(1, 2),
        k_BSHD.transpose(1, 2),
        v_BSHD.transpose(1, 2),
        attn_mask=mask,
        is_causal=square,
        scale=scale,
        enable_gqa=q_BTHD.shape[2] != k_BSHD.shape[2],
    )
    return out_BHTD.transpose(1, 2), None
