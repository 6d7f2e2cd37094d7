"""The kernels of decode attention: a few queries over many keys, which are split over programs and merged.

A program holds the queries of all heads that share a key head, row = token * group + member, so that every key is read
once; one such program alone would leave most of a GPU idle, so that several share the keys of a sequence (Flash-
Decoding, Dao et al. 2023). Each leaves the softmax of its own keys and their log-sum-exp, by which a second kernel
weighs them, always in the same order.

Lengths are read on the device, and the grid depends on shapes alone: a CUDA graph can be replayed as sequences grow.
Names: b_ a block in registers, o_ offsets.
"""

import triton
import triton.language as tl

from kernels.attention.tile import tanh, visible


@triton.jit
def _blocks(table_ptr, key, end, BLOCK_S: tl.constexpr, PAGE: tl.constexpr):
    """Numbers of the blocks that hold keys [key, key + BLOCK_S), int64."""
    o_key = key + tl.arange(0, BLOCK_S)
    return tl.load(table_ptr + o_key // PAGE, mask=o_key < end, other=0).to(tl.int64)


@triton.jit
def _load_keys(
    base_ptr,  # of the head
    o_start,  # [BLOCK_S] or one for all, int64: where their sequence or block begins
    o_row,  # [BLOCK_S] their rows there
    inside,  # [BLOCK_S]
    stride_row,
    BLOCK_D: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    o_d = tl.arange(0, BLOCK_D)
    pointers = base_ptr + (o_start + o_row.to(tl.int64) * stride_row)[:, None] + o_d[None, :]
    mask = inside[:, None]
    if BLOCK_D != HEAD_DIM:
        mask = mask & (o_d < HEAD_DIM)[None, :]
    # What lies in a cache beyond the length may be NaN, and 0 * NaN is NaN.
    return tl.load(pointers, mask=mask, other=0.0)


# Numbers that change from call to call: a kernel of its own for each would be compiled at every 1 or multiple of 16.
@triton.jit(do_not_specialize=["queries", "keys", "splits", "window"])
def decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,  # [batch, queries, heads, splits, HEAD_DIM], with SPLIT fp32
    lse_ptr,  # fp32 [batch, queries, heads, splits], in units of log2; written with SPLIT only
    lengths_ptr,  # int32 or int64 [batch], dense
    table_ptr,  # int32 [batch, blocks], read with PAGE only
    stride_q_batch,
    stride_q_token,
    stride_q_head,
    stride_k_batch,  # with PAGE: of a block
    stride_k_token,
    stride_k_head,
    stride_v_batch,
    stride_v_token,
    stride_v_head,
    stride_table_batch,
    queries,
    keys,  # that the cache has room for, per sequence
    key_heads,
    group,  # query heads per key head
    splits,
    scale,  # without softcap: of the scores, times log2(e); with it: of the scores, divided by the cap
    softcap_log2,  # the cap, times log2(e)
    window,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,  # rows
    BLOCK_S: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PAGE: tl.constexpr,  # keys per block of a paged cache, 0 where it is not paged
    SPLIT: tl.constexpr,  # splits > 1
):
    # Programs that read the same keys are neighbours, and share them in the L2 cache.
    blocks = tl.cdiv(queries * group, BLOCK_T)
    row = tl.program_id(0) % blocks * BLOCK_T
    split = tl.program_id(0) // blocks % splits
    head = tl.program_id(0) // blocks // splits % key_heads
    batch = (tl.program_id(0) // blocks // splits // key_heads).to(tl.int64)

    o_row = row + tl.arange(0, BLOCK_T)
    real = o_row < queries * group
    o_token = o_row // group
    o_head = head * group + o_row % group
    o_out = ((batch * queries + o_token) * key_heads * group + o_head) * splits + split

    # The keys that some row of this program sees are dealt out anew for each length: of a short sequence in a large
    # cache, too, every split has its share.
    length = tl.minimum(tl.load(lengths_ptr + batch).to(tl.int32), keys)
    begin = 0
    if WINDOW:
        begin = tl.maximum(length - queries + row // group - window + 1, 0)
    end = tl.maximum(length - queries + tl.minimum((row + BLOCK_T - 1) // group, queries - 1) + 1, begin)
    share = tl.cdiv(tl.cdiv(end - begin, splits), BLOCK_S) * BLOCK_S
    begin += split * share
    end = tl.minimum(begin + share, end)
    if SPLIT:  # noqa: SIM102 - one is decided by the compiler, the other when it runs
        if begin >= end:
            tl.store(lse_ptr + o_out, tl.full([BLOCK_T], float("-inf"), tl.float32), mask=real)
            return

    o_d = tl.arange(0, BLOCK_D)
    inside = real[:, None] & (o_d < HEAD_DIM)[None, :]
    o_q = batch * stride_q_batch + o_token.to(tl.int64) * stride_q_token + o_head.to(tl.int64) * stride_q_head
    b_q = tl.load(q_ptr + o_q[:, None] + o_d[None, :], mask=inside, other=0.0)  # [BLOCK_T, BLOCK_D]
    k_ptr += head.to(tl.int64) * stride_k_head
    v_ptr += head.to(tl.int64) * stride_v_head
    o_position = length - queries + o_token

    b_out = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    b_max = tl.full([BLOCK_T], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_T], tl.float32)
    start = batch  # of the tile's keys: the sequence's number, or those of their blocks
    if PAGE:
        table_ptr += batch * stride_table_batch
        start = _blocks(table_ptr, begin, end, BLOCK_S, PAGE)
    for key in tl.range(begin, end, BLOCK_S):
        o_key = key + tl.arange(0, BLOCK_S)
        held = o_key < end
        o_place = o_key
        next_start = start
        if PAGE:
            o_place = o_key % PAGE
            # Looked up a tile ahead: the compiler sends for keys early only where their addresses need no other load.
            next_start = _blocks(table_ptr, key + BLOCK_S, end, BLOCK_S, PAGE)
        b_k = _load_keys(k_ptr, start * stride_k_batch, o_place, held, stride_k_token, BLOCK_D, HEAD_DIM)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # [BLOCK_T, BLOCK_S]
        unit = scale
        if SOFTCAP:
            b_s = tanh(b_s * scale)
            unit = softcap_log2
        mask = visible(o_position[:, None], o_key[None, :], end, window, True, WINDOW)
        b_s = tl.where(mask, b_s, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1) * unit)
        # A row that has seen no key yet has a maximum of -inf, and -inf - -inf is NaN.
        b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_p = tl.exp2(b_s * unit - b_shift[:, None])
        b_rescale = tl.exp2(b_max - b_shift)
        b_sum = b_sum * b_rescale + tl.sum(b_p, 1)
        b_v = _load_keys(v_ptr, start * stride_v_batch, o_place, held, stride_v_token, BLOCK_D, HEAD_DIM)
        b_out = tl.dot(b_p.to(b_v.dtype), b_v, b_out * b_rescale[:, None], input_precision="ieee")
        b_max = b_new
        start = next_start

    # A row that saw no key: sum 0, maximum -inf. It gives 0, and -inf for its log-sum-exp.
    b_sum = tl.where(b_sum == 0.0, 1.0, b_sum)
    b_out = b_out / b_sum[:, None]
    tl.store(out_ptr + o_out[:, None] * HEAD_DIM + o_d[None, :], b_out.to(out_ptr.dtype.element_ty), mask=inside)
    if SPLIT:
        tl.store(lse_ptr + o_out, b_max + tl.log2(b_sum), mask=real)


@triton.jit
def merge_kernel(
    part_ptr,  # fp32 [rows, SPLITS, HEAD_DIM]; that of an empty split was never written
    lse_ptr,  # fp32 [rows, SPLITS], in units of log2
    out_ptr,  # [rows, HEAD_DIM]
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,  # of a program's columns, a part of the head dim where there are many splits
    SPLITS: tl.constexpr,
):
    chunks = tl.cdiv(HEAD_DIM, BLOCK_D)
    row = (tl.program_id(0) // chunks).to(tl.int64)
    o_d = tl.program_id(0) % chunks * BLOCK_D + tl.arange(0, BLOCK_D)
    o_part = row * SPLITS + tl.arange(0, SPLITS)
    b_lse = tl.load(lse_ptr + o_part)
    b_max = tl.max(b_lse, 0)
    # exp2(-inf - -inf) would be NaN in a row that sees nothing.
    b_weight = tl.exp2(b_lse - tl.where(b_max == float("-inf"), 0.0, b_max))
    # The parts are not made to wait for the log-sum-exps, which alone tell which of them are there.
    b_part = tl.load(part_ptr + o_part[:, None] * HEAD_DIM + o_d[None, :], mask=(o_d < HEAD_DIM)[None, :], other=0.0)
    b_part = tl.where((b_lse > float("-inf"))[:, None], b_part, 0.0)  # [SPLITS, BLOCK_D]
    b_sum = tl.sum(b_weight, 0)
    b_out = tl.sum(b_part * b_weight[:, None], 0) / tl.where(b_sum == 0.0, 1.0, b_sum)
    tl.store(out_ptr + row * HEAD_DIM + o_d, b_out.to(out_ptr.dtype.element_ty), mask=o_d < HEAD_DIM)
