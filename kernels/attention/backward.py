"""The backward kernels of flash attention: delta, then dk and dv, then dq. No atomics: bit-equal from run to run.

With P = exp(S - lse) recomputed from the saved log-sum-exp, and dP = dO V^T (Dao, arXiv:2307.08691):

    delta = rowsum(dO * O) - dlse    dV = P^T dO    dS = P * (dP - delta)    dQ = scale * dS K    dK = scale * dS^T Q

A program of the first pass owns a block of keys and walks over the queries that see it; a program of the second owns a
block of queries and walks over the keys it sees. Every gradient is written once, by its owner.

Names: b_ a block in registers, o_ offsets. Sizes: T queries, S keys, D head dim.
"""

import triton
import triton.language as tl

from kernels.attention.tile import (
    keys_seen,
    load_tile,
    matrix,
    queries_seeing,
    sequence,
    store_tile,
    tanh,
    visible,
)


@triton.jit(do_not_specialize=["queries"])
def delta_kernel(
    out_ptr,
    d_out_ptr,
    d_lse_ptr,  # fp32, like lse
    delta_ptr,  # fp32, like lse
    cu_q_ptr,
    stride_out_batch,
    stride_out_token,
    stride_out_head,
    stride_d_out_batch,
    stride_d_out_token,
    stride_d_out_head,
    stride_lse_batch,
    stride_lse_head,
    queries,
    heads,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PACKED: tl.constexpr,
):
    blocks = tl.cdiv(queries, BLOCK_T)
    row = tl.program_id(0) % blocks * BLOCK_T
    batch = tl.program_id(0) // blocks // heads
    head = tl.program_id(0) // blocks % heads
    out_start, length = sequence(cu_q_ptr, batch, queries, stride_out_batch, stride_out_token, PACKED)
    d_out_start, _ = sequence(cu_q_ptr, batch, queries, stride_d_out_batch, stride_d_out_token, PACKED)
    lse_start, _ = sequence(cu_q_ptr, batch, queries, stride_lse_batch, 1, PACKED)
    if row >= length:
        return
    out_ptr += out_start + head.to(tl.int64) * stride_out_head
    d_out_ptr += d_out_start + head.to(tl.int64) * stride_d_out_head
    lse_start += head.to(tl.int64) * stride_lse_head
    b_out = load_tile(out_ptr, row, length, stride_out_token, BLOCK_T, BLOCK_D, HEAD_DIM, False).to(tl.float32)
    b_d_out = load_tile(d_out_ptr, row, length, stride_d_out_token, BLOCK_T, BLOCK_D, HEAD_DIM, False).to(tl.float32)
    o_row = row + tl.arange(0, BLOCK_T)
    inside = o_row < length
    b_d_lse = tl.load(d_lse_ptr + lse_start + o_row, mask=inside, other=0.0)
    tl.store(delta_ptr + lse_start + o_row, tl.sum(b_out * b_d_out, 1) - b_d_lse, mask=inside)


@triton.jit
def _score_gradient(
    b_s,  # raw scores, [rows, columns] in either orientation
    b_dp,  # dO V^T, in the same orientation
    b_lse,  # log-sum-exp in units of log2, broadcast over keys
    b_delta,  # broadcast over keys
    scale,  # as in the forward kernel
    softcap_log2,
    SOFTCAP: tl.constexpr,
):
    """Probabilities, and the gradient of the score before scale. Without a mask."""
    if SOFTCAP:
        b_tanh = tanh(b_s * scale)
        b_p = tl.exp2(b_tanh * softcap_log2 - b_lse)
        return b_p, b_p * (b_dp - b_delta) * (1.0 - b_tanh * b_tanh)
    b_p = tl.exp2(b_s * scale - b_lse)
    return b_p, b_p * (b_dp - b_delta)


@triton.jit
def _over_queries(
    b_k,  # [BLOCK_S, BLOCK_D], as b_v, b_dk and b_dv
    b_v,
    b_dk,
    b_dv,
    o_key,
    q,  # of one head, as load_tile reads them
    d_out,
    lse_ptr,
    delta_ptr,
    begin,  # rows [begin, end), begin a multiple of BLOCK_T
    end,
    queries,
    keys,
    stride_q,
    stride_d_out,
    scale,
    softcap_log2,
    window,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    MASKED: tl.constexpr,  # false only where every query in the range sees every key of the block
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
):
    for row in tl.range(begin, end, BLOCK_T):
        o_row = row + tl.arange(0, BLOCK_T)
        b_q = load_tile(q, row, queries, stride_q, BLOCK_T, BLOCK_D, HEAD_DIM, DESCRIPTOR)
        b_d_out = load_tile(d_out, row, queries, stride_d_out, BLOCK_T, BLOCK_D, HEAD_DIM, DESCRIPTOR)
        # A row that does not exist gives probability exp2(-inf) = 0; a key that does not, a gradient nobody stores.
        b_lse = tl.load(lse_ptr + o_row, mask=o_row < queries, other=float("inf")) * 1.4426950408889634
        b_delta = tl.load(delta_ptr + o_row, mask=o_row < queries, other=0.0)
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee")  # [BLOCK_S, BLOCK_T]
        b_dp = tl.dot(b_v, tl.trans(b_d_out), input_precision="ieee")
        b_p, b_ds = _score_gradient(b_s, b_dp, b_lse[None, :], b_delta[None, :], scale, softcap_log2, SOFTCAP)
        if MASKED:
            mask = visible(o_row[None, :] + keys - queries, o_key[:, None], keys, window, CAUSAL, WINDOW)
            b_p = tl.where(mask, b_p, 0.0)
            b_ds = tl.where(mask, b_ds, 0.0)
        b_dv = tl.dot(b_p.to(b_d_out.dtype), b_d_out, b_dv, input_precision="ieee")
        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision="ieee")
    return b_dk, b_dv


@triton.jit(do_not_specialize=["queries", "keys", "window"])
def dk_dv_kernel(
    q_ptr, k_ptr, v_ptr, d_out_ptr, dk_ptr, dv_ptr, lse_ptr, delta_ptr, cu_q_ptr, cu_k_ptr,
    stride_q_batch, stride_q_token, stride_q_head,
    stride_k_batch, stride_k_token, stride_k_head,
    stride_v_batch, stride_v_token, stride_v_head,
    stride_d_out_batch, stride_d_out_token, stride_d_out_head,
    stride_dk_batch, stride_dk_token, stride_dk_head,
    stride_dv_batch, stride_dv_token, stride_dv_head,
    stride_lse_batch, stride_lse_head,
    queries, keys, key_heads, group, gradient_scale, scale, softcap_log2, window,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PACKED: tl.constexpr, DESCRIPTOR: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    # The first keys of a causal sequence are seen by the most queries: they come first as they are.
    blocks = tl.cdiv(keys, BLOCK_S)
    key = tl.program_id(0) % blocks * BLOCK_S
    batch = tl.program_id(0) // blocks // key_heads
    key_head = tl.program_id(0) // blocks % key_heads
    q_start, queries = sequence(cu_q_ptr, batch, queries, stride_q_batch, stride_q_token, PACKED)
    d_out_start, _ = sequence(cu_q_ptr, batch, queries, stride_d_out_batch, stride_d_out_token, PACKED)
    lse_start, _ = sequence(cu_q_ptr, batch, queries, stride_lse_batch, 1, PACKED)
    k_start, keys = sequence(cu_k_ptr, batch, keys, stride_k_batch, stride_k_token, PACKED)
    v_start, _ = sequence(cu_k_ptr, batch, keys, stride_v_batch, stride_v_token, PACKED)
    dk_start, _ = sequence(cu_k_ptr, batch, keys, stride_dk_batch, stride_dk_token, PACKED)
    dv_start, _ = sequence(cu_k_ptr, batch, keys, stride_dv_batch, stride_dv_token, PACKED)
    if key >= keys:
        return
    k_ptr += k_start + key_head.to(tl.int64) * stride_k_head
    v_ptr += v_start + key_head.to(tl.int64) * stride_v_head
    k = matrix(k_ptr, keys, stride_k_token, BLOCK_S, BLOCK_D, HEAD_DIM, DESCRIPTOR)
    v = matrix(v_ptr, keys, stride_v_token, BLOCK_S, BLOCK_D, HEAD_DIM, DESCRIPTOR)
    b_k = load_tile(k, key, keys, stride_k_token, BLOCK_S, BLOCK_D, HEAD_DIM, DESCRIPTOR)
    b_v = load_tile(v, key, keys, stride_v_token, BLOCK_S, BLOCK_D, HEAD_DIM, DESCRIPTOR)
    b_dk = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    o_key = key + tl.arange(0, BLOCK_S)
    begin, full_begin, full_end, end = queries_seeing(key, queries, keys, window, BLOCK_T, BLOCK_S, CAUSAL, WINDOW)
    # All query heads that share these keys, one after the other: their sum needs no atomics.
    for member in range(group):
        head = (key_head * group + member).to(tl.int64)
        head_q_ptr = q_ptr + q_start + head * stride_q_head
        head_d_out_ptr = d_out_ptr + d_out_start + head * stride_d_out_head
        head_lse_ptr = lse_ptr + lse_start + head * stride_lse_head
        head_delta_ptr = delta_ptr + lse_start + head * stride_lse_head
        q = matrix(head_q_ptr, queries, stride_q_token, BLOCK_T, BLOCK_D, HEAD_DIM, DESCRIPTOR)
        d_out = matrix(head_d_out_ptr, queries, stride_d_out_token, BLOCK_T, BLOCK_D, HEAD_DIM, DESCRIPTOR)
        if CAUSAL or WINDOW:
            masked_end = tl.minimum(full_begin, end) if SPLIT else end
            b_dk, b_dv = _over_queries(
                b_k, b_v, b_dk, b_dv, o_key, q, d_out, head_lse_ptr, head_delta_ptr, begin, masked_end,
                queries, keys, stride_q_token, stride_d_out_token, scale, softcap_log2, window, BLOCK_T, BLOCK_D,
                HEAD_DIM, True, CAUSAL, WINDOW, SOFTCAP, DESCRIPTOR,
            )  # fmt: skip
        if SPLIT or not (CAUSAL or WINDOW):
            b_dk, b_dv = _over_queries(
                b_k, b_v, b_dk, b_dv, o_key, q, d_out, head_lse_ptr, head_delta_ptr, full_begin, full_end,
                queries, keys, stride_q_token, stride_d_out_token, scale, softcap_log2, window, BLOCK_T, BLOCK_D,
                HEAD_DIM, False, CAUSAL, WINDOW, SOFTCAP, DESCRIPTOR,
            )  # fmt: skip
        if SPLIT and WINDOW:
            b_dk, b_dv = _over_queries(
                b_k, b_v, b_dk, b_dv, o_key, q, d_out, head_lse_ptr, head_delta_ptr, full_end, end,
                queries, keys, stride_q_token, stride_d_out_token, scale, softcap_log2, window, BLOCK_T, BLOCK_D,
                HEAD_DIM, True, CAUSAL, WINDOW, SOFTCAP, DESCRIPTOR,
            )  # fmt: skip
    dk_ptr += dk_start + key_head.to(tl.int64) * stride_dk_head
    dv_ptr += dv_start + key_head.to(tl.int64) * stride_dv_head
    store_tile(dk_ptr, b_dk * gradient_scale, key, keys, stride_dk_token, BLOCK_S, BLOCK_D, HEAD_DIM)
    store_tile(dv_ptr, b_dv, key, keys, stride_dv_token, BLOCK_S, BLOCK_D, HEAD_DIM)


@triton.jit
def _over_keys(
    b_q,  # [BLOCK_T, BLOCK_D], as b_d_out and b_dq
    b_d_out,
    b_dq,
    b_lse,  # [BLOCK_T] in units of log2
    b_delta,  # [BLOCK_T]
    o_query,  # [BLOCK_T] positions
    k,  # of this sequence and head, as load_tile reads them
    v,
    begin,  # keys [begin, end), begin a multiple of BLOCK_S
    end,
    keys,
    stride_k,
    stride_v,
    scale,
    softcap_log2,
    window,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    MASKED: tl.constexpr,  # false only where every query of the block sees every key in the range
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
):
    for key in tl.range(begin, end, BLOCK_S):
        b_k = load_tile(k, key, keys, stride_k, BLOCK_S, BLOCK_D, HEAD_DIM, DESCRIPTOR, MASKED)
        b_v = load_tile(v, key, keys, stride_v, BLOCK_S, BLOCK_D, HEAD_DIM, DESCRIPTOR, MASKED)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # [BLOCK_T, BLOCK_S]
        b_dp = tl.dot(b_d_out, tl.trans(b_v), input_precision="ieee")
        _b_p, b_ds = _score_gradient(b_s, b_dp, b_lse[:, None], b_delta[:, None], scale, softcap_log2, SOFTCAP)
        if MASKED:
            o_key = key + tl.arange(0, BLOCK_S)
            b_ds = tl.where(visible(o_query[:, None], o_key[None, :], keys, window, CAUSAL, WINDOW), b_ds, 0.0)
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision="ieee")
    return b_dq


@triton.jit(do_not_specialize=["queries", "keys", "window"])
def dq_kernel(
    q_ptr, k_ptr, v_ptr, d_out_ptr, dq_ptr, lse_ptr, delta_ptr, cu_q_ptr, cu_k_ptr,
    stride_q_batch, stride_q_token, stride_q_head,
    stride_k_batch, stride_k_token, stride_k_head,
    stride_v_batch, stride_v_token, stride_v_head,
    stride_d_out_batch, stride_d_out_token, stride_d_out_head,
    stride_dq_batch, stride_dq_token, stride_dq_head,
    stride_lse_batch, stride_lse_head,
    queries, keys, heads, group, gradient_scale, scale, softcap_log2, window,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PACKED: tl.constexpr, DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    # The last blocks of a causal sequence see the most keys: first, as in the forward kernel.
    blocks = tl.cdiv(queries, BLOCK_T)
    row = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_T
    batch = tl.program_id(0) // blocks // heads
    head = tl.program_id(0) // blocks % heads
    q_start, queries = sequence(cu_q_ptr, batch, queries, stride_q_batch, stride_q_token, PACKED)
    d_out_start, _ = sequence(cu_q_ptr, batch, queries, stride_d_out_batch, stride_d_out_token, PACKED)
    dq_start, _ = sequence(cu_q_ptr, batch, queries, stride_dq_batch, stride_dq_token, PACKED)
    lse_start, _ = sequence(cu_q_ptr, batch, queries, stride_lse_batch, 1, PACKED)
    k_start, keys = sequence(cu_k_ptr, batch, keys, stride_k_batch, stride_k_token, PACKED)
    v_start, _ = sequence(cu_k_ptr, batch, keys, stride_v_batch, stride_v_token, PACKED)
    if row >= queries:
        return
    q_ptr += q_start + head.to(tl.int64) * stride_q_head
    d_out_ptr += d_out_start + head.to(tl.int64) * stride_d_out_head
    dq_ptr += dq_start + head.to(tl.int64) * stride_dq_head
    k_ptr += k_start + (head // group).to(tl.int64) * stride_k_head
    v_ptr += v_start + (head // group).to(tl.int64) * stride_v_head
    lse_start += head.to(tl.int64) * stride_lse_head
    k = matrix(k_ptr, keys, stride_k_token, BLOCK_S, BLOCK_D, HEAD_DIM, DESCRIPTOR)
    v = matrix(v_ptr, keys, stride_v_token, BLOCK_S, BLOCK_D, HEAD_DIM, DESCRIPTOR)
    o_row = row + tl.arange(0, BLOCK_T)
    o_query = o_row + keys - queries
    b_q = load_tile(q_ptr, row, queries, stride_q_token, BLOCK_T, BLOCK_D, HEAD_DIM, False)
    b_d_out = load_tile(d_out_ptr, row, queries, stride_d_out_token, BLOCK_T, BLOCK_D, HEAD_DIM, False)
    b_lse = tl.load(lse_ptr + lse_start + o_row, mask=o_row < queries, other=float("inf")) * 1.4426950408889634
    b_delta = tl.load(delta_ptr + lse_start + o_row, mask=o_row < queries, other=0.0)
    b_dq = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    begin, full_begin, full_end, end = keys_seen(row, queries, keys, window, BLOCK_T, BLOCK_S, CAUSAL, WINDOW)
    if WINDOW:
        b_dq = _over_keys(
            b_q, b_d_out, b_dq, b_lse, b_delta, o_query, k, v, begin, tl.minimum(full_begin, end), keys, stride_k_token,
            stride_v_token, scale, softcap_log2, window, BLOCK_S, BLOCK_D, HEAD_DIM, True, CAUSAL, WINDOW, SOFTCAP,
            DESCRIPTOR,
        )  # fmt: skip
    b_dq = _over_keys(
        b_q, b_d_out, b_dq, b_lse, b_delta, o_query, k, v, full_begin, full_end, keys, stride_k_token, stride_v_token,
        scale, softcap_log2, window, BLOCK_S, BLOCK_D, HEAD_DIM, False, CAUSAL, WINDOW, SOFTCAP, DESCRIPTOR,
    )  # fmt: skip
    b_dq = _over_keys(
        b_q, b_d_out, b_dq, b_lse, b_delta, o_query, k, v, full_end, end, keys, stride_k_token, stride_v_token,
        scale, softcap_log2, window, BLOCK_S, BLOCK_D, HEAD_DIM, True, CAUSAL, WINDOW, SOFTCAP, DESCRIPTOR,
    )  # fmt: skip
    store_tile(dq_ptr, b_dq * gradient_scale, row, queries, stride_dq_token, BLOCK_T, BLOCK_D, HEAD_DIM)
