"""decode_attention, the public function: checks its arguments and hands them to a backend."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention.call import Call, check_options
from kernels.attention.torch_backend import dense
from kernels.backend import backend


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lengths: Tensor,
    *,
    block_table: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Causal attention of the T newest tokens of each sequence (Flash-Decoding; PagedAttention, arXiv:2309.06180).

    q [B, T, H, D]: T is meant to be 1 to 16, and may be any. k_cache, v_cache [B, S, Hkv, D], with a dense last
    dimension, of which the first cache_lengths[b] entries (int32 or int64 [B], the T new ones counted in, at most S)
    belong to sequence b. With block_table, int32 [B, blocks], the caches are [any, block_size, Hkv, D], and key j of
    sequence b is row j % block_size of block block_table[b, j // block_size].

    Query t stands at position cache_lengths[b] - T + t; before position 0 it gives 0. scale, window and softcap as in
    flash_attention. Returns [B, T, H, D]. What cache and table hold beyond a length does not matter, even NaN (the
    torch backend wants it finite where a dense cache has unequal lengths). For inference: from the Triton kernels
    there is no way back to a gradient. They leave the lengths on the device, so that a CUDA graph can hold them.

    Raises ValueError naming the argument that does not fit.
    """
    _check(q, k_cache, v_cache, cache_lengths, block_table)
    scale = check_options(q.shape[-1], scale, window, softcap)
    call = Call(True, scale, window, softcap, None, None, q.shape[1], k_cache.shape[1])
    if backend(q.device) == "triton" and q.dtype != torch.float64:
        return _triton(q, k_cache, v_cache, cache_lengths, block_table, call)
    # The lengths decide here, which torch.compile cannot follow. Its wrapper would take longer than a short cache does.
    run = _uncompiled if torch.compiler.is_compiling() else _torch
    return run(q, k_cache, v_cache, cache_lengths, block_table, call)


def _check(q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_lengths: Tensor, block_table: Tensor | None) -> None:
    """Once per layer and token: what is compared is at hand, not computed."""
    shape, cache = q.shape, k_cache.shape
    for name, size in (("q", shape), ("k_cache", cache)):
        if len(size) != 4:
            raise ValueError(f"{name} has shape {tuple(size)}; expected [batch, length, heads, head_dim]")
    if v_cache.shape != cache:
        raise ValueError(f"v_cache has shape {tuple(v_cache.shape)}; expected that of k_cache, {tuple(cache)}")
    if cache[3] != shape[3]:
        raise ValueError(f"k_cache has head dim {cache[3]}; expected that of q, {shape[3]}")
    if cache[2] == 0 or shape[2] % cache[2] != 0:
        raise ValueError(f"q has {shape[2]} heads; expected a multiple of the {cache[2]} heads of k_cache")
    batch, dtype, device = shape[0], q.dtype, q.device
    if not dtype.is_floating_point:
        raise ValueError(f"q is {dtype}; expected a floating dtype")
    if k_cache.dtype != dtype or v_cache.dtype != dtype:
        raise ValueError(f"k_cache is {k_cache.dtype}, v_cache {v_cache.dtype}; expected the dtype of q ({dtype})")
    if cache_lengths.shape != (batch,) or cache_lengths.dtype not in (torch.int64, torch.int32):
        came = f"{cache_lengths.dtype} {tuple(cache_lengths.shape)}"
        raise ValueError(f"cache_lengths is {came}; expected int32 or int64 [{batch}], for each sequence of q")
    if block_table is None:
        if cache[0] != batch:
            raise ValueError(f"k_cache has batch {cache[0]}; expected that of q, {batch}")
    elif block_table.ndim != 2 or block_table.shape[0] != batch or block_table.dtype != torch.int32:
        came = f"{block_table.dtype} {tuple(block_table.shape)}"
        raise ValueError(f"block_table is {came}; expected int32 [{batch}, blocks], a row for each sequence of q")
    elif cache[1] == 0:
        raise ValueError("k_cache has blocks of 0 keys; expected at least 1")
    for name, other in (("k_cache", k_cache), ("v_cache", v_cache), ("cache_lengths", cache_lengths)):
        if other.device != device:
            raise ValueError(f"{name} is on {other.device}; expected the device of q ({device})")
    if block_table is not None and block_table.device != device:
        raise ValueError(f"block_table is on {block_table.device}; expected the device of q ({device})")


def _triton(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lengths: Tensor,
    block_table: Tensor | None,
    call: Call,
) -> Tensor:
    # Imported here: a machine that runs the torch backend needs no Triton.
    from kernels.attention.decode_launch import decode

    if not 1 <= q.shape[-1] <= 256:
        raise ValueError(f"q has head dim {q.shape[-1]}; expected 1 to 256 (GPT_KERNELS=torch takes any)")
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        # A copy would cost more than the attention.
        if cache.stride(-1) != 1:
            raise ValueError(f"{name} has stride {cache.stride(-1)} in its last dimension; expected 1")
    q = q if q.stride(-1) == 1 else q.contiguous()
    table = block_table if block_table is None or block_table.stride(-1) == 1 else block_table.contiguous()
    return decode(q, k_cache, v_cache, cache_lengths, table, call.scale, call.window, call.softcap)


def _torch(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lengths: Tensor,
    block_table: Tensor | None,
    call: Call,
) -> Tensor:
    queries, window, lengths = q.shape[1], call.window, cache_lengths.tolist()
    shortest, longest = min(lengths, default=0), max(lengths, default=0)
    if block_table is None and shortest >= queries and call.softcap is None and (queries == 1 or shortest != longest):
        seen = slice(_seen(shortest, queries, window).start, longest)
        # A single query, the last, sees all of the keys that it is given.
        alike = shortest == longest
        visible_BTS = None if alike else _visible(cache_lengths, queries, seen, window)
        return _attend(q, k_cache[:, seen], v_cache[:, seen], visible_BTS, call.scale)
    if queries == 1:
        call = replace(call, causal=False, window=None)
    if block_table is None and shortest == longest:
        seen = _seen(longest, queries, window)
        return dense(q, k_cache[:, seen], v_cache[:, seen], call, return_lse=False)[0]
    out = torch.empty_like(q)
    for row, length in enumerate(lengths):
        seen = _seen(length, queries, window)
        k, v = (_of_sequence(cache, row, seen, block_table) for cache in (k_cache, v_cache))
        out[row : row + 1] = dense(q[row : row + 1], k[None], v[None], call, return_lse=False)[0]
    return out


_uncompiled = torch.compiler.disable(_torch)


def _visible(cache_lengths: Tensor, queries: int, seen: slice, window: int | None) -> Tensor:
    position_BT = cache_lengths[:, None] + torch.arange(-queries, 0, device=cache_lengths.device)
    distance_BTS = position_BT[:, :, None] - torch.arange(seen.start, seen.stop, device=cache_lengths.device)
    visible_BTS = distance_BTS >= 0
    return visible_BTS if window is None else visible_BTS & (distance_BTS < window)


def _attend(q: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, visible_BTS: Tensor | None, scale: float) -> Tensor:
    """All sequences at once: of small ones, twice as fast as one by one."""
    out_BHTD = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k_BSHD.transpose(1, 2),
        v_BSHD.transpose(1, 2),
        attn_mask=None if visible_BTS is None else visible_BTS[:, None],
        scale=scale,
        enable_gqa=q.shape[2] != k_BSHD.shape[2],
    )
    return out_BHTD.transpose(1, 2)


def _seen(length: int, queries: int, window: int | None) -> slice:
    """The keys that one of the newest `queries` sees."""
    start = 0 if window is None else max(length - queries - window + 1, 0)
    return slice(start, max(length, start))


def _of_sequence(cache: Tensor, row: int, seen: slice, block_table: Tensor | None) -> Tensor:
    if block_table is None:
        return cache[row, seen]
    size = cache.shape[1]
    first = seen.start // size
    blocks = block_table[row, first : -(-seen.stop // size)]
    return cache[blocks].flatten(0, 1)[seen.start - first * size : seen.stop - first * size]
