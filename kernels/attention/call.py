"""One record for the arguments of an attention that are no tensors of its layer, and the checks they all pass."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Call:
    """Dense, or packed with both cu_seqlens. `longest_q` and `longest_k` bound the lengths of the sequences."""

    causal: bool
    scale: float
    window: int | None
    softcap: float | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    longest_q: int
    longest_k: int


def checked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
) -> Call:
    """The record. Raises ValueError naming the argument that does not fit, what came and what was expected."""
    packed = cu_seqlens_q is not None or cu_seqlens_k is not None
    _check_tensors(q, k, v, packed=packed)
    scale = check_options(q.shape[-1], scale, window, softcap)
    if not packed:
        return Call(causal, scale, window, softcap, None, None, q.shape[1], k.shape[1])
    for name, boundaries in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if boundaries is None:
            raise ValueError(f"{name} is missing; packed attention needs cu_seqlens_q and cu_seqlens_k")
        if boundaries.ndim != 1 or len(boundaries) == 0 or boundaries.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{name} is {boundaries.dtype} {tuple(boundaries.shape)}; expected int32 [sequences + 1]")
        if boundaries.device != q.device:
            raise ValueError(f"{name} is on {boundaries.device}; expected the device of q ({q.device})")
    assert cu_seqlens_q is not None and cu_seqlens_k is not None
    if len(cu_seqlens_k) != len(cu_seqlens_q):
        raise ValueError(f"cu_seqlens_k holds {len(cu_seqlens_k) - 1} sequences; cu_seqlens_q {len(cu_seqlens_q) - 1}")
    longest_q = _longest("cu_seqlens_q", cu_seqlens_q, q.shape[0], max_seqlen_q)
    longest_k = _longest("cu_seqlens_k", cu_seqlens_k, k.shape[0], max_seqlen_k)
    return Call(causal, scale, window, softcap, cu_seqlens_q, cu_seqlens_k, longest_q, longest_k)


def check_options(head_dim: int, scale: float | None, window: int | None, softcap: float | None) -> float:
    """The scale. Raises ValueError naming what does not fit."""
    scale = head_dim**-0.5 if scale is None else scale
    if not 0 < scale < float("inf"):
        raise ValueError(f"scale is {scale}; expected None or a finite number above 0")
    if window is not None and window < 1:
        raise ValueError(f"window is {window}; expected None or at least 1")
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"softcap is {softcap}; expected None or a finite number above 0")
    return scale


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, *, packed: bool) -> None:
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


def _longest(name: str, boundaries: Tensor, tokens: int, longest: int | None) -> int:
    """The longest sequence. To look makes a GPU wait: there, boundaries that come with their max_seqlen are trusted."""
    if longest is not None and boundaries.is_cuda:
        return longest
    return _look(name, boundaries, tokens, longest)


# Values decide here, which torch.compile cannot follow.
@torch.compiler.disable
def _look(name: str, boundaries: Tensor, tokens: int, longest: int | None) -> int:
    starts: list[int] = boundaries.tolist()
    lengths = [end - start for start, end in pairwise(starts)]
    if starts[0] != 0 or starts[-1] != tokens or any(length < 0 for length in lengths):
        raise ValueError(f"{name} is {starts[:8]}...; expected to rise from 0 to the number of tokens, {tokens}")
    if longest is not None and max(lengths, default=0) > longest:
        raise ValueError(f"{name} holds a sequence of {max(lengths)} tokens; max_seqlen_{name[-1]} says {longest}")
    return max(lengths, default=0)
