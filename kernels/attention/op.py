"""flash_attention: the public function, its checks, and the torch backend."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention.reference import attention_reference, visible
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
    -0.5 unless given. A row that sees no key gives 0 (log-sum-exp: -inf).

    Returns out like q, and with return_lse also the log-sum-exp of each row, fp32 [B, H, T] or [H, tokens].
    Raises ValueError naming the argument that does not fit.
    """
    packed = cu_seqlens_q is not None or cu_seqlens_k is not None
    _check(q, k, v, packed=packed, window=window, softcap=softcap)
    if backend(q.device) == "triton" and q.dtype != torch.float64:
        return _triton(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, scale, window, softcap, return_lse
        )
    if not packed:
        out, lse = _dense(q, k, v, causal, scale, window, softcap, return_lse)
        return (out, lse) if return_lse and lse is not None else out
    return _packed(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, scale, window, softcap, return_lse
    )


def _triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    causal: bool,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    # Imported here: a machine that runs the torch backend needs no Triton.
    from kernels.attention.operators import attention_forward

    if not 1 <= q.shape[-1] <= 256:
        raise ValueError(f"q has head dim {q.shape[-1]}; expected 1 to 256 (GPT_KERNELS=torch takes any)")
    if cu_seqlens_q is None and cu_seqlens_k is None:
        longest_q, longest_k = q.shape[1], k.shape[1]
    else:
        longest_q = _longest("cu_seqlens_q", cu_seqlens_q, q.shape[0], max_seqlen_q)
        longest_k = _longest("cu_seqlens_k", cu_seqlens_k, k.shape[0], max_seqlen_k)
        if cu_seqlens_q is None or cu_seqlens_k is None or len(cu_seqlens_q) != len(cu_seqlens_k):
            raise ValueError("cu_seqlens_q and cu_seqlens_k hold different numbers of sequences; expected the same")
    # The kernels read whole rows: the last dimension must be dense, the others may have any stride.
    q, k, v = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out, lse = attention_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, longest_q, longest_k, causal, scale, window, softcap
    )
    return (out, lse) if return_lse else out


def _longest(name: str, boundaries: Tensor | None, tokens: int, longest: int | None) -> int:
    """The longest sequence. To look makes a GPU wait: there, boundaries that come with their max_seqlen are trusted."""
    if longest is not None and boundaries is not None and boundaries.is_cuda:
        return longest
    starts = _check_boundaries(name, boundaries, tokens, longest)
    return max((end - start for start, end in pairwise(starts)), default=0)


# The loop over sequences depends on data: torch.compile would unroll it, and compile anew for every batch.
@torch.compiler.disable
def _packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    causal: bool,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    starts_q = _check_boundaries("cu_seqlens_q", cu_seqlens_q, q.shape[0], max_seqlen_q)
    starts_k = _check_boundaries("cu_seqlens_k", cu_seqlens_k, k.shape[0], max_seqlen_k)
    if len(starts_q) != len(starts_k):
        raise ValueError(f"cu_seqlens_k holds {len(starts_k) - 1} sequences; cu_seqlens_q holds {len(starts_q) - 1}")
    lengths_q = [end - start for start, end in pairwise(starts_q)]
    lengths_k = [end - start for start, end in pairwise(starts_k)]
    # One split for all sequences: its backward is a single concatenation, where slicing would add up one full-size
    # gradient per sequence.
    parts = zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True)
    results = [
        _dense(q_part[None], k_part[None], v_part[None], causal, scale, window, softcap, return_lse)
        for q_part, k_part, v_part in parts
    ]
    out = torch.cat([out[0] for out, _ in results]) if results else torch.empty_like(q)
    if not return_lse:
        return out
    none = torch.empty(q.shape[1], 0, device=q.device)
    return out, torch.cat([none, *(lse[0] for _, lse in results if lse is not None)], dim=-1)


def _dense(
    q_BTHD: Tensor,
    k_BSHD: Tensor,
    v_BSHD: Tensor,
    causal: bool,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
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


def _check(q: Tensor, k: Tensor, v: Tensor, *, packed: bool, window: int | None, softcap: float | None) -> None:
    layout = "[tokens, heads, head_dim] with cu_seqlens" if packed else "[batch, length, heads, head_dim]"
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.ndim != (3 if packed else 4):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {layout}")
        if not tensor.is_floating_point() or tensor.dtype != q.dtype:
            raise ValueError(f"{name} is {tensor.dtype}; expected the floating dtype of q ({q.dtype})")
        if tensor.device != q.device:
            raise ValueError(f"{name} is on {tensor.device}; expected the device of q ({q.device})")
    if v.shape != k.shape:
        raise ValueError(f"v has shape {tuple(v.shape)}; expected that of k, {tuple(k.shape)}")
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"k has head dim {k.shape[-1]}; expected that of q, {q.shape[-1]}")
    if not packed and k.shape[0] != q.shape[0]:
        raise ValueError(f"k has batch {k.shape[0]}; expected that of q, {q.shape[0]}")
    if k.shape[-2] == 0 or q.shape[-2] % k.shape[-2] != 0:
        raise ValueError(f"q has {q.shape[-2]} heads; expected a multiple of the {k.shape[-2]} heads of k")
    if window is not None and window < 1:
        raise ValueError(f"window is {window}; expected None or at least 1")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap is {softcap}; expected None or a number above 0")


def _check_boundaries(name: str, boundaries: Tensor | None, tokens: int, longest: int | None) -> list[int]:
    if boundaries is None:
        raise ValueError(f"{name} is missing; packed attention needs cu_seqlens_q and cu_seqlens_k")
    if boundaries.ndim != 1 or boundaries.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} is {boundaries.dtype} {tuple(boundaries.shape)}; expected int32 [sequences + 1]")
    starts: list[int] = boundaries.tolist()
    lengths = [end - start for start, end in pairwise(starts)]
    if not starts or starts[0] != 0 or starts[-1] != tokens or any(length < 0 for length in lengths):
        raise ValueError(f"{name} is {starts[:8]}...; expected to rise from 0 to the number of tokens, {tokens}")
    if longest is not None and lengths and max(lengths) > longest:
        raise ValueError(f"{name} holds a sequence of {max(lengths)} tokens; max_seqlen_{name[-1]} says {longest}")
    return starts
