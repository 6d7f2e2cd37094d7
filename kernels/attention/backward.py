"""Flash attention, backward: the delta kernel, the dk and dv kernel, the dq kernel, and their launches.

With P = exp(S - lse) computed again from the saved log-sum-exp, and dP = dO V^T (Dao, arXiv:2307.08691):

    delta = rowsum(dO * O) - dlse    dV = P^T dO    dS = P * (dP - delta)    dQ = scale * dS K    dK = scale * dS^T Q

A program of dk_dv_kernel owns a block of keys and walks over the queries that see it; a program of dq_kernel owns a
block of queries and walks over the keys it sees. Scores are computed twice, but every gradient has a single owner, who
adds it up in registers and writes it once: there are no atomics, and the bits are equal in every run.

Names: b_ is a block in registers, o_ are offsets. Sizes: T queries, S keys, D head dim.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import tiles
from kernels.attention import tile
from kernels.attention.reference import Call
from kernels.jit import Launch, jit, kernel, tanh


@kernel
def delta_kernel(
    out_ptr, d_out_ptr,  # contiguous
    d_lse_ptr,  # like lse and delta, or None
    delta_ptr, cu_q_ptr, heads,
    tokens, queries,  # as in the forward kernel
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, PACKED: tl.constexpr, D_LSE: tl.constexpr,
):  # fmt: skip
    # Through the softmax a score's gradient depends on its whole row: dS = P * (dP - rowsum(P * dP)). That row sum
    # equals rowsum(dO * O), because O = P V: it needs no scores, and is computed here once for all blocks. The
    # log-sum-exp's own gradient adds P * dlse to dS, and so becomes part of the same number.
    row, batch, head = tile.program(queries, heads, BLOCK_T, False)
    start, length = tile.sequence(cu_q_ptr, batch, queries, PACKED)
    if row >= length:
        return
    out_start = (start * heads + head) * HEAD_DIM
    lse_start = tile.lse_begin(start, head, heads, tokens, PACKED)
    stride = heads * HEAD_DIM
    b_out = tile.load(out_ptr + out_start, row, length, stride, BLOCK_T, BLOCK_D, HEAD_DIM, False).to(tl.float32)
    b_d_out = tile.load(d_out_ptr + out_start, row, length, stride, BLOCK_T, BLOCK_D, HEAD_DIM, False).to(tl.float32)
    o_row = row + tl.arange(0, BLOCK_T)
    b_delta = tl.sum(b_out * b_d_out, 1)
    if D_LSE:
        b_delta -= tl.load(d_lse_ptr + lse_start + o_row, mask=o_row < length, other=0.0)
    tl.store(delta_ptr + lse_start + o_row, b_delta, mask=o_row < length)


@jit
def _score_gradient(
    b_s, b_dp,  # q k^T and dO V^T, [BLOCK_T, BLOCK_S] or transposed
    b_lse, b_delta,  # one for each query, broadcast over keys; the log-sum-exp in units of log2
    scale, softcap_log2, SOFTCAP: tl.constexpr,  # as in the forward kernel
):  # fmt: skip
    """Return the probabilities and the gradient of the scores before the scale, both without a mask."""
    if SOFTCAP:
        b_tanh = tanh(b_s * scale)
        b_p = tl.exp2(b_tanh * softcap_log2 - b_lse)
        return b_p, b_p * (b_dp - b_delta) * (1.0 - b_tanh * b_tanh)
    b_p = tl.exp2(b_s * scale - b_lse)
    return b_p, b_p * (b_dp - b_delta)


@kernel
def dk_dv_kernel(
    q_ptr, k_ptr, v_ptr,
    d_out_ptr, dk_ptr, dv_ptr,  # contiguous
    lse_ptr, delta_ptr, cu_q_ptr, cu_k_ptr,
    stride_q_batch, stride_q_token, stride_q_head, stride_k_batch, stride_k_token, stride_k_head,
    stride_v_batch, stride_v_token, stride_v_head,
    key_heads, group, tokens, queries, keys, window, scale, softcap_log2,  # as in the forward kernel
    gradient_scale,  # of the scores, as it was asked for
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PACKED: tl.constexpr, DESCRIPTOR: tl.constexpr,
    SPLIT: tl.constexpr,  # see tiles.Tile
):  # fmt: skip
    # The first keys of a causal sequence are seen by the most queries: their programs start first.
    key, batch, key_head = tile.program(keys, key_heads, BLOCK_S, False)
    q_start, queries = tile.sequence(cu_q_ptr, batch, queries, PACKED)
    k_start, keys = tile.sequence(cu_k_ptr, batch, keys, PACKED)
    if key >= keys:
        return
    k_ptr += tile.begin(k_start, batch, key_head, stride_k_batch, stride_k_token, stride_k_head, PACKED)
    v_ptr += tile.begin(k_start, batch, key_head, stride_v_batch, stride_v_token, stride_v_head, PACKED)
    k = tile.matrix(k_ptr, keys, stride_k_token, BLOCK_S, BLOCK_D, HEAD_DIM, DESCRIPTOR)
    v = tile.matrix(v_ptr, keys, stride_v_token, BLOCK_S, BLOCK_D, HEAD_DIM, DESCRIPTOR)
    b_k = tile.load(k, key, keys, stride_k_token, BLOCK_S, BLOCK_D, HEAD_DIM, DESCRIPTOR)
    b_v = tile.load(v, key, keys, stride_v_token, BLOCK_S, BLOCK_D, HEAD_DIM, DESCRIPTOR)
    b_dk = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    o_key = key + tl.arange(0, BLOCK_S)
    begin, full_begin, full_end, end = tile.queries_seeing(key, queries, keys, window, BLOCK_T, BLOCK_S, CAUSAL, WINDOW)
    # With a window, a loop without a mask beside those on both borders would spill.
    ONE_LOOP: tl.constexpr = WINDOW or (CAUSAL and not SPLIT)
    if ONE_LOOP:  # part 0, with a mask, reaches to the end
        full_begin = end
    # One program takes all query heads that share these keys, one after the other: the sum over the heads stays in its
    # registers, and always has the same order.
    heads = key_heads * group
    for member in range(group):
        head = key_head * group + member
        head_q_ptr = q_ptr + tile.begin(q_start, batch, head, stride_q_batch, stride_q_token, stride_q_head, PACKED)
        head_d_out_ptr = d_out_ptr + (q_start * heads + head) * HEAD_DIM
        lse_start = tile.lse_begin(q_start, head, heads, tokens, PACKED)
        q = tile.matrix(head_q_ptr, queries, stride_q_token, BLOCK_T, BLOCK_D, HEAD_DIM, DESCRIPTOR)
        d_out = tile.matrix(head_d_out_ptr, queries, heads * HEAD_DIM, BLOCK_T, BLOCK_D, HEAD_DIM, DESCRIPTOR)
        # As in the forward kernel, part 1 needs no mask. Where CAUSAL, masked rows come first, and none behind part 1.
        for part in tl.static_range(0 if CAUSAL or WINDOW else 1, 1 if ONE_LOOP else 2):
            first, last = tile.walk(part, begin, full_begin, full_end, end)
            for row in tl.range(first, last, BLOCK_T):
                o_row = row + tl.arange(0, BLOCK_T)
                b_q = tile.load(q, row, queries, stride_q_token, BLOCK_T, BLOCK_D, HEAD_DIM, DESCRIPTOR)
                b_d_out = tile.load(d_out, row, queries, heads * HEAD_DIM, BLOCK_T, BLOCK_D, HEAD_DIM, DESCRIPTOR)
                # A row that does not exist gets probability exp2(-inf) = 0; gradients of other keys are not stored.
                b_lse = (
                    tl.load(lse_ptr + lse_start + o_row, mask=o_row < queries, other=float("inf")) * 1.4426950408889634
                )
                b_delta = tl.load(delta_ptr + lse_start + o_row, mask=o_row < queries, other=0.0)
                b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee")  # [BLOCK_S, BLOCK_T]
                b_dp = tl.dot(b_v, tl.trans(b_d_out), input_precision="ieee")  # [BLOCK_S, BLOCK_T]
                b_p, b_ds = _score_gradient(b_s, b_dp, b_lse[None, :], b_delta[None, :], scale, softcap_log2, SOFTCAP)
                if part != 1:
                    mask = tile.visible(o_row[None, :] + keys - queries, o_key[:, None], keys, window, CAUSAL, WINDOW)
                    b_p = tl.where(mask, b_p, 0.0)
                    b_ds = tl.where(mask, b_ds, 0.0)
                b_dv = tl.dot(b_p.to(b_d_out.dtype), b_d_out, b_dv, input_precision="ieee")
                b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision="ieee")
    dk_start = (k_start * key_heads + key_head) * HEAD_DIM
    stride_dk_token = key_heads * HEAD_DIM
    tile.store(dk_ptr + dk_start, b_dk * gradient_scale, key, keys, stride_dk_token, BLOCK_S, BLOCK_D, HEAD_DIM)
    tile.store(dv_ptr + dk_start, b_dv, key, keys, stride_dk_token, BLOCK_S, BLOCK_D, HEAD_DIM)


@kernel
def dq_kernel(
    q_ptr, k_ptr, v_ptr, d_out_ptr, dq_ptr, lse_ptr, delta_ptr, cu_q_ptr, cu_k_ptr,
    stride_q_batch, stride_q_token, stride_q_head, stride_k_batch, stride_k_token, stride_k_head,
    stride_v_batch, stride_v_token, stride_v_head,
    heads, group, tokens, queries, keys, window, scale, softcap_log2, gradient_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PACKED: tl.constexpr, DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    row, batch, head = tile.program(queries, heads, BLOCK_T, True)  # True: the last rows first
    q_start, queries = tile.sequence(cu_q_ptr, batch, queries, PACKED)
    k_start, keys = tile.sequence(cu_k_ptr, batch, keys, PACKED)
    if row >= queries:
        return
    q_ptr += tile.begin(q_start, batch, head, stride_q_batch, stride_q_token, stride_q_head, PACKED)
    k_ptr += tile.begin(k_start, batch, head // group, stride_k_batch, stride_k_token, stride_k_head, PACKED)
    v_ptr += tile.begin(k_start, batch, head // group, stride_v_batch, stride_v_token, stride_v_head, PACKED)
    out_start = (q_start * heads + head) * HEAD_DIM
    stride_out_token = heads * HEAD_DIM
    lse_start = tile.lse_begin(q_start, head, heads, tokens, PACKED)
    k = tile.matrix(k_ptr, keys, stride_k_token, BLOCK_S, BLOCK_D, HEAD_DIM, DESCRIPTOR)
    v = tile.matrix(v_ptr, keys, stride_v_token, BLOCK_S, BLOCK_D, HEAD_DIM, DESCRIPTOR)
    o_row = row + tl.arange(0, BLOCK_T)
    o_query = o_row + keys - queries
    b_q = tile.load(q_ptr, row, queries, stride_q_token, BLOCK_T, BLOCK_D, HEAD_DIM, False)
    b_d_out = tile.load(d_out_ptr + out_start, row, queries, stride_out_token, BLOCK_T, BLOCK_D, HEAD_DIM, False)
    b_lse = tl.load(lse_ptr + lse_start + o_row, mask=o_row < queries, other=float("inf")) * 1.4426950408889634
    b_delta = tl.load(delta_ptr + lse_start + o_row, mask=o_row < queries, other=0.0)
    b_dq = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    begin, full_begin, full_end, end = tile.keys_seen(row, queries, keys, window, BLOCK_T, BLOCK_S, CAUSAL, WINDOW)
    # As in the forward kernel, part 1 needs no mask.
    for part in tl.static_range(0 if WINDOW else 1, 3):
        first, last = tile.walk(part, begin, full_begin, full_end, end)
        for key in tl.range(first, last, BLOCK_S):
            b_k = tile.load(k, key, keys, stride_k_token, BLOCK_S, BLOCK_D, HEAD_DIM, DESCRIPTOR, part != 1)
            b_v = tile.load(v, key, keys, stride_v_token, BLOCK_S, BLOCK_D, HEAD_DIM, DESCRIPTOR, part != 1)
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # [BLOCK_T, BLOCK_S]
            b_dp = tl.dot(b_d_out, tl.trans(b_v), input_precision="ieee")  # [BLOCK_T, BLOCK_S]
            _b_p, b_ds = _score_gradient(b_s, b_dp, b_lse[:, None], b_delta[:, None], scale, softcap_log2, SOFTCAP)
            if part != 1:
                o_key = key + tl.arange(0, BLOCK_S)
                b_ds = tl.where(tile.visible(o_query[:, None], o_key[None, :], keys, window, CAUSAL, WINDOW), b_ds, 0.0)
            b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision="ieee")
    tile.store(dq_ptr + out_start, b_dq * gradient_scale, row, queries, stride_out_token, BLOCK_T, BLOCK_D, HEAD_DIM)


def backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, d_out: Tensor, d_lse: Tensor | None, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk and dv, contiguous; d_out and d_lse are made so."""
    d_out, d_lse = d_out.contiguous(), None if d_lse is None else d_lse.contiguous()
    dq, dk, dv = (torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) for tensor in (q, k, v))
    delta = torch.empty_like(lse)
    heads, head_dim = q.shape[-2:]
    key_heads, count = k.shape[-2], call.sequences(q)
    longest, switches = max(call.longest_q, call.longest_k), call.switches()
    about = (q.device, head_dim, q.element_size(), longest)
    bounds, strides = (call.cu_seqlens_q, call.cu_seqlens_k), call.strides(q, k, v)
    lengths = (lse.shape[-1], call.longest_q, call.longest_k)
    numbers = (*lengths, call.window or 0, *call.scales(), call.scale)
    suits = tile.suits_the_copy_engine(k, v)
    if call.longest_q * count * heads:
        block = tiles.tile("delta", *about).queries
        launch = delta_launch(block, head_dim, PACKED=switches[-1], D_LSE=d_lse is not None)
        programs = -(-call.longest_q // block) * count * heads
        launch((programs, 1, 1), (out, d_out, d_lse, delta, call.cu_seqlens_q), (heads,), lengths[:2])
        size = tiles.tile("queries", *about)
        launch = tile.launch(dq_kernel, size, head_dim, switches, suits)
        programs = -(-call.longest_q // size.queries) * count * heads
        launch(
            (programs, 1, 1), (q, k, v, d_out, dq, lse, delta, *bounds), (*strides, heads, heads // key_heads), numbers
        )
    if call.longest_k * count * key_heads:
        suits = suits and tile.suits_the_copy_engine(q, d_out)
        size = tiles.tile("keys", *about)
        launch = tile.launch(dk_dv_kernel, size, head_dim, switches, suits, SPLIT=size.split)
        programs = -(-call.longest_k // size.keys) * count * key_heads
        launch(
            (programs, 1, 1), (q, k, v, d_out, dk, dv, lse, delta, *bounds),
            (*strides, key_heads, heads // key_heads), numbers,
        )  # fmt: skip
    return dq, dk, dv


@cache
def delta_launch(block: int, head_dim: int, **switches: bool) -> Launch:
    block_d = max(16, triton.next_power_of_2(head_dim))
    return Launch(delta_kernel, HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_T=block, **switches)
