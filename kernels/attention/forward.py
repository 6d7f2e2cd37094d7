"""The forward kernel of flash attention: one program per block of queries, online softmax over blocks of keys.

A program holds its queries, a running row maximum and row sum, and the output so far; each block of keys rescales
what is there to the new maximum (Milakov & Gimelshein, arXiv:1805.02867; Dao, arXiv:2307.08691). Scores never leave
the chip. All exponentials are powers of two: log2(e) is folded into the scale.

Names: b_ a block in registers, o_ offsets. Sizes: T queries, S keys, D head dim.
"""

import triton
import triton.language as tl

from kernels.attention.tile import load_tile, sequence, store_tile, tanh, visible


@triton.jit
def _attend(
    b_q,  # [BLOCK_T, BLOCK_D]
    b_out,  # [BLOCK_T, BLOCK_D] fp32, not yet divided by the row sum
    b_max,  # [BLOCK_T] fp32, of the scores in units of log2
    b_sum,  # [BLOCK_T] fp32
    o_query,  # [BLOCK_T] positions, aligned with the keys
    k_ptr,  # of this sequence and head
    v_ptr,
    begin,  # keys [begin, end), begin a multiple of BLOCK_S
    end,
    keys,
    stride_k,
    stride_v,
    scale,  # without softcap: of the scores, times log2(e); with it: of the scores, divided by the cap
    softcap_log2,  # the cap, times log2(e)
    window,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    MASKED: tl.constexpr,  # false only where every query of the block sees every key in the range
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    for key in tl.range(begin, end, BLOCK_S):
        b_k = load_tile(k_ptr, key, keys, stride_k, BLOCK_S, BLOCK_D, HEAD_DIM)  # [BLOCK_S, BLOCK_D]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale  # [BLOCK_T, BLOCK_S]
        if SOFTCAP:
            b_s = tanh(b_s) * softcap_log2
        if MASKED:
            o_key = key + tl.arange(0, BLOCK_S)
            mask = visible(o_query[:, None], o_key[None, :], keys, window, CAUSAL, WINDOW)
            b_s = tl.where(mask, b_s, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        # A row that has seen no key yet has a maximum of -inf, and -inf - -inf is NaN.
        b_shift = tl.where(b_new == float("-inf"), 0.0, b_new) if MASKED else b_new
        b_p = tl.exp2(b_s - b_shift[:, None])
        b_rescale = tl.exp2(b_max - b_shift)
        b_sum = b_sum * b_rescale + tl.sum(b_p, 1)
        b_v = load_tile(v_ptr, key, keys, stride_v, BLOCK_S, BLOCK_D, HEAD_DIM)
        b_out = tl.dot(b_p.to(b_v.dtype), b_v, b_out * b_rescale[:, None], input_precision="ieee")
        b_max = b_new
    return b_out, b_max, b_sum


# Lengths change from batch to batch: a kernel of its own for each would be compiled at every 1 or multiple of 16.
@triton.jit(do_not_specialize=["queries", "keys", "window"])
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,  # fp32, natural logarithm
    cu_q_ptr,
    cu_k_ptr,
    stride_q_batch,
    stride_q_token,
    stride_q_head,
    stride_k_batch,
    stride_k_token,
    stride_k_head,
    stride_v_batch,
    stride_v_token,
    stride_v_head,
    stride_out_batch,
    stride_out_token,
    stride_out_head,
    stride_lse_batch,
    stride_lse_head,
    queries,
    keys,
    heads,
    group,  # query heads per key head
    scale,
    softcap_log2,
    window,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PACKED: tl.constexpr,
):
    # The last blocks of a causal sequence see the most keys: started first, they do not run on alone at the end.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    batch = tl.program_id(1) // heads
    head = tl.program_id(1) % heads
    q_start, queries = sequence(cu_q_ptr, batch, queries, stride_q_batch, stride_q_token, PACKED)
    k_start, keys = sequence(cu_k_ptr, batch, keys, stride_k_batch, stride_k_token, PACKED)
    v_start, _ = sequence(cu_k_ptr, batch, keys, stride_v_batch, stride_v_token, PACKED)
    out_start, _ = sequence(cu_q_ptr, batch, queries, stride_out_batch, stride_out_token, PACKED)
    lse_start, _ = sequence(cu_q_ptr, batch, queries, stride_lse_batch, 1, PACKED)
    row = block * BLOCK_T
    if row >= queries:
        return
    q_ptr += q_start + head.to(tl.int64) * stride_q_head
    k_ptr += k_start + (head // group).to(tl.int64) * stride_k_head
    v_ptr += v_start + (head // group).to(tl.int64) * stride_v_head

    # The positions of the first and the last query, counted so that the last query stands at the last key.
    shift = keys - queries
    first = row + shift
    last = tl.minimum(row + BLOCK_T, queries) - 1 + shift
    # Keys [begin, end) are seen by some query of the block; those of [full_begin, full_end) by all of them.
    begin = 0
    full_begin = 0
    end = keys
    full_end = keys // BLOCK_S * BLOCK_S
    if CAUSAL:
        end = tl.minimum(keys, last + 1)
        full_end = tl.minimum(full_end, (tl.maximum(first + 1, 0)) // BLOCK_S * BLOCK_S)
    if WINDOW:
        begin = tl.maximum(first - window + 1, 0) // BLOCK_S * BLOCK_S
        full_begin = tl.cdiv(tl.maximum(row + BLOCK_T - 1 + shift - window + 1, 0), BLOCK_S) * BLOCK_S
        if not CAUSAL:
            end = tl.minimum(keys, last + window)
            full_end = tl.minimum(full_end, tl.maximum(first + window, 0) // BLOCK_S * BLOCK_S)
    full_begin = tl.minimum(tl.maximum(full_begin, begin), tl.maximum(end, begin))
    full_end = tl.maximum(full_end, full_begin)

    o_query = first + tl.arange(0, BLOCK_T)
    b_q = load_tile(q_ptr, row, queries, stride_q_token, BLOCK_T, BLOCK_D, HEAD_DIM)
    b_out = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    b_max = tl.full([BLOCK_T], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_T], tl.float32)
    if WINDOW:
        b_out, b_max, b_sum = _attend(
            b_q, b_out, b_max, b_sum, o_query, k_ptr, v_ptr, begin, tl.minimum(full_begin, end), keys, stride_k_token,
            stride_v_token, scale, softcap_log2, window, BLOCK_S, BLOCK_D, HEAD_DIM, True, CAUSAL, WINDOW, SOFTCAP,
        )  # fmt: skip
    b_out, b_max, b_sum = _attend(
        b_q, b_out, b_max, b_sum, o_query, k_ptr, v_ptr, full_begin, full_end, keys, stride_k_token,
        stride_v_token, scale, softcap_log2, window, BLOCK_S, BLOCK_D, HEAD_DIM, WINDOW, CAUSAL, WINDOW, SOFTCAP,
    )  # fmt: skip
    b_out, b_max, b_sum = _attend(
        b_q, b_out, b_max, b_sum, o_query, k_ptr, v_ptr, full_end, end, keys, stride_k_token,
        stride_v_token, scale, softcap_log2, window, BLOCK_S, BLOCK_D, HEAD_DIM, True, CAUSAL, WINDOW, SOFTCAP,
    )  # fmt: skip

    # A row that saw no key: sum 0, maximum -inf. It gives 0, and -inf for its log-sum-exp.
    b_sum = tl.where(b_sum == 0.0, 1.0, b_sum)
    b_out = b_out / b_sum[:, None]
    out_ptr += out_start + head.to(tl.int64) * stride_out_head
    store_tile(out_ptr, b_out, row, queries, stride_out_token, BLOCK_T, BLOCK_D, HEAD_DIM)
    b_lse = (b_max + tl.log2(b_sum)) * 0.6931471805599453
    lse_ptr += lse_start + head.to(tl.int64) * stride_lse_head
    o_row = row + tl.arange(0, BLOCK_T)
    tl.store(lse_ptr + o_row, b_lse, mask=o_row < queries)
