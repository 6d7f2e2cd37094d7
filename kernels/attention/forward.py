"""The forward kernel of flash attention: one program per block of queries, online softmax over blocks of keys.

A program holds its queries, a running row maximum and row sum, and the output so far; each block of keys rescales
what is there to the new maximum (Milakov & Gimelshein, arXiv:1805.02867; Dao, arXiv:2307.08691). Scores never leave
the chip. All exponentials are powers of two: log2(e) is folded into the scale.

Names: b_ a block in registers, o_ offsets. Sizes: T queries, S keys, D head dim.
"""

import triton
import triton.language as tl

from kernels.attention.tile import keys_seen, load_tile, matrix, sequence, store_tile, tanh, visible


@triton.jit
def _attend(
    b_q,  # [BLOCK_T, BLOCK_D]
    b_out,  # [BLOCK_T, BLOCK_D] fp32, not yet divided by the row sum
    b_max,  # [BLOCK_T] fp32, of the scores in units of log2
    b_sum,  # [BLOCK_T] fp32
    o_query,  # [BLOCK_T] positions
    k,  # of this sequence and head, as load_tile reads them
    v,
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
    DESCRIPTOR: tl.constexpr,
    SPECIALIZE: tl.constexpr,
):
    for key in tl.range(begin, end, BLOCK_S, warp_specialize=SPECIALIZE):
        b_k = load_tile(k, key, keys, stride_k, BLOCK_S, BLOCK_D, HEAD_DIM, DESCRIPTOR, MASKED)  # [BLOCK_S, BLOCK_D]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # [BLOCK_T, BLOCK_S]
        # What turns b_s into scores in units of log2. It waits for the exponential, where one instruction multiplies
        # and subtracts.
        unit = scale
        if SOFTCAP:
            b_s = tanh(b_s * scale)
            unit = softcap_log2
        if MASKED:
            o_key = key + tl.arange(0, BLOCK_S)
            mask = visible(o_query[:, None], o_key[None, :], keys, window, CAUSAL, WINDOW)
            b_s = tl.where(mask, b_s, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1) * unit)
        # A row that has seen no key yet has a maximum of -inf, and -inf - -inf is NaN.
        b_shift = tl.where(b_new == float("-inf"), 0.0, b_new) if MASKED else b_new
        b_p = tl.exp2(b_s * unit - b_shift[:, None])
        b_rescale = tl.exp2(b_max - b_shift)
        b_sum = b_sum * b_rescale + tl.sum(b_p, 1)
        b_v = load_tile(v, key, keys, stride_v, BLOCK_S, BLOCK_D, HEAD_DIM, DESCRIPTOR, MASKED)
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
    DESCRIPTOR: tl.constexpr,
    SPECIALIZE: tl.constexpr,
):
    # One axis for all: the others end at 65,535, fewer than the heads of a large packed batch.
    blocks = tl.cdiv(queries, BLOCK_T)
    # The last blocks of a causal sequence see the most keys: started first, they do not run on alone at the end.
    row = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_T
    batch = tl.program_id(0) // blocks // heads
    head = tl.program_id(0) // blocks % heads
    q_start, queries = sequence(cu_q_ptr, batch, queries, stride_q_batch, stride_q_token, PACKED)
    k_start, keys = sequence(cu_k_ptr, batch, keys, stride_k_batch, stride_k_token, PACKED)
    v_start, _ = sequence(cu_k_ptr, batch, keys, stride_v_batch, stride_v_token, PACKED)
    out_start, _ = sequence(cu_q_ptr, batch, queries, stride_out_batch, stride_out_token, PACKED)
    lse_start, _ = sequence(cu_q_ptr, batch, queries, stride_lse_batch, 1, PACKED)
    if not SPECIALIZE:  # noqa: SIM102 - one is decided by the compiler, the other when it runs
        if row >= queries:
            return
    q_ptr += q_start + head.to(tl.int64) * stride_q_head
    k_ptr += k_start + (head // group).to(tl.int64) * stride_k_head
    v_ptr += v_start + (head // group).to(tl.int64) * stride_v_head
    k = matrix(k_ptr, keys, stride_k_token, BLOCK_S, BLOCK_D, HEAD_DIM, DESCRIPTOR)
    v = matrix(v_ptr, keys, stride_v_token, BLOCK_S, BLOCK_D, HEAD_DIM, DESCRIPTOR)

    o_query = row + keys - queries + tl.arange(0, BLOCK_T)
    # Only where every load goes through a descriptor does the compiler hand them to warps of their own.
    q = matrix(q_ptr, queries, stride_q_token, BLOCK_T, BLOCK_D, HEAD_DIM, SPECIALIZE)
    b_q = load_tile(q, row, queries, stride_q_token, BLOCK_T, BLOCK_D, HEAD_DIM, SPECIALIZE)
    b_out = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    b_max = tl.full([BLOCK_T], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_T], tl.float32)
    begin, full_begin, full_end, end = keys_seen(row, queries, keys, window, BLOCK_T, BLOCK_S, CAUSAL, WINDOW)
    if SPECIALIZE:  # in a single loop only, and without a branch around it
        end = tl.where(row < queries, end, 0)
        b_out, b_max, b_sum = _attend(
            b_q, b_out, b_max, b_sum, o_query, k, v, begin, end, keys, stride_k_token, stride_v_token, scale,
            softcap_log2, window, BLOCK_S, BLOCK_D, HEAD_DIM, True, CAUSAL, WINDOW, SOFTCAP, DESCRIPTOR, True,
        )  # fmt: skip
    else:
        if WINDOW:
            b_out, b_max, b_sum = _attend(
                b_q, b_out, b_max, b_sum, o_query, k, v, begin, tl.minimum(full_begin, end), keys, stride_k_token,
                stride_v_token, scale, softcap_log2, window, BLOCK_S, BLOCK_D, HEAD_DIM, True, CAUSAL, WINDOW, SOFTCAP,
                DESCRIPTOR, False,
            )  # fmt: skip
        b_out, b_max, b_sum = _attend(
            b_q, b_out, b_max, b_sum, o_query, k, v, full_begin, full_end, keys, stride_k_token, stride_v_token, scale,
            softcap_log2, window, BLOCK_S, BLOCK_D, HEAD_DIM, False, CAUSAL, WINDOW, SOFTCAP, DESCRIPTOR, False,
        )  # fmt: skip
        b_out, b_max, b_sum = _attend(
            b_q, b_out, b_max, b_sum, o_query, k, v, full_end, end, keys, stride_k_token, stride_v_token, scale,
            softcap_log2, window, BLOCK_S, BLOCK_D, HEAD_DIM, True, CAUSAL, WINDOW, SOFTCAP, DESCRIPTOR, False,
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
