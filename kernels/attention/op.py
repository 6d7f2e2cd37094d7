"""flash_attention and decode_attention: checks, the choice of backend, and operators with shapes and gradients.

A call goes from here to forward.py, backward.py or decode.py, which launch the Triton kernels, or to reference.py. The
first three are imported where they are called: a machine that runs the torch backend needs no Triton.
"""

from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from kernels.attention.reference import Call, decode_torch, dense_torch, empty_results, packed_torch
from kernels.backend import backend, direct, uncompiled, wants_gradient

DENSE, PACKED = "[batch, length, heads, head_dim]", "[tokens, heads, head_dim] with cu_seqlens"


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, *,
    causal: bool = True, scale: float | None = None, window: int | None = None, softcap: float | None = None,
    cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None, max_seqlen_k: int | None = None, return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Return exact attention, softmax(scale * q k^T + mask) v (FlashAttention, arXiv:2205.14135, 2307.08691).

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
    packed = cu_seqlens_q is not None or cu_seqlens_k is not None
    _check_tensors(q, k, v, ("k", "v"), PACKED if packed else DENSE, one_batch=not packed)
    longest = (q.shape[1], k.shape[1])
    if packed:
        longest = _longest_sequences(q, k, (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k))
    scale = _checked_scale(q, scale, window, softcap)
    call = Call(cu_seqlens_q, cu_seqlens_k, *longest, causal, scale, window, softcap)
    if _by_triton(q):
        # The kernels read whole rows: the last dimension must be dense, the others may have any stride.
        q, k, v = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (q, k, v))
        out, lse = _run(q, k, v, *call)
    else:
        out, lse = (packed_torch if packed else dense_torch)(q, k, v, call, return_lse)
    return (out, lse) if return_lse and lse is not None else out


def decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_lengths: Tensor, *, block_table: Tensor | None = None,
    scale: float | None = None, window: int | None = None, softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """Return the causal attention of the T newest tokens of each sequence (Flash-Decoding; PagedAttention, 2309.06180).

    q [B, T, H, D]: T is meant to be 1 to 16, and may be any. k_cache, v_cache [B, S, Hkv, D], with a dense last
    dimension, of which the first cache_lengths[b] entries (int32 or int64 [B], the T new ones counted in, at most S)
    belong to sequence b. With block_table, int32 [B, blocks], the caches are [any, block_size, Hkv, D], and key j of
    sequence b is row j % block_size of block block_table[b, j // block_size].

    Query t has position cache_lengths[b] - T + t; before position 0 it gives 0. scale, window and softcap as in
    flash_attention. Returns [B, T, H, D]. What cache and table hold beyond a length does not matter, even NaN (the
    torch backend wants it finite where a dense cache has unequal lengths). For inference: from the Triton kernels
    there is no way back to a gradient. They leave the lengths on the device, so that a CUDA graph can hold them.

    Raises ValueError naming the argument that does not fit.
    """
    _check_tensors(q, k_cache, v_cache, ("k_cache", "v_cache"), DENSE, one_batch=block_table is None)
    _check_cache(q, k_cache, cache_lengths, block_table)
    scale = _checked_scale(q, scale, window, softcap)
    if _by_triton(q):
        for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
            # A copy would cost more than the attention.
            if cache.stride(-1) != 1:
                raise ValueError(f"{name} has stride {cache.stride(-1)} in its last dimension; expected 1")
        q = q if q.stride(-1) == 1 else q.contiguous()
        table = block_table if block_table is None or block_table.stride(-1) == 1 else block_table.contiguous()
        # The operator says that there is no gradient, where one would be wanted.
        by_operator = torch.compiler.is_compiling() or wants_gradient(q, k_cache, v_cache)
        attend: Any = attention_decode if by_operator else _decode
        out: Tensor = attend(q, k_cache, v_cache, cache_lengths, table, scale, window, softcap)
        return out
    # Outside of torch.compile the wrapper would only take time, more than a short cache does.
    run = _decode_uncompiled if torch.compiler.is_compiling() else decode_torch
    call = Call(None, None, q.shape[1], k_cache.shape[1], True, scale, window, softcap)
    return run(q, k_cache, v_cache, cache_lengths, block_table, call)


_decode_uncompiled = uncompiled(decode_torch)


def _by_triton(q: Tensor) -> bool:
    if backend(q.device) == "torch" or q.dtype == torch.float64:
        return False
    if not 1 <= q.shape[-1] <= 256:
        raise ValueError(f"q has head dim {q.shape[-1]}; expected 1 to 256 (GPT_KERNELS=torch takes any)")
    return True


def _checked_scale(q: Tensor, scale: float | None, window: int | None, softcap: float | None) -> float:
    """Return the scale. Raises ValueError naming what does not fit."""
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if not 0 < scale < float("inf"):
        raise ValueError(f"scale is {scale}; expected None or a finite number above 0")
    if window is not None and window < 1:
        raise ValueError(f"window is {window}; expected None or at least 1")
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"softcap is {softcap}; expected None or a finite number above 0")
    return scale


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, names: tuple[str, str], layout: str, *, one_batch: bool) -> None:
    """Check what is at hand and compute nothing, since this runs for each layer and token."""
    (k_name, v_name), shape, cache, dtype = names, q.shape, k.shape, q.dtype
    for name, size in (("q", shape), (k_name, cache)):
        if len(size) != (3 if layout is PACKED else 4):
            raise ValueError(f"{name} has shape {tuple(size)}; expected {layout}")
    if v.shape != cache:
        raise ValueError(f"{v_name} has shape {tuple(v.shape)}; expected that of {k_name}, {tuple(cache)}")
    if cache[-1] != shape[-1]:
        raise ValueError(f"{k_name} has head dim {cache[-1]}; expected that of q, {shape[-1]}")
    if one_batch and cache[0] != shape[0]:
        raise ValueError(f"{k_name} has batch {cache[0]}; expected that of q, {shape[0]}")
    if cache[-2] == 0 or shape[-2] % cache[-2] != 0:
        raise ValueError(f"q has {shape[-2]} heads; expected a multiple of the {cache[-2]} heads of {k_name}")
    if not dtype.is_floating_point:
        raise ValueError(f"q is {dtype}; expected a floating dtype")
    if k.dtype != dtype or v.dtype != dtype:
        raise ValueError(f"{k_name} is {k.dtype}, {v_name} {v.dtype}; expected the dtype of q ({dtype})")
    _check_device(q, k_name, k)
    _check_device(q, v_name, v)


def _check_device(q: Tensor, name: str, tensor: Tensor) -> None:
    if tensor.device != q.device:
        raise ValueError(f"{name} is on {tensor.device}; expected the device of q ({q.device})")


def _check_cache(q: Tensor, k_cache: Tensor, cache_lengths: Tensor, block_table: Tensor | None) -> None:
    batch = q.shape[0]
    if cache_lengths.shape != (batch,) or cache_lengths.dtype not in (torch.int64, torch.int32):
        came = f"{cache_lengths.dtype} {tuple(cache_lengths.shape)}"
        raise ValueError(f"cache_lengths is {came}; expected int32 or int64 [{batch}], for each sequence of q")
    _check_device(q, "cache_lengths", cache_lengths)
    if block_table is None:
        return
    if block_table.ndim != 2 or block_table.shape[0] != batch or block_table.dtype != torch.int32:
        came = f"{block_table.dtype} {tuple(block_table.shape)}"
        raise ValueError(f"block_table is {came}; expected int32 [{batch}, blocks], a row for each sequence of q")
    if k_cache.shape[1] == 0:
        raise ValueError("k_cache has blocks of 0 keys; expected at least 1")
    _check_device(q, "block_table", block_table)


def _longest_sequences(
    q: Tensor, k: Tensor, bounds: tuple[Tensor | None, Tensor | None], longest: tuple[int | None, int | None]
) -> tuple[int, int]:
    """Return the lengths of the longest sequences of packed queries and keys, or what is said to bound them."""
    found = []
    for name, tensor, boundaries, most in zip(("cu_seqlens_q", "cu_seqlens_k"), (q, k), bounds, longest, strict=True):
        if boundaries is None:
            raise ValueError(f"{name} is missing; packed attention needs cu_seqlens_q and cu_seqlens_k")
        if boundaries.ndim != 1 or len(boundaries) == 0 or boundaries.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{name} is {boundaries.dtype} {tuple(boundaries.shape)}; expected int32 [sequences + 1]")
        _check_device(q, name, boundaries)
        # To look makes a GPU wait: there, boundaries that come with their max_seqlen are trusted.
        if most is None or not boundaries.is_cuda:
            most = _look(name, boundaries, tensor.shape[0], most)
        found.append((len(boundaries) - 1, most))
    (sequences_q, longest_q), (sequences_k, longest_k) = found
    if sequences_k != sequences_q:
        raise ValueError(f"cu_seqlens_k holds {sequences_k} sequences; cu_seqlens_q {sequences_q}")
    return longest_q, longest_k


@uncompiled
def _look(name: str, boundaries: Tensor, tokens: int, longest: int | None) -> int:
    starts: list[int] = boundaries.tolist()
    lengths = [end - start for start, end in pairwise(starts)]
    if starts[0] != 0 or starts[-1] != tokens or any(length < 0 for length in lengths):
        raise ValueError(f"{name} is {starts[:8]}...; expected to rise from 0 to the number of tokens, {tokens}")
    if longest is not None and max(lengths, default=0) > longest:
        raise ValueError(f"{name} holds a sequence of {max(lengths)} tokens; max_seqlen_{name[-1]} says {longest}")
    return max(lengths, default=0)


# The operators tell torch.compile the shapes of the results, and autograd the way back. Their schemas are written out:
# "SymInt" is a number that may change from call to call without compiling anew.
CALL = (
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt longest_q, SymInt longest_k, "
    "bool causal, float scale, SymInt? window, float? softcap"
)
QKV = "Tensor q, Tensor k, Tensor v"


def _forward(q: Tensor, k: Tensor, v: Tensor, *call: Any) -> tuple[Tensor, Tensor]:
    from kernels.attention.forward import forward

    return forward(q, k, v, Call(*call))


def _backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, d_out: Tensor, d_lse: Tensor | None, *call: Any
) -> tuple[Tensor, Tensor, Tensor]:
    from kernels.attention.backward import backward

    return backward(q, k, v, out, lse, d_out, d_lse, Call(*call))


def _decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_lengths: Tensor, block_table: Tensor | None, *options: Any
) -> Tensor:
    from kernels.attention.decode import decode

    call = Call(None, None, q.shape[1], k_cache.shape[1], True, *options)
    return decode(q, k_cache, v_cache, cache_lengths, block_table, call)


attention_forward = torch.library.custom_op(
    "gpt::attention_forward", _forward, mutates_args=(), schema=f"({QKV}, {CALL}) -> (Tensor, Tensor)"
)
attention_forward.register_fake(lambda q, *rest: empty_results(q))
attention_backward = torch.library.custom_op(
    "gpt::attention_backward", _backward, mutates_args=(),
    schema=f"({QKV}, Tensor out, Tensor lse, Tensor d_out, Tensor? d_lse, {CALL}) -> (Tensor, Tensor, Tensor)",
)  # fmt: skip
attention_backward.register_fake(lambda *tensors: tuple(each.new_empty(each.shape) for each in tensors[:3]))
attention_decode = torch.library.custom_op(
    "gpt::decode_attention", _decode, mutates_args=(),
    schema="(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_lengths, Tensor? block_table, "
    "float scale, SymInt? window, float? softcap) -> Tensor",
)  # fmt: skip
attention_decode.register_fake(lambda q, *rest: q.new_empty(q.shape))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens_q, cu_seqlens_k, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens_q, cu_seqlens_k)
    # Few ask for the log-sum-exp: no zeros are made, and read, for its gradient.
    ctx.set_materialize_grads(False)


def _gradient(
    ctx: Any, d_out: Tensor | None, d_lse: Tensor | None, run: Any = attention_backward
) -> tuple[Tensor | None, ...]:
    *saved, cu_seqlens_q, cu_seqlens_k = ctx.saved_tensors
    d_out = torch.zeros_like(saved[3]) if d_out is None else d_out
    call = (cu_seqlens_q, cu_seqlens_k, *ctx.options)
    return *run(*saved, d_out, d_lse, *call), *[None] * len(call)


attention_forward.register_autograd(_gradient, setup_context=_save)
_run = direct(attention_forward, _forward, _save, partial(_gradient, run=_backward), leaves=3)
