"""The backward kernels of flash attention: delta, then dk and dv, then dq. No atomics: bit-equal from run to run.

With P = exp(S - lse) recomputed from the saved log-sum-exp, and dP = dO V^T (Dao, arXiv:2307.08691):

    delta = rowsum(dO * O) - dlse    dV = P^T dO    dS = P * (dP - delta)    dQ = scale * dS K    dK = scale * dS^T Q

A program of the first pass owns a block of keys and walks over the queries that see it; a program of the second owns a
block of queries and walks over the keys it sees. Every gradient is written once, by its owner.

Names: b_ a block in registers, o_ offsets. Sizes: T queries, S keys, D head dim.
"""

import triton
import triton.language as tl

from kernels.attention.tile import load_tile, sequence, store_tile, tanh, visible


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
    batch = tl.program_id(1) // heads
    head = tl.program_id(1) % heads
    row = tl.program_id(0) * BLOCK_T
    out_start, length = sequence(cu_q_ptr, batch, queries, stride_out_batch, stride_out_token, PACKED)
    d_out_start, _ = sequence(cu_q_ptr, batch, queries, stride_d_out_batch, stride_d_out_token, PACKED)
    lse_start, _ = sequence(cu_q_ptr, batch, queries, stride_lse_batch, 1, PACKED)
    if row >= length:
        return
    out_ptr += out_start + head.to(tl.int64) * stride_out_head
    d_out_ptr += d_out_start + head.to(tl.int64) * stride_d_out_head
    lse_start += head.to(tl.int64) * stride_lse_head
    b_out = load_tile(out_ptr, row, length, stride_out_token, BLOCK_T, BLOCK_D, HEAD_DIM).to(tl.float32)
    b_d_out = load_tile(d_out_ptr, row, length, stride_d_out_token, BLOCK_T, BLOCK_D, HEAD_DIM).to(tl.float32)
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
    mask,
    scale,  # as in the forward kernel
    softcap_log2,
    SOFTCAP: tl.constexpr,
):
    """Probabilities, and the gradient of the score before scale."""
    b_s = b_s * scale
    if SOFTCAP:
        b_tanh = tanh(b_s)
        b_p = tl.where(mask, tl.exp2(b_tanh * softcap_log2 - b_lse), 0.0)
        return b_p, b_p * (b_dp - b_delta) * (1.0 - b_tanh * b_tanh)
    b_p = tl.where(mask, tl.exp2(b_s - b_lse), 0.0)
    return b_p, b_p * (b_dp - b_delta)


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
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1) // key_heads
    key_head = tl.program_id(1) % key_heads
    key = tl.program_id(0) * BLOCK_S
    q_start, n_queries = sequence(cu_q_ptr, batch, queries, stride_q_batch, stride_q_token, PACKED)
    d_out_start, _ = sequence(cu_q_ptr, batch, queries, stride_d_out_batch, stride_d_out_token, PACKED)
    lse_start, _ = sequence(cu_q_ptr, batch, queries, stride_lse_batch, 1, PACKED)
    k_start, n_keys = sequence(cu_k_ptr, batch, keys, stride_k_batch, stride_k_token, PACKED)
    v_start, _ = sequence(cu_k_ptr, batch, keys, stride_v_batch, stride_v_token, PACKED)
    dk_start, _ = sequence(cu_k_ptr, batch, keys, stride_dk_batch, stride_dk_token, PACKED)
    dv_start, _ = sequence(cu_k_ptr, batch, keys, stride_dv_batch, stride_dv_token, PACKED)
    if key >= n_keys:
        return
    k_ptr += k_start + key_head.to(tl.int64) * stride_k_head
    v_ptr += v_start + key_head.to(tl.int64) * stride_v_head
    b_k = load_tile(k_ptr, key, n_keys, stride_k_token, BLOCK_S, BLOCK_D, HEAD_DIM)
    b_v = load_tile(v_ptr, key, n_keys, stride_v_token, BLOCK_S, BLOCK_D, HEAD_DIM)
    b_dk = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    o_key = key + tl.arange(0, BLOCK_S)
    # The queries that see some key of the block, as rows: position = row + shift.
    shift = n_keys - n_queries
    begin = 0
    end = n_queries
    if CAUSAL:
        begin = tl.maximum(key - shift, 0) // BLOCK_T * BLOCK_T
    if WINDOW:
        end = tl.minimum(n_queries, tl.maximum(key + BLOCK_S - 1 + window - shift, 0))
        if not CAUSAL:
            begin = tl.maximum(key - window + 1 - shift, 0) // BLOCK_T * BLOCK_T
    # All query heads that share these keys, one after the other: their sum needs no atomics.
    for member in range(group):
        head = key_head * group + member
        head_q_ptr = q_ptr + q_start + head.to(tl.int64) * stride_q_head
        head_d_out_ptr = d_out_ptr + d_out_start + head.to(tl.int64) * stride_d_out_head
        lse_offset = lse_start + head.to(tl.int64) * stride_lse_head
        for row in tl.range(begin, end, BLOCK_T):
            o_row = row + tl.arange(0, BLOCK_T)
            inside = o_row < n_queries
            b_q = load_tile(head_q_ptr, row, n_queries, stride_q_token, BLOCK_T, BLOCK_D, HEAD_DIM)
            b_d_out = load_tile(head_d_out_ptr, row, n_queries, stride_d_out_token, BLOCK_T, BLOCK_D, HEAD_DIM)
            b_lse = tl.load(lse_ptr + lse_offset + o_row, mask=inside, other=0.0) * 1.4426950408889634
            b_delta = tl.load(delta_ptr + lse_offset + o_row, mask=inside, other=0.0)
            mask = visible(o_row[None, :] + shift, o_key[:, None], n_keys, window, CAUSAL, WINDOW) & inside[None, :]
            b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee")  # [BLOCK_S, BLOCK_T]
            b_dp = tl.dot(b_v, tl.trans(b_d_out), input_precision="ieee")
            b_p, b_ds = _score_gradient(b_s, b_dp, b_lse[None, :], b_delta[None, :], mask, scale, softcap_log2, SOFTCAP)
            b_dv = tl.dot(b_p.to(b_d_out.dtype), b_d_out, b_dv, input_precision="ieee")
            b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision="ieee")
    dk_ptr += dk_start + key_head.to(tl.int64) * stride_dk_head
    dv_ptr += dv_start + key_head.to(tl.int64) * stride_dv_head
    store_tile(dk_ptr, b_dk * gradient_scale, key, n_keys, stride_dk_token, BLOCK_S, BLOCK_D, HEAD_DIM)
    store_tile(dv_ptr, b_dv, key, n_keys, stride_dv_token, BLOCK_S, BLOCK_D, HEAD_DIM)


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
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    # The last blocks of a causal sequence see the most keys: first, as in the forward kernel.
    row = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_T
    batch = tl.program_id(1) // heads
    head = tl.program_id(1) % heads
    q_start, n_queries = sequence(cu_q_ptr, batch, queries, stride_q_batch, stride_q_token, PACKED)
    d_out_start, _ = sequence(cu_q_ptr, batch, queries, stride_d_out_batch, stride_d_out_token, PACKED)
    dq_start, _ = sequence(cu_q_ptr, batch, queries, stride_dq_batch, stride_dq_token, PACKED)
    lse_start, _ = sequence(cu_q_ptr, batch, queries, stride_lse_batch, 1, PACKED)
    k_start, n_keys = sequence(cu_k_ptr, batch, keys, stride_k_batch, stride_k_token, PACKED)
    v_start, _ = sequence(cu_k_ptr, batch, keys, stride_v_batch, stride_v_token, PACKED)
    if row >= n_queries:
        return
    q_ptr += q_start + head.to(tl.int64) * stride_q_head
    d_out_ptr += d_out_start + head.to(tl.int64) * stride_d_out_head
    dq_ptr += dq_start + head.to(tl.int64) * stride_dq_head
    k_ptr += k_start + (head // group).to(tl.int64) * stride_k_head
    v_ptr += v_start + (head // group).to(tl.int64) * stride_v_head
    lse_start += head.to(tl.int64) * stride_lse_head
    o_row = row + tl.arange(0, BLOCK_T)
    inside = o_row < n_queries
    b_q = load_tile(q_ptr, row, n_queries, stride_q_token, BLOCK_T, BLOCK_D, HEAD_DIM)
    b_d_out = load_tile(d_out_ptr, row, n_queries, stride_d_out_token, BLOCK_T, BLOCK_D, HEAD_DIM)
    b_lse = tl.load(lse_ptr + lse_start + o_row, mask=inside, other=0.0) * 1.4426950408889634
    b_delta = tl.load(delta_ptr + lse_start + o_row, mask=inside, other=0.0)
    b_dq = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    shift = n_keys - n_queries
    begin = 0
    end = n_keys
    if CAUSAL:
        end = tl.minimum(n_keys, tl.maximum(row + BLOCK_T + shift, 0))
    if WINDOW:
        begin = tl.maximum(row + shift - window + 1, 0) // BLOCK_S * BLOCK_S
        if not CAUSAL:
            end = tl.minimum(n_keys, tl.maximum(row + BLOCK_T - 1 + shift + window, 0))
    for key in tl.range(begin, end, BLOCK_S):
        b_k = load_tile(k_ptr, key, n_keys, stride_k_token, BLOCK_S, BLOCK_D, HEAD_DIM)
        b_v = load_tile(v_ptr, key, n_keys, stride_v_token, BLOCK_S, BLOCK_D, HEAD_DIM)
        o_key = key + tl.arange(0, BLOCK_S)
        mask = visible(o_row[:, None] + shift, o_key[None, :], n_keys, window, CAUSAL, WINDOW)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # [BLOCK_T, BLOCK_S]
        b_dp = tl.dot(b_d_out, tl.trans(b_v), input_precision="ieee")
        _b_p, b_ds = _score_gradient(b_s, b_dp, b_lse[:, None], b_delta[:, None], mask, scale, softcap_log2, SOFTCAP)
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision="ieee")
    store_tile(dq_ptr, b_dq * gradient_scale, row, n_queries, stride_dq_token, BLOCK_T, BLOCK_D, HEAD_DIM)
